"""Does float16 overflow at the 8B's scale? The largest number of every kind in tower and language model.

    python -m benchmarks.half_range                    # 32 layers each, at full width; 3 GB of memory, minutes
    python -m benchmarks.half_range --massive 3000

Layers are drawn one after the other as they are initialised, so the memory is that of one. Random weights have no
outliers, and trained ones do: from the second layer on, Llama 3.1 8B keeps a few channels of the first token at some
hundreds (Sun et al., arXiv 2402.17762). `--massive` plants them by the mechanism of a trained model: one inner channel
of the MLP fires for the first token, and its column of `down_proj`, of 0.5, writes the number into the channel.

Every layer runs in float32, where the largest numbers are read, and in float16 from the same weights. Products are
summed in float32 on both. Prints one JSON line: the largest number of each kind, how many times it fits into float16,
and the relative error of float16 after the last layer.
"""

import argparse
import collections
import json
import sys

import torch
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.radio_model import RADIOBlock
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from tools import ROOT
from tools.random_checkpoint import STANDARD_DEVIATION

LARGEST = torch.finfo(torch.float16).max
MASSIVE_CHANNELS = (788, 1384, 4062)  # of Llama 3.1 8B
WEIGHT_OF_MASSIVE = 0.5


class Peaks:
    """The largest absolute number that comes out of each kind of module, and goes into its matmuls."""

    def __init__(self, block: nn.Module):
        self.largest: dict[str, float] = collections.defaultdict(float)
        for name, module in block.named_modules():
            module.register_forward_hook(self._note(name or "residual stream"))

    def _note(self, name: str):
        def hook(module: nn.Module, arguments: tuple, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for kind, found in ((name, tensors), (f"into {name}", arguments if isinstance(module, nn.Linear) else ())):
                for tensor in found:
                    if isinstance(tensor, torch.Tensor):
                        self.largest[kind] = max(self.largest[kind], float(tensor.abs().max()))

        return hook

    def factors(self) -> dict[str, dict[str, float]]:
        ordered = sorted(self.largest.items(), key=lambda item: -item[1])
        return {name: {"largest": round(peak, 2), "fits": round(LARGEST / peak, 1)} for name, peak in ordered if peak}


def draw(block: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(float(not name.endswith("bias")))
        else:
            parameter.normal_(std=STANDARD_DEVIATION, generator=generator)


def plant(block: LlamaDecoderLayer, first: torch.Tensor, positions: tuple, massive: float) -> None:
    """Have the MLP write `massive` into the residual stream of the first token, in each of the known channels."""
    attended = block.self_attn(block.input_layernorm(first), position_embeddings=positions, attention_mask=None)[0]
    normed = block.post_attention_layernorm(first + attended)
    direction = normed[0, 0] / normed[0, 0].square().sum()
    product = massive / WEIGHT_OF_MASSIVE
    for inner, channel in enumerate(MASSIVE_CHANNELS):
        for projection in (block.mlp.gate_proj, block.mlp.up_proj):
            projection.weight[inner] = direction * product**0.5  # silu(x) * x is nearly x * x
        block.mlp.down_proj.weight[channel, inner] = WEIGHT_OF_MASSIVE


def largest_score(block: LlamaDecoderLayer, states: torch.Tensor) -> float:
    """The largest product of a query and a key, before it is scaled."""
    attention = block.self_attn
    normed = block.input_layernorm(states)
    shape = (1, states.shape[1], -1, attention.head_dim)
    query, key = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return float((query @ key.transpose(2, 3)).abs().max())


@torch.no_grad()
def run_language_model(config: NemotronVLConfig, num_tokens: int, num_layers: int, massive: float) -> dict:
    text = config.text_config
    text._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(0)
    block = LlamaDecoderLayer(text, 0).eval()
    positions = torch.arange(num_tokens)[None]
    states = torch.empty(1, num_tokens, text.hidden_size).normal_(std=STANDARD_DEVIATION, generator=generator)
    halves = states.half()
    peaks, scores = Peaks(block), 0.0
    rotary = LlamaRotaryEmbedding(text)
    for number in range(num_layers):
        block.float()
        draw(block, generator)
        if massive and number == 1:
            plant(block, states[:, :1], rotary(states, positions[:, :1]), massive)
        embeddings = rotary(states, positions)
        scores = max(scores, largest_score(block, states))
        output = block(states, position_embeddings=embeddings)
        states = output[0] if isinstance(output, tuple) else output
        recorded = dict(peaks.largest)  # of float32 alone
        output = block.half()(halves, position_embeddings=tuple(part.half() for part in embeddings))
        halves = output[0] if isinstance(output, tuple) else output
        peaks.largest = collections.defaultdict(float, recorded)
        print(f"layer {number}: {float(states.abs().max()):.2f}", file=sys.stderr, flush=True)
    peaks.largest["a score before scaling"] = scores
    return {"float16_is_finite": bool(halves.isfinite().all()), "error": error_of(halves, states)} | peaks.factors()


@torch.no_grad()
def run_tower(config: NemotronVLConfig, num_layers: int, massive: float) -> dict:
    vision = config.vision_config
    vision._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(0)
    num_patches = (config.force_image_size // config.patch_size) ** 2
    block = RADIOBlock(vision).eval()
    states = torch.empty(1, num_patches, vision.hidden_size).normal_(generator=generator)
    halves = states.half()
    peaks = Peaks(block)
    for number in range(num_layers):
        block.float()
        draw(block, generator)
        if massive and number == 1:
            states[0, 0, 5], halves[0, 0, 5] = massive, massive
        states = block(states)
        recorded = dict(peaks.largest)
        halves = block.half()(halves)
        peaks.largest = collections.defaultdict(float, recorded)
    merged = config.vit_hidden_size * config.merge_size**2
    rows = states.reshape(-1, merged)
    projector = nn.Sequential(
        nn.LayerNorm(merged),
        nn.Linear(merged, config.projector_hidden_size),
        nn.GELU(),
        nn.Linear(config.projector_hidden_size, config.text_config.hidden_size),
    )
    draw(projector, generator)
    projected = Peaks(projector)
    projector(rows)
    found = {"float16_is_finite": bool(halves.isfinite().all()), "error": error_of(halves, states)} | peaks.factors()
    return found | {f"projector {name}": value for name, value in projected.factors().items()}


def error_of(halves: torch.Tensor, states: torch.Tensor) -> float:
    return round(float((halves.float() - states).norm() / states.norm()), 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--massive", type=float, default=300.0, help="number in a massive channel; 0 plants none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = NemotronVLConfig.from_pretrained(ROOT)
    found = {
        "massive": arguments.massive,
        "tower": run_tower(config, arguments.layers, arguments.massive),
        "language_model": run_language_model(config, arguments.tokens, arguments.layers, arguments.massive),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
