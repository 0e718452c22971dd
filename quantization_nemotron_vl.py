"""Loads quantised checkpoints in plain torch: NVFP4, FP8 and W4A16_AWQ of modelopt, and GEMM of AutoAWQ.

The headers of the safetensors files tell the format of each nn.Linear. The layer becomes a `PackedLinear`, whose
parameters are the stored tensors under their stored names. Every call dequantises the weight again; where
`packed_matmul` (CUDA) or `cpu_matmul` can multiply, this happens in registers. `from_pretrained(..., dequantize=True)`
dequantises all weights once.

Only the tensors of a module tell its format, because the exclude lists that exporters write are often wrong. An
incomplete or unknown format is an error. Only weights are quantised here: `input_scale` (for activations) and
`k_scale` and `v_scale` (for the KV cache) are kept and saved again, but not used.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import is_accelerate_available, logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import TORCH_DTYPES, Checkpoint, TensorHeader
from .cpu_matmul import has_product, multiply_on_cpu, runs_on_cpu, unpack_on_cpu
from .packed_matmul import has_kernel, multiply_packed
from .torch_int4 import can_convert, convert, has_int4_product, multiply_int4, restore, unpack_int4

if is_accelerate_available():
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module
    from accelerate.utils import get_balanced_memory

logger = logging.get_logger(__name__)

# The name under which transformers finds this quantiser. It is none of the published names, because transformers has a
# quantiser "awq" of its own and may get a "modelopt".
QUANT_METHOD = "nemotron_vl_packed"
STORED_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed", "awq", QUANT_METHOD)
# The modules that bitsandbytes, torchao and the like do not quantise unless the caller decides otherwise.
KEPT_MODULES = ("vision_model", "mlp1", "lm_head", "language_model.lm_head")  # transformers 4.57 wants full names

FLOATS = ("F32", "F16", "BF16")
PLAIN_DTYPES = (*FLOATS, "F64", "I64", "BOOL")
# Names that only quantised checkpoints use, besides `weight` itself.
QUANTIZED_TENSOR_SUFFIXES = (
    *("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale"),  # modelopt
    *("qweight", "qzeros", "scales", "scaled_zeros", "g_idx"),  # AutoAWQ, llm-awq, GPTQ
    *("weight_packed", "weight_global_scale", "weight_zero_point", "weight_shape", "input_global_scale"),
    "weight_scale_inv",  # compressed-tensors above, block-wise FP8 here
)
KV_CACHE_SCALES = ("k_scale", "v_scale")

NVFP4_BLOCK = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# AutoAWQ GEMM stores column 8c + i of an int32 word c in the nibble that starts at bit AWQ_SHIFTS[i].
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


# --- formats: what is stored for a Linear of `out_features` x `in_features`, and what weight it means ---


@lru_cache(maxsize=8)
def _e2m1_pairs(device: torch.device) -> torch.Tensor:
    """For each byte, the float32 values of its low and high nibble in one int64, `(256,)`. One gather reads both."""
    with torch.inference_mode(False):
        magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)
        values = torch.cat((magnitudes, -magnitudes))
        byte = torch.arange(256, device=device)
        return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).view(torch.int64).flatten()


def _scale_inputs(weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Multiply the columns by `pre_quant_scale`; modelopt's AWQ multiplies the input by it, which is the same."""
    return weight * tensors["pre_quant_scale"].float() if "pre_quant_scale" in tensors else weight


