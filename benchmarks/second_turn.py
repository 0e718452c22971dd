"""A second question on the same picture, to its first token: all anew, with kept features, with kept keys and values.

python -m benchmarks.second_turn                  # CPU: a part of the 8B, one tile; GPU: all of it, 13 tiles
"""

import argparse
import copy

import torch

from benchmarks.common import DEVICE, IMAGE_TOKEN_ID, compare, make_model, prompt_ids, report


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=13 if DEVICE == "cuda" else 1)
    parser.add_argument("--rounds", type=int, default=11 if DEVICE == "cuda" else 5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    tiles = torch.rand(arguments.tiles, 3, 512, 512, device=DEVICE)
    text = prompt_ids(50)
    image = torch.full((1, 256 * arguments.tiles), IMAGE_TOKEN_ID, device=DEVICE)
    first = torch.cat([text, image, text], dim=1)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1, "disable_compile": True}

    def ask(ids: torch.Tensor, **more: object) -> object:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)

    features = {"image": model.get_image_features(tiles)}
    turn = ask(first, pixel_values=tiles, return_dict_in_generate=True)
    second = torch.cat([turn.sequences, text + 7], dim=1)
    # Every call gets a copy, because a cache grows; the copy is made outside of the time.
    caches = [copy.deepcopy(turn.past_key_values) for _ in range(arguments.rounds + 2)]
    variants = {
        "anew": lambda: ask(second, pixel_values=tiles),
        "features_kept": lambda: ask(second, mm_encoder_outputs=features),
        "keys_and_values_kept": lambda: ask(second, past_key_values=caches.pop()),
    }
    tokens = {int(variant()[0, -1]) for variant in variants.values()}
    if len(tokens) != 1:
        raise ValueError("The first tokens differ: nothing to time.")
    result = compare(variants, peer="anew", rounds=arguments.rounds)
    report(
        "second_turn",
        [{"case": f"{arguments.tiles} tiles, 50 new tokens", "equal": True, **result}],
        rounds=arguments.rounds,
        dtype=str(model.dtype),
        layers=model.config.text_config.num_hidden_layers,
        blocks=model.config.vision_config.num_hidden_layers,
    )


if __name__ == "__main__":
    main()
