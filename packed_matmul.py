"""Triton kernels that multiply a few rows, as in a decode step, by a packed weight. They read only its packed bytes.

The time of a decode step depends on the bytes that it reads. So a weight of 4.5 or 8 bits should be unpacked in
registers and not in memory. The kernels unpack as `quantization_nemotron_vl` does (float32 products, one cast to the
dtype of the input) and add up in float32. Their results differ from those of the unpacked layer only by the order of
summation.

Where Triton does not run (`triton_kernels`), or with many rows, the weight is unpacked for the matmul.
"""

import torch

from .triton_kernels import runs_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_kernels
    triton = None

# The kernels read the weight once for each row of the input, so for a prompt it is faster to unpack the weight once.
MAX_ROWS = 4
BLOCK_OUTPUTS = 8
BLOCK_BYTES = 256  # of a weight's row at once
FORMATS = ("NVFP4", "FP8")

if triton is not None:

    @triton.jit
    def _decode_e4m3(byte):
        """Convert bytes, given as int32, to float32. The shifted seven bits have an exponent that is 120 too small."""
        magnitude = ((byte & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
        magnitude = tl.where((byte & 127) == 127, float("nan"), magnitude)
        return tl.where(byte > 127, -magnitude, magnitude)

    @triton.jit
    def _decode_e2m1(code):
        """Convert codes 0..15, given as int32, to float32: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
        exponent, mantissa = (code & 7) >> 1, code & 1
        magnitude = tl.where(exponent == 0, mantissa * 0.5, ((2 + mantissa) << exponent) * 0.25)
        return tl.where(code > 7, -magnitude, magnitude)

    @triton.jit
    def _fp8_kernel(
        inputs, weight, scale, outputs, num_inputs, num_outputs, BLOCK_OUTPUTS: tl.constexpr, BLOCK_BYTES: tl.constexpr
    ):
        """Compute BLOCK_OUTPUTS outputs of one row in each program."""
        row = tl.program_id(1)
        output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
        total = tl.zeros((BLOCK_OUTPUTS,), tl.float32)
        factor = tl.load(scale)
        for start in range(0, num_inputs, BLOCK_BYTES):
            column = start + tl.arange(0, BLOCK_BYTES)
            inside = (output[:, None] < num_outputs) & (column[None, :] < num_inputs)
            byte = tl.load(weight + output[:, None].to(tl.int64) * num_inputs + column[None, :], mask=inside, other=0)
            values = tl.load(inputs + row * num_inputs + column, mask=column < num_inputs, other=0)
            weights = (_decode_e4m3(byte.to(tl.int32)) * factor).to(values.dtype).to(tl.float32)
            total += tl.sum(weights * values.to(tl.float32)[None, :], axis=1)
        tl.store(outputs + row * num_outputs + output, total.to(outputs.dtype.element_ty), mask=output < num_outputs)

    @triton.jit
    def _nvfp4_kernel(
        inputs,
        weight,
        block_scales,
        scale,
        outputs,
        num_inputs,
        num_outputs,
        BLOCK_OUTPUTS: tl.constexpr,
        BLOCK_BYTES: tl.constexpr,
    ):
        """Compute BLOCK_OUTPUTS outputs of one row per program. A byte has two columns; eight bytes share a scale."""
        row = tl.program_id(1)
        output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
        first = output[:, None].to(tl.int64)
        total = tl.zeros((BLOCK_OUTPUTS,), tl.float32)
        factor = tl.load(scale)
        num_bytes = num_inputs // 2
        for start in range(0, num_bytes, BLOCK_BYTES):
            column = start + tl.arange(0, BLOCK_BYTES)
            inside = (output[:, None] < num_outputs) & (column[None, :] < num_bytes)
            pair = tl.load(weight + first * num_bytes + column[None, :], mask=inside, other=0).to(tl.int32)
            block = tl.load(block_scales + first * (num_bytes // 8) + column[None, :] // 8, mask=inside, other=0)
            factors = _decode_e4m3(block.to(tl.int32)) * factor
            even = tl.load(inputs + row * num_inputs + 2 * column, mask=column < num_bytes, other=0)
            odd = tl.load(inputs + row * num_inputs + 2 * column + 1, mask=column < num_bytes, other=0)
            low = (_decode_e2m1(pair & 15) * factors).to(even.dtype).to(tl.float32)
            high = (_decode_e2m1(pair >> 4) * factors).to(even.dtype).to(tl.float32)
            products = low * even.to(tl.float32)[None, :] + high * odd.to(tl.float32)[None, :]
            total += tl.sum(products, axis=1)
        tl.store(outputs + row * num_outputs + output, total.to(outputs.dtype.element_ty), mask=output < num_outputs)


def _launch(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_scales: torch.Tensor | None
) -> torch.Tensor:
    """Multiply `(num_rows, in_features)` by the bytes of a weight: NVFP4 with block scales, FP8 without."""
    num_rows, num_outputs = len(rows), len(weight)
    outputs = rows.new_empty(num_rows, num_outputs)
    grid = (-(-num_outputs // BLOCK_OUTPUTS), num_rows)
    sizes = (rows.shape[1], num_outputs, BLOCK_OUTPUTS, BLOCK_BYTES)
    with torch.cuda.device_of(rows):  # Triton launches on the current device, wherever the tensors are
        if block_scales is None:
            _fp8_kernel[grid](rows, weight, scale, outputs, *sizes)
        else:
            _nvfp4_kernel[grid](rows, weight, block_scales, scale, outputs, *sizes)
    return outputs


if triton is not None:
    # torch.compile sees one operator with a known shape, not the Triton code. Plain calls avoid its overhead.
    _launch_as_operator = torch.library.custom_op("nemotron_vl::multiply_packed", _launch, mutates_args=())

    @_launch_as_operator.register_fake
    def _(
        rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_scales: torch.Tensor | None
    ) -> torch.Tensor:
        return rows.new_empty(len(rows), len(weight))


def has_kernel(format_name: str, inputs: torch.Tensor, tensors: dict[str, torch.Tensor]) -> bool:
    """Say whether `multiply_packed` can compute this product, and is the faster way."""
    return (
        format_name in FORMATS
        and "pre_quant_scale" not in tensors
        and 0 < inputs.shape[:-1].numel() <= MAX_ROWS
        and runs_kernels(inputs.device)
    )


def multiply_packed(format_name: str, inputs: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute `inputs @ weight.T` for a weight in modelopt's NVFP4 or FP8 layout.

    `quantization_nemotron_vl.FORMATS` describes the layouts.

    Args:
        format_name: "NVFP4" or "FP8".
        inputs: `(..., in_features)`, any float dtype.
        tensors: the stored tensors of the layer, on the device of the inputs.

    Returns:
        `(..., out_features)` in the dtype of the inputs.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    block_scales, scale = None, tensors["weight_scale"]
    if format_name == "NVFP4":
        block_scales, scale = scale.view(torch.uint8), tensors["weight_scale_2"]
    launch = _launch_as_operator if torch.compiler.is_compiling() else _launch
    outputs = launch(rows, tensors["weight"].view(torch.uint8), scale, block_scales)
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1])
