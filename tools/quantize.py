"""Quantise the language model of a BF16 checkpoint; tower, projector and lm_head stay as they are.

    python -m tools.quantize DIR --format nvfp4 --calibration page1.png page2.png --out DIR-NVFP4
    python -m tools.quantize DIR --format fp8   --calibration *.png --out DIR-FP8
    python -m tools.quantize DIR --format awq   --calibration *.png --out DIR-AWQ

NVFP4 and FP8 are written as NVIDIA's modelopt 0.47 exports them, AWQ as AutoAWQ's GEMM. Calibration runs the images
through the model: NVFP4 and FP8 need the range of the activations for engines that quantise those too. NVFP4 also
chooses by them the scale of every block of weights; the rest is byte for byte what modelopt writes. AWQ chooses by them
how to spread a layer's error over its inputs, and where to cut off the largest weights of a group. The result loads
with the same `from_pretrained`, and in vLLM with `--quantization modelopt_fp4`, `modelopt` or `awq`.

llm-compressor has an AWQ of its own, but is tied to transformers 5.15-5.17 and writes another layout (version 0.14).
"""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from nemotron_vl.checkpoint import SAFETENSORS_DTYPES, TensorHeader
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig, NemotronVLV2Config
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor, NemotronVLV2Processor
from nemotron_vl.quantization_nemotron_vl import (
    AWQ_SHIFTS,
    E2M1_VALUES,
    FORMATS,
    NVFP4_BLOCK,
    PackedConfig,
    PackedLinear,
    packed_linears,
)
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

from .command_line import command_parser, progress, usable_device
from .weights import model_class

PROCESSORS = {NemotronVLConfig.model_type: NemotronVLProcessor, NemotronVLV2Config.model_type: NemotronVLV2Processor}
FORMAT_NAMES = {"nvfp4": "NVFP4", "fp8": "FP8", "awq": "AWQ GEMM"}
MODELOPT_VERSION = "0.47.0"
E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-9
E2M1_MAX = 6.0
DEFAULT_PROMPT = "Read all the text in this picture."

