"""Tower and projector: ours beside transformers' native RadioModel and the counted limit.

    python -m benchmarks.tower                    # CPU: 1 of 32 blocks at full width, 2 tiles; GPU: all, 13 tiles

The native model has no projector: it is given ours. The limit is a plain matmul of as many operations, timed in the
same rounds. On a GPU "eager" is our tower with plain attention, the HF default before sdpa.
"""

import torch
from torch import nn

from benchmarks.common import DEVICE, compare, make_model, matmul_limit, read_options, report

try:
    from transformers.models.radio import RadioConfig, RadioModel
except ImportError:  # transformers 4.57
    RadioModel = None


def count_flops(model: nn.Module, num_tiles: int) -> float:
    """Multiplications and additions of tower and projector for tiles of 512 px."""
    config = model.config.vision_config
    patches = (512 // config.patch_size) ** 2
    length = patches + config.num_prefix_tokens
    blocks = sum(
        weight.numel() for weight in model.vision_model.radio_model.model.blocks.parameters() if weight.ndim == 2
    )
    attention = 2 * config.num_hidden_layers * length * length * config.hidden_size
    projector = sum(weight.numel() for weight in model.mlp1.parameters() if weight.ndim == 2)
    tokens = patches // model.config.merge_size**2
    return 2.0 * num_tiles * (blocks * length + attention + projector * tokens)


def native_tower(model: nn.Module) -> nn.Module:
    """transformers' own C-RADIO of the same shape."""
    config = model.config.vision_config
    native = RadioConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        attn_implementation="sdpa",
    )
    return RadioModel(native).eval().to(DEVICE, model.dtype)


@torch.no_grad()
def main() -> None:
    arguments = read_options(__doc__, tiles=(13, 2), rounds=(21, 5))
    model = make_model({"num_hidden_layers": 1})
    tiles = torch.rand(arguments.tiles, 3, 512, 512, device=DEVICE).to(model.dtype)
    flops = count_flops(model, arguments.tiles)

    def run(attention: str) -> torch.Tensor:
        model.vision_model.set_attn_implementation(attention)
        return torch.cat(model.get_image_features(tiles).pooler_output)

    variants = {
        "ours": lambda: run("sdpa"),
        "ours_eager": lambda: run("eager"),
        "limit_matmul": matmul_limit(flops, model.dtype),
    }
    if RadioModel is not None:
        native = native_tower(model)
        side = 512 // model.config.patch_size

        def run_native() -> torch.Tensor:
            prefix = model.config.vision_config.num_prefix_tokens
            features = native(tiles).last_hidden_state[:, -side * side :]
            return model._project(model._merge_patches(features, side, side)) if prefix else features

        variants["native_radio_sdpa"] = run_native
    peer = "native_radio_sdpa" if RadioModel is not None else "ours_eager"
    result = compare(variants, peer=peer, rounds=arguments.rounds, limit="limit_matmul")
    case = {"case": f"{arguments.tiles} tiles", "tflop": round(flops / 1e12, 3)}
    report("tower", [{**case, **result}], model, rounds=arguments.rounds, peer=peer)


if __name__ == "__main__":
    main()
