"""AWQ weights in the order of torch's int4 operator, which multiplies them fast on a CPU without a C compiler.

The operator takes bfloat16 and scales rounded to bfloat16. Its result is as far from the exact one as that of the
unpacked bfloat16 weight. It wants the four-bit codes in an order of its own, which depends on the processor. `convert`
brings them into it and `restore` brings them back, bit for bit.
"""

import functools
from collections.abc import Mapping

import torch

# Beyond this many rows it is faster to unpack the weight and to multiply densely (measured, see docs/performance.md).
MAX_ROWS = 48
GROUP_SIZES = (32, 64, 128, 256)
BLOCK = 64  # outputs; the operator orders the codes within blocks of this size or of a part of it
OUTPUTS_AT_A_TIME = 1024  # converted at once, which bounds the memory
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # column 8c + i of an int32 word c starts at bit AWQ_SHIFTS[i]


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Call torch's conversion: `(out_features, in_features)` codes -> `(out_features, in_features / 2)` bytes."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 2)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@functools.cache
def _order() -> tuple[int, ...] | None:
    """Find out how the operator orders the codes on this processor.

    Returns:
        The codes are `(blocks, in_features, outputs of a block)`, two in a byte; this lists the outputs of a block.
        None if there is no operator, or it orders them in another way.
    """
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    with torch.inference_mode(False), torch.device("cpu"):
        inputs, outputs = torch.arange(BLOCK) % 16, torch.arange(BLOCK)
        by_input = _nibbles(_pack(inputs.expand(BLOCK, BLOCK))).flatten()
        size = BLOCK if bool((by_input[:BLOCK] == 0).all()) else BLOCK // 2
        digits = (outputs & 15, outputs >> 4)
        low, high = (_nibbles(_pack(digit[:, None].expand(BLOCK, BLOCK))).flatten() for digit in digits)
        order = tuple((low + 16 * high)[:size].tolist())
        codes = torch.randint(0, 16, (2 * BLOCK, BLOCK), generator=torch.Generator().manual_seed(0))
        sorted_outputs = sorted(order) == list(range(size))
        return order if sorted_outputs and torch.equal(_unpack(_pack(codes), order), codes.to(torch.uint8)) else None


def _unpack(packed: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Undo `_pack`: `(out_features, in_features)` uint8."""
    num_outputs, num_inputs = packed.shape[0], 2 * packed.shape[1]
    size = len(order)
    pairs = packed.view(-1, num_inputs, size // 2).transpose(1, 2).contiguous()
    codes = torch.cat((pairs & 15, pairs >> 4), dim=1)
    outputs = [*order[::2], *order[1::2]]
    if outputs != sorted(outputs):
        codes = codes[:, torch.tensor(outputs).argsort()]
    return codes.view(num_outputs, num_inputs)


def can_convert(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Say whether the operator takes a weight in AutoAWQ's GEMM layout."""
    qweight, scales = tensors["qweight"], tensors["scales"]
    num_inputs, num_outputs = qweight.shape[0], 8 * qweight.shape[1]
    return (
        qweight.device.type == "cpu"
        and num_outputs % BLOCK == 0
        and num_inputs // len(scales) in GROUP_SIZES
        and _order() is not None
    )


def _unpack_words(words: torch.Tensor) -> torch.Tensor:
    return torch.stack([((words >> shift) & 15).to(torch.uint8) for shift in AWQ_SHIFTS], dim=-1).flatten(-2)


@torch.no_grad()
def convert(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the codes of a weight into the operator's order.

    Args:
        tensors: as AutoAWQ's GEMM stores them; `can_convert` holds.

    Returns:
        the codes, with dtype and shape of `qweight`, and for each scale s and its zero point z the operator's s and
        (8 - z) s, `(groups, out_features, 2)` bfloat16.
    """
    qweight = tensors["qweight"]
    parts = qweight.split(OUTPUTS_AT_A_TIME // 8, dim=1)
    packed = torch.cat([_pack(_unpack_words(part).t()) for part in parts])
    scales, zeros = tensors["scales"].float(), _unpack_words(tensors["qzeros"]).float()
    scales_and_zeros = torch.stack((scales, (8 - zeros) * scales), dim=-1).to(torch.bfloat16)
    return packed.view(torch.int32).view(qweight.shape), scales_and_zeros


@torch.no_grad()
def restore(codes: torch.Tensor) -> torch.Tensor:
    """Undo `convert`: return `qweight` as it was stored."""
    num_inputs, num_words = codes.shape
    packed = codes.view(torch.uint8).view(8 * num_words, num_inputs // 2)
    parts = []
    for part in packed.split(OUTPUTS_AT_A_TIME):
        columns = _unpack(part, _order()).t().to(torch.int32).unflatten(1, (-1, 8))
        parts.append(sum(columns[..., i] << shift for i, shift in enumerate(AWQ_SHIFTS)))
    return torch.cat(parts, dim=1).to(torch.int32)


def has_int4_product(inputs: torch.Tensor, scales_and_zeros: torch.Tensor | None) -> bool:
    """Say whether `multiply_int4` can compute this product, and is the faster way."""
    return (
        scales_and_zeros is not None
        and inputs.device.type == "cpu"
        and inputs.dtype == torch.bfloat16
        and inputs.shape[:-1].numel() <= MAX_ROWS
    )


def multiply_int4(inputs: torch.Tensor, codes: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """Compute `inputs @ weight.T`: `(..., in_features)` bfloat16 -> `(..., out_features)` bfloat16."""
    num_inputs, num_words = codes.shape
    packed = codes.view(torch.uint8).view(8 * num_words, num_inputs // 2)
    group_size = num_inputs // len(scales_and_zeros)
    rows = inputs.reshape(-1, num_inputs).contiguous()
    outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_zeros)
    return outputs.view(*inputs.shape[:-1], 8 * num_words)


@torch.no_grad()
def unpack_int4(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, span: range) -> torch.Tensor:
    """Compute rows of the weight, `(len(span), in_features)`, the same numbers as from the stored order.

    Args:
        tensors: of the layer, after `convert`.
        dtype: of the result.
        span: the outputs whose weights are wanted; the ends are multiples of 64.
    """
    num_inputs, num_words = tensors["qweight"].shape
    packed = tensors["qweight"].view(torch.uint8).view(8 * num_words, num_inputs // 2)
    words = slice(span.start // 8, span.stop // 8)
    codes = _unpack(packed[span.start : span.stop], _order()).unflatten(1, (len(tensors["scales"]), -1))
    zeros = _unpack_words(tensors["qzeros"][:, words]).t().float().unsqueeze(-1)
    scales = tensors["scales"][:, span.start : span.stop].t().float().unsqueeze(-1)
    return (codes.float().sub_(zeros).mul_(scales)).to(dtype).flatten(1)
