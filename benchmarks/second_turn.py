"""Time to the first token of a second question about the same image, by what the first turn kept.

    python -m benchmarks.second_turn                  # CPU: a part of the 8B, one tile; GPU: all of it, 13 tiles

"anew" keeps nothing, "features_kept" the image features, "keys_and_values_kept" the cache of the first turn.
"""

import copy

import torch

from benchmarks.common import (
    DEVICE,
    IMAGE_TOKEN_ID,
    ONE_TOKEN,
    compare,
    make_model,
    prompt_ids,
    read_options,
    report,
    require_equal,
)


@torch.no_grad()
def main() -> None:
    arguments = read_options(__doc__, tiles=(13, 1), rounds=(11, 5))
    model = make_model()
    tiles = torch.rand(arguments.tiles, 3, 512, 512, device=DEVICE)
    text = prompt_ids(50)
    image = torch.full((1, 256 * arguments.tiles), IMAGE_TOKEN_ID, device=DEVICE)
    first = torch.cat([text, image, text], dim=1)

    def ask(ids: torch.Tensor, **more: object) -> object:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **ONE_TOKEN, **more)

    features = {"image": model.get_image_features(tiles)}
    turn = ask(first, pixel_values=tiles, return_dict_in_generate=True)
    second = torch.cat([turn.sequences, text + 7], dim=1)
    # Every call gets a copy, because a cache grows; the copies are made before the time is taken.
    caches = [copy.deepcopy(turn.past_key_values) for _ in range(arguments.rounds + 2)]
    variants = {
        "anew": lambda: ask(second, pixel_values=tiles),
        "features_kept": lambda: ask(second, mm_encoder_outputs=features),
        "keys_and_values_kept": lambda: ask(second, past_key_values=caches.pop()),
    }
    require_equal([int(variant()[0, -1]) for variant in variants.values()])
    result = compare(variants, peer="anew", rounds=arguments.rounds)
    case = f"{arguments.tiles} tiles, 50 new tokens"
    report("second_turn", [{"case": case, "equal": True, **result}], model, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
