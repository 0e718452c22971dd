"""A decoded picture to the first token of its answer: ours beside the published steps on plain attention.

    python -m benchmarks.first_token                  # CPU: a part of the 8B, one tile; GPU: all, 2048x1536, 13 tiles

The peer cuts tiles by the published recipe, writes the image tokens out, computes logits for all positions, and
attends eagerly, as the published class does by default; both run the same weights and give the same first token.
"""

import argparse

import torch
from nemotron_vl.image_processing import NemotronVLImageProcessor
from nemotron_vl.processing_nemotron_vl import IMAGE_TOKEN, encode_prompt, image_run

from benchmarks.common import DEVICE, IMAGE_TOKEN_ID, compare, make_model, report
from benchmarks.tiling import drawn_page, published_recipe
from tools.tiny_checkpoint import make_tokenizer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2048x1536" if DEVICE == "cuda" else "256x256", help="WIDTHxHEIGHT")
    parser.add_argument("--rounds", type=int, default=11 if DEVICE == "cuda" else 5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, processor = make_model(), make_tokenizer(), NemotronVLImageProcessor()
    picture = drawn_page(*map(int, arguments.size.split("x")))
    prompt = f"{IMAGE_TOKEN}\nWhat is the total?"
    own_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def attend(kind: str) -> None:
        model.set_attn_implementation(kind)

    def model_ids(ids: list[int]) -> torch.Tensor:
        return torch.tensor([[IMAGE_TOKEN_ID if token == own_id else token for token in ids]], device=DEVICE)

    def published() -> int:
        attend("eager")
        tiles = published_recipe(picture).to(DEVICE)
        text = prompt.replace(IMAGE_TOKEN, f"<img>{IMAGE_TOKEN * (256 * len(tiles))}</img>")
        ids = model_ids(tokenizer(text, add_special_tokens=False)["input_ids"])
        return int(model(input_ids=ids, pixel_values=tiles).logits[0, -1].argmax())

    def ours() -> int:
        attend("sdpa")
        tiles = processor(picture, do_rescale=False)["pixel_values"]
        run = [image_run(len(tiles), 256)]
        ids = model_ids(encode_prompt(tokenizer, prompt, run, own_id).input_ids)
        options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1, "disable_compile": True}
        return int(model.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=tiles, **options)[0, -1])

    if published() != ours():
        raise ValueError("The first tokens differ: nothing to time.")
    result = compare({"published": published, "ours": ours}, peer="published", rounds=arguments.rounds)
    report(
        "first_token",
        [{"case": arguments.size, "equal": True, **result}],
        rounds=arguments.rounds,
        dtype=str(model.dtype),
        layers=model.config.text_config.num_hidden_layers,
        blocks=model.config.vision_config.num_hidden_layers,
    )


if __name__ == "__main__":
    main()
