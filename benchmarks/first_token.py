"""Time from a decoded image to the first token of the answer: ours beside the published steps, eager attention.

    python -m benchmarks.first_token                  # CPU: a part of the 8B, one tile; GPU: all, 2048x1536, 13 tiles

The peer cuts tiles by the published recipe, writes the image tokens out, computes logits for all positions, and
attends eagerly, as the published class does by default; both run the same weights and give the same first token.
"""

import torch
from nemotron_vl.image_processing import NemotronVLImageProcessor
from nemotron_vl.prompts import IMAGE_TOKEN, encode_prompt, image_run

from benchmarks.common import (
    DEVICE,
    IMAGE_TOKEN_ID,
    ONE_TOKEN,
    compare,
    make_model,
    read_options,
    report,
    require_equal,
)
from benchmarks.tiling import drawn_page, published_recipe
from tools.tiny_checkpoint import make_tokenizer


@torch.no_grad()
def main() -> None:
    arguments = read_options(__doc__, size=("2048x1536", "256x256"), rounds=(11, 5))
    model, tokenizer, processor = make_model(), make_tokenizer(), NemotronVLImageProcessor()
    image = drawn_page(*map(int, arguments.size.split("x")))
    prompt = f"{IMAGE_TOKEN}\nWhat is the total?"
    own_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def attend(kind: str) -> None:
        model.set_attn_implementation(kind)

    def model_ids(ids: list[int]) -> torch.Tensor:
        return torch.tensor([[IMAGE_TOKEN_ID if token == own_id else token for token in ids]], device=DEVICE)

    def published() -> int:
        attend("eager")
        tiles = published_recipe(image).to(DEVICE)
        text = prompt.replace(IMAGE_TOKEN, f"<img>{IMAGE_TOKEN * (256 * len(tiles))}</img>")
        ids = model_ids(tokenizer(text, add_special_tokens=False)["input_ids"])
        return int(model(input_ids=ids, pixel_values=tiles).logits[0, -1].argmax())

    def ours() -> int:
        attend("sdpa")
        tiles = processor(image, do_rescale=False)["pixel_values"]
        runs = {IMAGE_TOKEN: [image_run(len(tiles), 256)]}
        ids = model_ids(encode_prompt(tokenizer, prompt, runs, own_id).input_ids)
        return int(model.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=tiles, **ONE_TOKEN)[0, -1])

    require_equal([published(), ours()])
    result = compare({"published": published, "ours": ours}, peer="published", rounds=arguments.rounds)
    report("first_token", [{"case": arguments.size, "equal": True, **result}], model, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