# Layers of a block that take the same input, and what that input comes out of. Engines run a group as one layer, so it
# shares its scales; AWQ moves magnitude between a group and its source, where there is one that scales linearly.
LLAMA_GROUPS = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), "self_attn.v_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), "mlp.up_proj"),
)
# A block is attention, Mamba or MLP.
NEMOTRON_H_GROUPS = (
    (("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), "norm"),
    (("mixer.o_proj",), "mixer.v_proj"),
    (("mixer.in_proj",), "norm"),
    (("mixer.out_proj",), "mixer.norm"),
    (("mixer.up_proj",), "norm"),
    (("mixer.down_proj",), None),  # behind a squared ReLU
)
# The scales of a block that are tried, as distances in E4M3 numbers from the one that makes the largest weight 6.
NVFP4_SCALE_STEPS = range(7)
AWQ_STEPS = 20
AWQ_CLIP_STEPS = 10
AWQ_UNCLIPPED = ()
NUM_SAMPLE_ROWS = 512


# --- encoders: weight -> the tensors a checkpoint stores ---


def encode_nvfp4(
    weight: torch.Tensor, amax: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Encode as modelopt's `NVFP4QTensor.quantize` does, with better scales of the blocks if inputs are given.

    Args:
        weight: `(out_features, in_features)`, the latter a multiple of 16.
        amax: largest magnitude of the layers that share a global scale; by default of this one.
        rows: inputs of the layer, `(num_rows, in_features)`, for `choose_block_scales`.
    """
    amax = weight.abs().amax() if amax is None else amax
    global_scale = _one_if_zero(amax.float() / (E2M1_MAX * E4M3_MAX))
    blocks = weight.unflatten(-1, (-1, NVFP4_BLOCK))
    block_scale = _one_if_zero(blocks.abs().amax(-1).float() / (E2M1_MAX * global_scale))
    block_scale = block_scale.clamp(E4M3_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn)
    if rows is not None:
        block_scale = choose_block_scales(blocks, block_scale, global_scale, rows)
    scaled = (blocks / (block_scale.float() * global_scale).unsqueeze(-1)).flatten(-2)
    codes = encode_e2m1(scaled)
    packed = codes[..., 1::2] << 4 | codes[..., 0::2]
    return {"weight": packed, "weight_scale": block_scale, "weight_scale_2": global_scale}


@torch.no_grad()
def choose_block_scales(
    blocks: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Find the scale of each block that, once its weights are rounded, gives the least error of its part of the outputs.

    E2M1 numbers are 2 apart near 6 and 0.5 apart near 0, so a larger scale, with which the largest weight is less than
    6, may round the others better.

    Args:
        blocks: of the weight, `(out_features, num_blocks, 16)`.
        scales: those that make the largest weight of a block 6, `(out_features, num_blocks)`, float8_e4m3fn.
        global_scale: what every scale is multiplied by.
        rows: inputs of the layer, `(num_rows, 16 * num_blocks)`.

    Returns:
        scales as they came, but the best of `NVFP4_SCALE_STEPS` for each block.
    """
    blocks = blocks.float().transpose(0, 1)  # (num_blocks, out_features, 16)
    inputs = rows.float().unflatten(1, (-1, NVFP4_BLOCK)).permute(1, 2, 0)  # (num_blocks, 16, num_rows)
    products = inputs @ inputs.transpose(1, 2)  # the error of an output is a quadratic form in those of its weights
    first = scales.t().contiguous().view(torch.uint8)
    largest = torch.tensor(E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    best, best_error = first, torch.full(first.shape, float("inf"), device=first.device)
    for step in NVFP4_SCALE_STEPS:
        candidate = (first + step).clamp(max=int(largest))  # positive E4M3 numbers have the order of their bytes
        factors = (candidate.view(torch.float8_e4m3fn).float() * global_scale).unsqueeze(-1)
        difference = round_to_e2m1(blocks / factors) * factors - blocks
        error = ((difference @ products) * difference).sum(-1)
        best = torch.where(error < best_error, candidate, best)
        best_error = torch.minimum(error, best_error)
    return best.t().contiguous().view(torch.float8_e4m3fn)


def _one_if_zero(scale: torch.Tensor) -> torch.Tensor:
    """Scales of nothing but zeros may be anything but zero, which would divide them into NaN."""
    return scale.masked_fill(scale == 0, 1.0)


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E2M1 number, ties to the even code; values outside -6..6 saturate. Returns codes 0..15."""
    magnitudes = torch.tensor(E2M1_VALUES, device=values.device)
    bounds = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.searchsorted(bounds, values.abs()).to(torch.uint8)  # a tie goes to the lower code
    tie_upwards = torch.isin(values.abs(), bounds[1::2])
    return (values < 0).to(torch.uint8) << 3 | codes + tie_upwards.to(torch.uint8)


def round_to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Return the numbers that the codes of `encode_e2m1` mean, faster than through the codes."""
    magnitudes = values.abs()
    spacing = 0.5 * (1 + (magnitudes >= 2) + 2 * (magnitudes >= 4))
    return (torch.round(magnitudes / spacing) * spacing).clamp(max=E2M1_MAX).copysign(values)


def encode_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encode as modelopt does: divided in the dtype of the weight by a 0-dimensional float32 scale."""
    scale = _one_if_zero(weight.abs().amax().float() / E4M3_MAX)
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def encode_awq_gemm(weight: torch.Tensor, group_size: int = 128) -> dict[str, torch.Tensor]:
    """Encode as AutoAWQ's GEMM: four bits with a zero point per group of inputs.

    Args:
        weight: `(out_features, in_features)`, multiples of 8 and of `group_size`.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    scales, zeros = _awq_grid(groups)
    codes = _awq_codes(groups, scales, zeros).flatten(1)
    return {
        "qweight": pack_awq(codes.t()),
        "qzeros": pack_awq(zeros.squeeze(-1).t()),
        "scales": scales.squeeze(-1).t().to(torch.float16).contiguous(),
    }


def _awq_grid(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (as float16 stores it) and zero point of every group: `(..., 1)` for `(..., group_size)`."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = ((high - low).clamp(min=1e-5) / 15).half().float()
    return scales, (-torch.round(low / scales)).clamp(0, 15)


def _awq_codes(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    return (torch.round(groups / scales) + zeros).clamp(0, 15)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """`(rows, columns)` of 0..15 -> `(rows, columns / 8)` int32."""
    columns = codes.to(torch.int32).unflatten(-1, (-1, len(AWQ_SHIFTS)))
    words = torch.zeros(columns.shape[:-1], dtype=torch.int32, device=codes.device)
    for column, shift in enumerate(AWQ_SHIFTS):
        words |= columns[..., column] << shift
    return words


# --- calibration ---


@dataclass
class InputStatistics:
    """What calibration saw at the input of a layer.

    Args:
        amax: largest magnitude.
        mean: mean magnitude per channel, `(in_features,)`.
        rows: some of the inputs, `(num_rows, in_features)`.
    """

    amax: torch.Tensor
    mean: torch.Tensor
    rows: torch.Tensor
    num_tokens: int = 0

    def add(self, inputs: torch.Tensor) -> None:
        inputs = inputs.detach().flatten(0, -2)
        magnitudes = inputs.abs().float()
        self.amax = torch.maximum(self.amax, magnitudes.amax())
        total = self.num_tokens + len(inputs)
        self.mean = self.mean + (magnitudes.mean(0) - self.mean) * (len(inputs) / total)
        self.num_tokens = total
        step = max(1, len(inputs) * 4 // NUM_SAMPLE_ROWS)  # an image fills a quarter of the sample
        self.rows = torch.cat((self.rows, inputs[::step]))[-NUM_SAMPLE_ROWS:]


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks of the language model and their names."""
    names = {module: name for name, module in model.named_modules()}
    return [(names[block], block) for block in model.get_decoder().layers]


def groups_of(block: nn.Module, keep: Iterable[str] = ()) -> list[tuple[tuple[str, ...], str | None]]:
    """The groups of layers that a block has and that are not to keep, see `LLAMA_GROUPS`."""
    layers = {name for name, _ in block.named_modules() if name.rsplit(".", 1)[-1] not in keep}
    return [(names, source) for names, source in (*LLAMA_GROUPS, *NEMOTRON_H_GROUPS) if layers.issuperset(names)]


def linears_of(block: nn.Module, keep: Iterable[str] = ()) -> Iterable[tuple[str, nn.Linear]]:
    return [(name, block.get_submodule(name)) for names, _ in groups_of(block, keep) for name in names]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, InputStatistics]:
    """Run batches through the model and record the inputs of every layer that will be quantised, by its name."""
    statistics: dict[str, InputStatistics] = {}
    handles = []

    def record(name: str, layer: nn.Linear) -> Any:
        empty = torch.zeros(layer.in_features, device=layer.weight.device)
        rows = layer.weight.new_empty(0, layer.in_features)
        statistics[name] = InputStatistics(torch.zeros((), device=layer.weight.device), empty, rows)
        return lambda _, inputs: statistics[name].add(inputs[0])

    for block_name, block in blocks_of(model):
        for name, layer in linears_of(block):
            handles.append(layer.register_forward_pre_hook(record(f"{block_name}.{name}", layer)))
    try:
        for batch in batches:
            model(**batch, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def image_batches(
    processor: NemotronVLProcessor, files: list[Path], prompt: str, device: torch.device
) -> Iterable[dict[str, torch.Tensor]]:
    """One batch of model inputs per image."""
    for file in files:
        content = [{"type": "image", "image": file}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        yield inputs.to(device)


# --- AWQ: which inputs of a layer are worth the precision ---


def _round_trip(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = weight.float().unflatten(1, (-1, group_size))
    scales, zeros = _awq_grid(groups)
    return ((_awq_codes(groups, scales, zeros) - zeros) * scales).flatten(1)


@torch.no_grad()
def awq_input_scales(layers: list[nn.Linear], statistics: InputStatistics, group_size: int) -> torch.Tensor:
    """Find the factors of the inputs, `mean magnitude ** ratio`, with the least error of the group's outputs.

    From "AWQ: Activation-aware Weight Quantization" (Lin et al., 2023), section 3.2.

    Returns:
        `(in_features,)` float32; ones if no ratio is better than leaving the inputs alone.
    """
    rows = statistics.rows.float()
    best_error, best = float("inf"), torch.ones_like(statistics.mean)
    for step in range(AWQ_STEPS):
        factors = statistics.mean.clamp(min=1e-4) ** (step / AWQ_STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = 0.0
        for layer in layers:
            weight = layer.weight.float()
            difference = _round_trip(weight * factors, group_size) / factors - weight
            error += float(nn.functional.linear(rows, difference).square().sum())
        if error < best_error:
            best_error, best = error, factors
    return best


@torch.no_grad()
def scale_for_awq(
    model: nn.Module, statistics: dict[str, InputStatistics], group_size: int, keep: Iterable[str] = ()
) -> dict[str, InputStatistics]:
    """Move magnitude between layers so that AWQ's rounding hurts least; the model computes the same as before.

    Returns:
        the statistics of the scaled model, as far as `clip_for_awq` needs them.
    """
    statistics = dict(statistics)
    for block_name, block in progress(blocks_of(model), desc="Scaling", unit="block"):
        for names, source_name in groups_of(block, keep):
            if source_name is None:
                continue
            source = block.get_submodule(source_name)
            layers = [block.get_submodule(name) for name in names]
            if len(source.weight) != layers[0].in_features:
                continue  # grouped-query attention: several heads of o_proj share one of v_proj
            group_statistics = statistics[f"{block_name}.{names[0]}"]
            factors = awq_input_scales(layers, group_statistics, group_size)
            for name, layer in zip(names, layers, strict=True):
                layer.weight.copy_(layer.weight * factors)
                scaled = statistics[f"{block_name}.{name}"]
                statistics[f"{block_name}.{name}"] = replace(scaled, rows=scaled.rows / factors)
            shape = (-1, 1) if source.weight.dim() == 2 else (-1,)
            source.weight.copy_(source.weight / factors.reshape(shape))
            if getattr(source, "bias", None) is not None:
                source.bias.copy_(source.bias / factors)
    return statistics


@torch.no_grad()
def clip_for_awq(weight: torch.Tensor, rows: torch.Tensor, group_size: int) -> torch.Tensor:
    """Limit each group of weights to the range that, once rounded, gives the least error of its part of the outputs.

    A smaller range makes finer steps and cuts off the largest weights. As in llm-awq and AutoAWQ the range shrinks by at
    most half.

    Args:
        weight: `(out_features, in_features)`.
        rows: inputs of the layer, `(num_rows, in_features)`.
        group_size: inputs that share a scale.

    Returns:
        the weight, every group limited to its range.
    """
    groups = weight.float().unflatten(1, (-1, group_size)).transpose(0, 1)  # (num_groups, out_features, group_size)
    inputs = rows.float().unflatten(1, (-1, group_size)).permute(1, 2, 0)  # (num_groups, group_size, num_rows)
    products = inputs @ inputs.transpose(1, 2)  # the error of an output is a quadratic form in those of its weights
    low, high = groups.aminmax(dim=-1, keepdim=True)
    best, best_error = groups, torch.full_like(low, float("inf"))
    for step in range(AWQ_CLIP_STEPS):
        shrunk = 1 - step / (2 * AWQ_CLIP_STEPS)
        clipped = groups.clamp(low * shrunk, high * shrunk)
        scales, zeros = _awq_grid(clipped)
        difference = (_awq_codes(clipped, scales, zeros) - zeros) * scales - groups
        error = ((difference @ products) * difference).sum(-1, keepdim=True)
        best = torch.where(error < best_error, clipped, best)
        best_error = torch.minimum(error, best_error)
    return best.transpose(0, 1).flatten(1).to(weight.dtype)


# --- the model ---


@dataclass
class Report:
    """How far each layer is from the original: |quantised - original| / |original|, Frobenius norms."""

    errors: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.errors.values()) / len(self.errors)

    @property
    def worst(self) -> str:
        return max(self.errors, key=self.errors.get)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    format_name: str,
    statistics: dict[str, InputStatistics] | None = None,
    group_size: int = 128,
    keep: Iterable[str] = (),
) -> Report:
    """Replace the Linear layers of the decoder blocks by packed ones, in place.

    Args:
        model: a model of the family in full precision.
        format_name: "nvfp4", "fp8" or "awq".
        statistics: of `calibrate`; without them there is no `input_scale`, and NVFP4 and AWQ are plain rounding.
        group_size: inputs that share a scale, AWQ only.
        keep: layers to leave alone, by the last part of their names; with one of them its whole group.

    Raises:
        ValueError: if the model is quantised already, or a layer does not divide into groups.
    """
    if next(packed_linears(model), None) is not None:
        raise ValueError("The model is quantised already; start from the BF16 checkpoint.")
    keep = frozenset(keep)
    _check_divisible(model, format_name, group_size, keep)
    if format_name == "awq" and statistics:
        statistics = scale_for_awq(model, statistics, group_size, keep)
    report = Report()
    for block_name, block in progress(blocks_of(model), desc="Quantising", unit="block"):
        for names, _ in groups_of(block, keep):
            amax = torch.stack([block.get_submodule(name).weight.abs().amax() for name in names]).amax()
            for name in names:
                layer = block.get_submodule(name)
                weight = layer.weight
                rows = statistics[f"{block_name}.{name}"].rows if statistics else None
                if statistics and format_name == "awq" and name not in AWQ_UNCLIPPED:
                    weight = clip_for_awq(weight, rows, group_size)
                tensors = encode(weight, format_name, amax, group_size, rows)
                if statistics and format_name != "awq":
                    # The group has one input, hence one scale.
                    divisor = E4M3_MAX * (E2M1_MAX if format_name == "nvfp4" else 1)
                    tensors["input_scale"] = statistics[f"{block_name}.{name}"].amax.float() / divisor
                packed = make_packed_linear(layer, FORMAT_NAMES[format_name], tensors)
                original = layer.weight.float()
                difference = packed.dequantized_weight(torch.float32) - original
                report.errors[f"{block_name}.{name}"] = float(difference.norm() / _one_if_zero(original.norm()))
                parent, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(parent), attribute, packed)
    kept = [f"*.{name}" for name in sorted(keep)]
    model.config.quantization_config = PackedConfig(stored=quantization_config(format_name, group_size, kept))
    return report


def _check_divisible(model: nn.Module, format_name: str, group_size: int, keep: Iterable[str]) -> None:
    divisors = {"nvfp4": (NVFP4_BLOCK, 1), "fp8": (1, 1), "awq": (group_size, 8)}[format_name]
    for block_name, block in blocks_of(model):
        for name, layer in linears_of(block, keep):
            if layer.in_features % divisors[0] or layer.out_features % divisors[1]:
                raise ValueError(
                    f"{block_name}.{name} has {layer.in_features} inputs and {layer.out_features} outputs; {format_name} "
                    f"needs multiples of {divisors[0]} and {divisors[1]}. For AWQ choose another --group-size."
                )


def encode(
    weight: torch.Tensor, format_name: str, amax: torch.Tensor, group_size: int, rows: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    if format_name == "nvfp4":
        return encode_nvfp4(weight, amax, rows)
    return encode_fp8(weight) if format_name == "fp8" else encode_awq_gemm(weight, group_size)


def make_packed_linear(linear: nn.Linear, format_name: str, tensors: dict[str, torch.Tensor]) -> PackedLinear:
    """Build a packed layer around encoded tensors."""
    headers = {
        key: TensorHeader(SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), "") for key, tensor in tensors.items()
    }
    packed = PackedLinear(linear, FORMATS[format_name], headers)
    for key, tensor in tensors.items():
        setattr(packed, key, nn.Parameter(tensor.contiguous(), requires_grad=False))
    return packed


def quantization_config(format_name: str, group_size: int, kept: Iterable[str] = ()) -> dict[str, Any]:
    """Return the block for config.json in the words of the tool whose layout it is."""
    if format_name == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["vision_model", "mlp1", "lm_head", *(name[2:] for name in kept)],
        }
    blocks = {"group_size": NVFP4_BLOCK} if format_name == "nvfp4" else {}
    tensors = {"dynamic": False, "num_bits": 4 if format_name == "nvfp4" else 8, "type": "float", **blocks}
    return {
        "config_groups": {"group_0": {"input_activations": tensors, "weights": tensors, "targets": ["Linear"]}},
        "ignore": ["language_model.lm_head", "vision_model*", "mlp1*", *kept],
        "quant_algo": FORMAT_NAMES[format_name],
        "producer": {"name": "modelopt", "version": MODELOPT_VERSION},
        "quant_method": "modelopt",
    }


def hf_quant_config(block: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `hf_quant_config.json`, where TensorRT-LLM and older engines look."""
    weights = block["config_groups"]["group_0"]["weights"]
    return {
        "producer": block["producer"],
        "quantization": {
            "quant_algo": block["quant_algo"],
            "kv_cache_quant_algo": None,
            **({"group_size": weights["group_size"]} if "group_size" in weights else {}),
            "exclude_modules": block["ignore"],
        },
    }


def save(model: nn.Module, source: Path, folder: Path) -> None:
    """Write the packed model, the code of its processor, and the files of `source` that do not depend on the weights."""
    model.save_pretrained(folder)
    custom_object_save(PROCESSORS[model.config.model_type], folder)  # a subfolder such as nano/ has no code beside it
    block = model.config.quantization_config.to_dict()
    if block["quant_method"] == "modelopt":
        content = json.dumps(hf_quant_config(block), indent=2)
        (folder / "hf_quant_config.json").write_text(content + "\n", encoding="utf-8")
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt") or file.name.endswith(".index.json")
        if file.is_file() and not weights and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def folder_size(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("quantize", __doc__)
    parser.add_argument("source", type=Path, metavar="DIR", help="the BF16 checkpoint")
    parser.add_argument("--format", choices=sorted(FORMAT_NAMES), required=True)
    parser.add_argument(
        "--calibration", type=Path, nargs="+", required=True, metavar="FILE", help="images of documents; 16 or more"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="question about each image: %(default)s")
    parser.add_argument("--group-size", type=int, default=128, help="AWQ: inputs per scale (default %(default)s)")
    parser.add_argument(
        "--keep", nargs="+", default=[], metavar="LAYER", help="leave these alone: in_proj out_proj ..."
    )
    parser.add_argument("--device", type=usable_device, default="cpu", help="where to compute (default %(default)s)")
    options = parser.parse_args(argv)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty; name a new folder.")
    model = model_class(options.source).from_pretrained(options.source, torch_dtype="auto", device_map=options.device)
    processor = PROCESSORS[model.config.model_type].from_pretrained(options.source)
    batches = image_batches(processor, options.calibration, options.prompt, torch.device(options.device))
    statistics = calibrate(model, progress(batches, total=len(options.calibration), desc="Calibrating"))
    report = quantize_model(model, options.format, statistics, options.group_size, options.keep)
    save(model, options.source, options.out)
    before, after = folder_size(options.source), folder_size(options.out)
    for name, error in report.errors.items():
        print(f"{name}  {error:.4f}")
    print(f"{options.out}: {after / 2**20:.1f} MiB after {before / 2**20:.1f} MiB; worst layer {report.worst}.")
    summary = {
        "format": options.format,
        "bytes_before": before,
        "bytes_after": after,
        "num_layers": len(report.errors),
        "mean_relative_error": round(report.mean, 5),
        "worst_relative_error": round(report.errors[report.worst], 5),
        "num_images": len(options.calibration),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