def decode_nvfp4(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Compute e2m1(code) x (block scale x global scale) in float32, the scales' product first, and cast at the end."""
    packed, block_scales = tensors["weight"], tensors["weight_scale"]
    codes = torch.index_select(_e2m1_pairs(packed.device), 0, packed.flatten().int()).view(torch.float32)
    scales = block_scales.float() * tensors["weight_scale_2"].float()
    weight = codes.view(*block_scales.shape, NVFP4_BLOCK).mul_(scales.unsqueeze(-1))
    return _scale_inputs(weight.flatten(-2), tensors).to(dtype)


def decode_fp8(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Compute float32(weight) x scale and cast once, by a table of the 256 results: CPUs convert float8 slowly."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    byte = torch.arange(256, dtype=torch.uint8, device=weight.device)
    values = (byte.view(torch.float8_e4m3fn).float() * scale.float()).to(dtype)
    return torch.index_select(values, 0, weight.view(torch.uint8).flatten().int()).view(weight.shape)


def decode_w4a16_awq(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Compute signed int4 x group scale. The low nibbles are the even rows."""
    packed, scales = tensors["weight"], tensors["weight_scale"]
    nibbles = torch.stack((packed & 15, packed >> 4), dim=1).flatten(0, 1)  # (out_features, in_features)
    codes = (nibbles ^ 8).to(torch.float32) - 8
    weight = (codes.unflatten(1, (scales.shape[1], -1)) * scales.float().unsqueeze(-1)).flatten(1)
    return _scale_inputs(weight, tensors).to(dtype)


def _unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Unpack `(rows, columns / 8)` int32 to `(rows, columns)` uint8 in 0..15."""
    return torch.stack([((words >> shift) & 15).to(torch.uint8) for shift in AWQ_SHIFTS], dim=-1).flatten(-2)


def decode_awq_gemm(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Compute (code - zero) x scale per group of inputs in float32, and cast once. Zeros have no offset of 1."""
    scales = tensors["scales"].float()
    codes = _unpack_awq(tensors["qweight"]).unflatten(0, (scales.shape[0], -1))
    zeros = _unpack_awq(tensors["qzeros"]).float()
    weight = (codes - zeros.unsqueeze(1)).mul_(scales.unsqueeze(1))
    return weight.flatten(0, 1).t().to(dtype)  # stored (in_features, out_features)


class Format(NamedTuple):
    """A way to store the weight of a Linear.

    Args:
        name: as in modelopt's `quant_algo`, or AutoAWQ's name.
        layout: (out_features, in_features, number of groups) -> {tensor: (dtypes, shape)}; a shape () also takes [1].
        optional: as `layout`, tensors that may be absent.
        grouped: the tensor and the dimension that tell the number of groups, None for formats without.
        outputs_dim: dimension of the stored matrices that runs over the outputs.
        decode: (stored tensors, dtype) -> `(out_features, in_features)`.
    """

    name: str
    layout: Callable[[int, int, int], dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]
    optional: Callable[[int], dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]
    grouped: tuple[str, int] | None
    outputs_dim: int
    decode: Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]


SCALAR = (("F32",), ())
# Weights dequantised at a time on a CPU. Larger chunks do not fit its caches and page-fault in every call.
CPU_CHUNK_WEIGHTS = 2**22

FORMATS = {
    "NVFP4": Format(
        "NVFP4",
        lambda rows, columns, groups: {
            "weight": (("U8",), (rows, columns // 2)),
            "weight_scale": (("F8_E4M3",), (rows, columns // NVFP4_BLOCK)),
            "weight_scale_2": SCALAR,
        },
        lambda columns: {"input_scale": SCALAR, "pre_quant_scale": (FLOATS, (columns,))},
        None,
        0,
        decode_nvfp4,
    ),
    "FP8": Format(
        "FP8",
        lambda rows, columns, groups: {"weight": (("F8_E4M3",), (rows, columns)), "weight_scale": SCALAR},
        lambda columns: {"input_scale": SCALAR},
        None,
        0,
        decode_fp8,
    ),
    "W4A16_AWQ": Format(
        "W4A16_AWQ",
        lambda rows, columns, groups: {
            "weight": (("U8",), (rows // 2, columns)),
            "weight_scale": (("F32",), (rows, groups)),
        },
        lambda columns: {"input_scale": SCALAR, "pre_quant_scale": (FLOATS, (columns,))},
        ("weight_scale", 1),
        0,
        decode_w4a16_awq,
    ),
    "AWQ GEMM": Format(
        "AWQ GEMM",
        lambda rows, columns, groups: {
            "qweight": (("I32",), (columns, rows // 8)),
            "qzeros": (("I32",), (groups, rows // 8)),
            "scales": (FLOATS, (groups, rows)),
        },
        lambda columns: {},
        ("scales", 0),
        1,
        decode_awq_gemm,
    ),
}


def is_quantised(name: str, header: TensorHeader) -> bool:
    """Say whether a tensor of a checkpoint belongs to a quantised module, by name or dtype."""
    return name.rsplit(".", 1)[-1] in QUANTIZED_TENSOR_SUFFIXES or header.dtype not in PLAIN_DTYPES


def detect_format(name: str, linear: nn.Module, tensors: Mapping[str, TensorHeader]) -> Format | None:
    """Find out how the weight of a module is stored.

    Args:
        name: the module, for the messages.
        linear: the module of the architecture, which knows `in_features` and `out_features`.
        tensors: the stored tensors of the module by the last part of their names.

    Returns:
        the format, None for a plain weight.

    Raises:
        ValueError: if the tensors are unknown, incomplete or of a wrong shape. The message has key, dtype and shape.
    """
    main = next((key for key in ("qweight", "weight_packed", "weight") if key in tensors), None)
    if main is None:
        _raise_unknown(name, tensors, "scales without a weight")
    quantised = {key: header for key, header in tensors.items() if is_quantised(key, header)}
    if not quantised or all(key in KV_CACHE_SCALES for key in quantised):
        return None
    if not isinstance(linear, nn.Linear):
        _raise_unknown(name, quantised, f"only Linear layers can be quantised, this is a {type(linear).__name__}")
    rows, columns = linear.out_features, linear.in_features
    dtype, shape = tensors[main].dtype, tensors[main].shape
    if main == "weight" and dtype == "F8_E4M3":
        found = "FP8"
    elif main == "weight" and dtype == "U8":
        found = "W4A16_AWQ" if shape == (rows // 2, columns) and "weight_scale_2" not in tensors else "NVFP4"
    elif main == "qweight" and dtype == "I32" and "g_idx" not in tensors:
        found = "AWQ GEMM"
    else:
        _raise_unknown(name, quantised, _guess_layout(tensors))
    _check_layout(name, FORMATS[found], rows, columns, tensors)
    return FORMATS[found]


def _guess_layout(tensors: Mapping[str, TensorHeader]) -> str:
    """Return the name of an unsupported layout, if the tensors show which one it is."""
    if "weight_packed" in tensors:
        return "the layout of compressed-tensors, which transformers loads when config.json says so"
    if "g_idx" in tensors:
        return "the layout of GPTQ"
    if "qweight" in tensors and tensors["qweight"].dtype == "I16":
        return "the layout of llm-awq v2 and of AutoAWQ's GEMV_FAST"
    return "a layout that is not known here"


def _check_layout(name: str, found: Format, rows: int, columns: int, tensors: Mapping[str, TensorHeader]) -> None:
    """Raise unless exactly the tensors of the format are there, with its dtypes and shapes."""
    groups = 1
    if found.grouped and found.grouped[0] in tensors:
        key, dim = found.grouped
        groups = tensors[key].shape[dim] if len(tensors[key].shape) == 2 else 0
        if not groups or columns % groups:
            raise ValueError(
                f"{name}.{key} is {tensors[key]}: its groups do not divide the {columns} inputs of the layer."
            )
    required, optional = found.layout(rows, columns, groups), found.optional(columns)
    missing = [key for key in required if key not in tensors]
    if missing:
        _raise_unknown(name, tensors, f"{found.name} without {', '.join(missing)}")
    for key, header in tensors.items():
        if key == "bias" or (key in KV_CACHE_SCALES and header.dtype == "F32" and math.prod(header.shape) == 1):
            continue
        if key not in required and key not in optional:
            _raise_unknown(name, tensors, f"{key} does not belong to {found.name}")
        dtypes, shape = required.get(key) or optional[key]
        shapes = (shape, (1,)) if shape == () else (shape,)
        if header.dtype not in dtypes or header.shape not in shapes:
            raise ValueError(
                f"{name}.{key} is {header}, but {found.name} stores {' or '.join(dtypes)} {list(shape)} for a layer of "
                f"{rows} x {columns}. The file is damaged, has another layout (AutoAWQ's GEMV, for one), or config.json "
                "belongs to another checkpoint."
            )
    if (found.name == "NVFP4" and columns % NVFP4_BLOCK) or (found.name == "AWQ GEMM" and rows % 8):
        _raise_unknown(name, tensors, f"{found.name} cannot hold a layer of {rows} x {columns}")


def _raise_unknown(name: str, tensors: Mapping[str, TensorHeader], reason: str) -> None:
    found = ", ".join(f"{name}.{key} {header}" for key, header in sorted(tensors.items()))
    raise ValueError(
        f"{name} is not stored in a way that can be loaded: {reason}. Found {found}. Known are modelopt's NVFP4, FP8 and "
        "W4A16_AWQ and AutoAWQ's GEMM; write one of them with `python -m tools.quantize` from the BF16 checkpoint."
    )


# --- the layer ---


def decode(
    stored: Format,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    num_outputs: int,
    span: range | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the weight that the stored tensors mean.

    Args:
        stored: the format.
        tensors: the stored tensors of the layer.
        dtype: of the result.
        num_outputs: of the layer.
        span: the outputs whose weights are wanted, all by default.
        out: an earlier result of the same shape and dtype that may be overwritten.

    Returns:
        `(len(span), in_features)`.
    """
    span = span or range(num_outputs)
    weight = unpack_on_cpu(stored.name, tensors, dtype, span, out)
    if weight is not None:
        return weight
    if len(span) < num_outputs:
        tensors = dict(tensors)
        for key, tensor in tensors.items():
            if tensor.dim() == 2:
                size = tensor.shape[stored.outputs_dim]  # several outputs may share a byte or a word
                start, stop = (size * end // num_outputs for end in (span.start, span.stop))
                tensors[key] = tensor.narrow(stored.outputs_dim, start, stop - start)
    return stored.decode(tensors, dtype)


def _as_stored(tensors: dict[str, torch.Tensor], converted: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer as they are in the file, also if `torch_int4` has converted them."""
    return tensors | {"qweight": restore(tensors["qweight"])} if converted else tensors


class _PackedMatmul(torch.autograd.Function):
    """Computes `hidden_states @ weight.T`, and keeps only the packed weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, layer: "PackedLinear") -> torch.Tensor:
        # Keep the tensors and not the layer, because hooks may have replaced its tensors before the backward pass.
        ctx.format, ctx.tensors, ctx.converted = layer.format, layer.own_tensors(), layer.int4_scales is not None
        return layer.multiply(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        tensors = _as_stored(ctx.tensors, ctx.converted)
        return gradient @ decode(ctx.format, tensors, gradient.dtype, gradient.shape[-1]), None


class PackedLinear(nn.Linear):
    """A frozen Linear whose weight stays as stored; it is dequantised to the dtype of the input in every call.

    Its parameters have the names, dtypes and shapes of the file, so that saving writes the same layout back. It is a
    subclass of nn.Linear, so that peft finds it.

    Args:
        linear: the layer that this one replaces; its bias is kept.
        stored: the format of the weight.
        tensors: dtype and shape of the stored tensors.
    """

    def __init__(self, linear: nn.Linear, stored: Format, tensors: Mapping[str, TensorHeader]):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format = stored
        self.packed_names = tuple(key for key in tensors if key != "bias")
        self.register_parameter("weight", None)  # not every format has one
        for key in self.packed_names:
            empty = torch.empty(tensors[key].shape, dtype=TORCH_DTYPES[tensors[key].dtype], device="meta")
            self.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        self.bias = linear.bias
        self._is_hf_initialized = True  # transformers must not draw random bytes for weights offloaded to disk
        self.compute_dtype: torch.dtype | None = None  # the dtype of peft's adapters; that of the weight may be float8
        self.int4_scales: torch.Tensor | None = None  # if `qweight` has its codes in the order of torch's operator

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """Return the packed tensors by the last part of their names, those of `torch_int4` as it has converted them."""
        return {key: self._parameters[key].detach() for key in self.packed_names}

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the packed tensors as they are stored, by the last part of their names."""
        return _as_stored(self.own_tensors(), self.int4_scales is not None)

    def convert(self) -> None:
        """Bring AWQ codes into the order of torch's int4 operator, where that one is the fastest way to multiply."""
        if (
            self.format.name == "AWQ GEMM"
            and self.int4_scales is None
            and self.compute_dtype == torch.bfloat16
            and can_convert(self.own_tensors())
            and not runs_on_cpu()
        ):
            codes, self.int4_scales = convert(self.own_tensors())
            self.qweight = nn.Parameter(codes, requires_grad=False)

    def restore(self) -> None:
        """Bring the codes back into the stored order."""
        if self.int4_scales is not None:
            self.qweight = nn.Parameter(self.packed_tensors()["qweight"], requires_grad=False)
            self.int4_scales = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.int4_scales is not None:
            destination[prefix + "qweight"] = self.packed_tensors()["qweight"]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_converted = self.int4_scales is not None
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        if was_converted:
            self.convert()

    @torch.no_grad()
    def dequantized_weight(
        self, dtype: torch.dtype, span: range | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the weight, `(out_features, in_features)`, or the rows in `span`; arguments as `decode` takes them."""
        if self.int4_scales is not None:
            return unpack_int4(self.own_tensors(), dtype, span or range(self.out_features))
        return decode(self.format, self.own_tensors(), dtype, self.out_features, span, out)

    def _spans(self, device: torch.device) -> list[range]:
        """Return the ranges of outputs that are dequantised one after the other: several on a CPU."""
        count = 1
        if device.type == "cpu":
            num_weights, multiple = self.out_features * self.in_features, 16 if self.int4_scales is None else 64
            while num_weights > count * CPU_CHUNK_WEIGHTS and self.out_features % (multiple * count) == 0:
                count *= 2
        size = self.out_features // count
        return [range(index * size, (index + 1) * size) for index in range(count)]

    @torch.no_grad()
    def multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute `hidden_states @ weight.T`; a CPU dequantises large weights in parts, never as a whole."""
        if has_int4_product(hidden_states, self.int4_scales):
            return multiply_int4(hidden_states, self.qweight, self.int4_scales)
        if self.int4_scales is None and has_product(self.format.name, hidden_states, self._parameters):
            return multiply_on_cpu(self.format.name, hidden_states, self.own_tensors())
        spans, weight = self._spans(hidden_states.device), None
        if len(spans) == 1:
            return nn.functional.linear(hidden_states, self.dequantized_weight(hidden_states.dtype))
        outputs = hidden_states.new_empty(*hidden_states.shape[:-1], self.out_features)
        for span in spans:
            weight = self.dequantized_weight(hidden_states.dtype, span, weight)
            outputs[..., span.start : span.stop] = nn.functional.linear(hidden_states, weight)
        return outputs

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        device_type = hidden_states.device.type
        # "meta" has no autocast, and `is_autocast_enabled` raises an error for it.
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            output = _PackedMatmul.apply(hidden_states, self)
        elif has_kernel(self.format.name, hidden_states, self._parameters):
            output = multiply_packed(self.format.name, hidden_states, self.packed_tensors())
        else:
            output = self.multiply(hidden_states)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        """Move with the model, but keep the stored dtypes: `model.to(dtype)` changes only the computation."""
        if self.int4_scales is not None:
            probe = fn(torch.empty(0, dtype=torch.bfloat16, device="cpu"))
            if (probe.device.type, probe.dtype) != ("cpu", torch.bfloat16):
                self.restore()
        packed = {id(self._parameters[key]) for key in self.packed_names}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)

    def unpacked(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain Linear with the dequantised weight."""
        weight = self.dequantized_weight(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.contiguous())
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


def pack_linears(model: nn.Module, headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Replace the layers of a model on the meta device that a checkpoint stores quantised.

    Args:
        model: the model; its Linear layers tell the sizes.
        headers: all tensors of the checkpoint.

    Returns:
        how many layers have which format.

    Raises:
        ValueError: as `detect_format`.
    """
    modules = dict(model.named_modules())
    by_module: dict[str, dict[str, TensorHeader]] = {}
    for name, header in headers.items():
        module_name, _, key = name.rpartition(".")
        by_module.setdefault(module_name, {})[key] = header
    counts: dict[str, int] = {}
    for name, tensors in by_module.items():
        if not any(is_quantised(key, header) for key, header in tensors.items()):
            continue
        if name not in modules:
            _raise_unknown(name, tensors, "the model has no such module")
        stored = None
        if not all(key in KV_CACHE_SCALES for key in tensors):
            stored = detect_format(name, modules[name], tensors)
        if stored is None:
            _keep_cache_scales(name, modules[name], tensors)
            continue
        counts[stored.name] = counts.get(stored.name, 0) + 1
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, PackedLinear(modules[name], stored, tensors))
    return counts


def _keep_cache_scales(name: str, module: nn.Module, tensors: Mapping[str, TensorHeader]) -> None:
    """Register the KV-cache scales of an unquantised module, so that they are loaded and saved again."""
    for key in KV_CACHE_SCALES:
        if key in tensors:
            if tensors[key].dtype != "F32" or math.prod(tensors[key].shape) != 1:
                _raise_unknown(name, tensors, f"{key} is not one float32 number")
            empty = torch.empty(tensors[key].shape, dtype=torch.float32, device="meta")
            module.register_parameter(key, nn.Parameter(empty, requires_grad=False))


def packed_linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Return the packed layers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


# --- transformers' side ---


class PackedConfig(QuantizationConfigMixin):
    """The quantisation config of a model with packed layers.

    Args:
        stored: the checkpoint's own `quantization_config`, which saving writes back; None when it has none.
        headers: the headers of the checkpoint's tensors; only loading needs them.
    """

    def __init__(
        self, stored: dict[str, Any] | None = None, headers: dict[str, TensorHeader] | None = None, **kwargs: Any
    ):
        self.quant_method = QUANT_METHOD
        self.stored = stored
        self.headers = headers

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored or {})

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PackedQuantizer(HfQuantizer):
    """Puts packed layers into a model before its weights are loaded."""

    requires_calibration = True  # it loads what others have quantised

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.headers = self.quantization_config.headers
        counts = pack_linears(model, self.headers)
        if self.quantization_config.stored is None:
            self.quantization_config.stored = describe_formats(model)
        logger.info(f"Packed layers: {counts}.")
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Say whether `create_quantized_param` must load a tensor (used by transformers 4.57)."""
        return param_name in self.headers and is_quantised(param_name, self.headers[param_name])

    def create_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, target_device: Any, **kwargs: Any
    ) -> None:
        """Register a tensor in its stored dtype; transformers 4.57 has cast it to the model's dtype."""
        header = self.headers[param_name]
        if param_value.dtype != TORCH_DTYPES[header.dtype]:
            param_value = header.read()
        module, _, key = param_name.rpartition(".")
        parameter = nn.Parameter(param_value.to(target_device), requires_grad=False)
        model.get_submodule(module).register_parameter(key, parameter)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for _, layer in packed_linears(model):
            layer.compute_dtype = model.get_input_embeddings().weight.dtype
            for key in layer.packed_names:
                getattr(layer, key).requires_grad_(False)
        self._correct_offload_index(model)
        self.quantization_config.headers = None
        model.config.quantization_config = self.quantization_config  # transformers 4.57 gave the model a copy
        self.headers = {}
        return model

    def _correct_offload_index(self, model: nn.Module) -> None:
        """Let accelerate read tensors on disk in their stored dtype; transformers 4.57 set that of the model."""
        for name, layer in packed_linears(model):
            index = getattr(getattr(getattr(layer, "_hf_hook", None), "weights_map", None), "dataset", None)
            for key in layer.packed_names:
                entry = getattr(index, "index", {}).get(f"{name}.{key}")
                if entry is not None and "dtype" in entry:
                    entry["dtype"] = str(getattr(layer, key).dtype).removeprefix("torch.")

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        unpack_linears(model, dtype)
        for part in (model.config.get_text_config(), model.config.vision_config):
            vars(part).pop("_pre_quantization_dtype", None)  # transformers 4.57 removes it only from the whole config
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True, because adapters can be trained; the packed weights stay frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def describe_formats(model: nn.Module) -> dict[str, Any]:
    """Return a `quantization_config` that engines can read, for packed layers of a checkpoint that has none."""
    layers = dict(packed_linears(model))
    names = sorted({layer.format.name for layer in layers.values()})
    ignore = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    if names == ["AWQ GEMM"]:
        layer = next(iter(layers.values()))
        group_size = layer.in_features // layer.scales.shape[0]
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignore,
        }
    if not names:
        return {"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    quant_algo = names[0] if len(names) == 1 else "MIXED_PRECISION"
    return {"quant_method": "modelopt", "quant_algo": quant_algo, "ignore": ignore}


def convert_linears(model: nn.Module) -> None:
    """Convert the AWQ layers of a loaded model for torch's int4 operator, one after the other, where it is needed."""
    for _, layer in packed_linears(model):
        layer.convert()


def unpack_linears(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the packed layers of a loaded model by plain ones.

    Args:
        model: the model.
        dtype: of the new weights, by default that of the input embeddings.

    Raises:
        ValueError: if weights are offloaded.
    """
    dtype = dtype or model.get_input_embeddings().weight.dtype
    for name, layer in list(packed_linears(model)):
        if any(tensor.device.type == "meta" for tensor in layer.packed_tensors().values()):
            raise ValueError(
                f"{name} is offloaded and cannot be dequantised in place. Load with from_pretrained(..., "
                "dequantize=True): it dequantises first and offloads then."
            )
        parent, _, attribute = name.rpartition(".")
        linear, hook = layer.unpacked(dtype), getattr(layer, "_hf_hook", None)
        if hook is not None:  # accelerate's, which moves inputs between devices
            remove_hook_from_module(layer)
            add_hook_to_module(linear, hook)
        setattr(model.get_submodule(parent), attribute, linear)


def register() -> None:
    """Register this quantiser with transformers. Every copy of this file does so when loaded; the last one counts."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackedQuantizer


# --- loading ---


def prepare_loading(
    checkpoint: Checkpoint, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[nn.Module], None]]:
    """Complete the arguments with which transformers loads a checkpoint, according to the formats of its tensors.

    Args:
        checkpoint: the headers and the config; the config may be changed.
        kwargs: the arguments for transformers that `Checkpoint.read` returned, and `dequantize`.

    Returns:
        arguments for `PreTrainedModel.from_pretrained`, and a function to call with the loaded model.

    Raises:
        ValueError: for a quantisation that cannot be loaded, and for a second one of a quantised checkpoint.
    """
    kwargs = dict(kwargs)
    dequantize = kwargs.pop("dequantize", False)
    _reject_packed_state_dict(kwargs.get("state_dict"))
    wanted = kwargs.get("quantization_config")
    if wanted is not None:
        kwargs["quantization_config"] = _keep_modules(wanted)
    stored = _stored_quantization(checkpoint)
    method = (stored or {}).get("quant_method")
    if method is not None and method not in STORED_METHODS:  # transformers knows it, or says that it does not
        if dequantize:
            raise ValueError(f"dequantize=True is for modelopt and AWQ; {checkpoint.source} is {method!r}.")
        return kwargs, _leave
    quantised = any(is_quantised(name, header) for name, header in checkpoint.headers.items())
    if not quantised and stored:
        logger.warning(
            f"The config of {checkpoint.source} describes {stored.get('quant_algo') or stored}, but none of its tensors "
            "is quantised; they are loaded as they are."
        )
        del checkpoint.config.quantization_config
    if not quantised:
        return kwargs, _leave
    if wanted is not None:
        raise ValueError(
            f"{checkpoint.source} is quantised already. Leave quantization_config out, or start from the BF16 "
            "checkpoint."
        )
    register()
    checkpoint.config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "stored": stored if method not in (None, QUANT_METHOD) else None,
        "headers": checkpoint.headers,
    }
    if not dequantize:
        return kwargs, convert_linears
    placement = _take_placement(kwargs)

    def dequantize_and_place(model: nn.Module) -> None:
        model.dequantize()
        if placement:
            place(model, **placement)

    return kwargs, dequantize_and_place


def _leave(model: nn.Module) -> None:
    """Do nothing: the model needs no further step."""


def _stored_quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the checkpoint's description of its quantisation as a dict, None when there is none."""
    stored = getattr(checkpoint.config, "quantization_config", None)
    return stored.to_dict() if isinstance(stored, QuantizationConfigMixin) else stored


def _reject_packed_state_dict(state_dict: Mapping[str, torch.Tensor] | None) -> None:
    for name, tensor in (state_dict or {}).items():
        if tensor.dtype in (torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(
                f"{name} is {tensor.dtype}: a quantised checkpoint can be loaded from its directory, not from "
                "state_dict=."
            )


def _keep_modules(quantization_config: Any) -> Any:
    """Exclude tower, projector and lm_head from bitsandbytes, torchao etc., unless the caller lists modules."""
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if getattr(quantization_config, name, "absent") is None:
            quantization_config = copy.deepcopy(quantization_config)
            setattr(quantization_config, name, list(KEPT_MODULES))
    return quantization_config


def _take_placement(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the arguments of a placement on several devices from `kwargs` and return them; None for one device.

    Plain weights are larger than packed ones, so the model is dequantised in main memory and placed afterwards.
    """
    device_map = kwargs.get("device_map")
    if isinstance(device_map, Mapping):
        several = len(set(device_map.values())) > 1 or "disk" in device_map.values()
    else:
        several = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    if not several:
        return None
    names = ("device_map", "max_memory", "offload_folder", "offload_buffers")
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def place(
    model: nn.Module,
    device_map: str | Mapping[str, Any],
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | os.PathLike | None = None,
    offload_buffers: bool = False,
) -> None:
    """Distribute a model in main memory over devices and disk; arguments as `from_pretrained` takes them."""
    if isinstance(device_map, str):
        blocks = list(model._no_split_modules)
        if device_map != "sequential":
            max_memory = get_balanced_memory(
                model,
                max_memory=max_memory,
                no_split_module_classes=blocks,
                low_zero=device_map == "balanced_low_0",
            )
        device_map = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=blocks)
    dispatch_model(
        model,
        device_map=dict(device_map),
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=model._skip_keys_device_placement,
    )


register()
