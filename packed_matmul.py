"""Triton kernels that multiply a few rows, as in a decode step, by a packed weight. They read only its packed bytes.

The time of a decode step depends on the bytes that it reads. So a weight of 4.5 or 8 bits should be unpacked in
registers and not in memory, and in few instructions: a GPU that needs more than about five for each weight is busy with
them and not with its memory. The kernels keep products and sums in float32, apply each scale to a sum and not to every
weight, and add up the threads' sums once, at the end. So their results differ from those of the unpacked layer by the
order of summation, and because the unpacked layer rounds every weight to the dtype of the input.

Where Triton does not run (`triton_kernels`), or with many rows, the weight is unpacked for the matmul.
"""

import re

import torch

from .triton_kernels import capability, runs_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_kernels
    triton = None

MAX_ROWS = 4  # that share one decoding of the weight. For a prompt it is faster to unpack the weight
FORMATS = ("NVFP4", "FP8", "W4A16_AWQ", "AWQ GEMM")
HARDWARE_E4M3 = (8, 9)  # the first compute capability that has an instruction for e4m3
# Outputs and inputs of a program at once, by the number of rows: as many as fit the registers; in float32 half the inputs.
NVFP4_TILES = {1: (8, 4096), 2: (8, 2048), 4: (4, 2048)}
FP8_TILES = {1: (4, 4096), 2: (4, 2048), 4: (4, 2048)}
AWQ_TILES = {1: (32, 128), 2: (32, 128), 4: (16, 128)}  # pairs of outputs, and inputs; with fewer pairs more inputs
AWQ_GROUPS = (32, 64, 128)  # inputs that share a scale
GEMM_TILES = {1: (32, 16), 2: (16, 16), 4: (8, 16)}  # inputs, and words of eight outputs
PROGRAMS_PER_MULTIPROCESSOR = 2  # fewer leave some of them waiting for the others

# Eight e2m1 codes of a word to float32, 2**-6 too small: put in the places of an e4m3, which is converted in pairs.
E2M1_ASSEMBLY = """
{
.reg .b32 a, b, h;
.reg .b16 l, u, p, q;
and.b32 a, $8, 0x08080808;
shl.b32 a, a, 4;
and.b32 b, $8, 0x07070707;
shl.b32 b, b, 2;
or.b32 a, a, b;
mov.b32 {l, u}, a;
cvt.rn.f16x2.e4m3x2 h, l;
mov.b32 {p, q}, h;
cvt.f32.f16 $0, p;
cvt.f32.f16 $2, q;
cvt.rn.f16x2.e4m3x2 h, u;
mov.b32 {p, q}, h;
cvt.f32.f16 $4, p;
cvt.f32.f16 $6, q;
and.b32 a, $8, 0x80808080;
and.b32 b, $8, 0x70707070;
shr.u32 b, b, 2;
or.b32 a, a, b;
mov.b32 {l, u}, a;
cvt.rn.f16x2.e4m3x2 h, l;
mov.b32 {p, q}, h;
cvt.f32.f16 $1, p;
cvt.f32.f16 $3, q;
cvt.rn.f16x2.e4m3x2 h, u;
mov.b32 {p, q}, h;
cvt.f32.f16 $5, p;
cvt.f32.f16 $7, q;
}
"""

if triton is not None:
    _ASSEMBLY = tl.constexpr(E2M1_ASSEMBLY)

    @triton.jit
    def _decode_e4m3(byte, HARDWARE: tl.constexpr):
        """Convert bytes to float32. Without hardware, the shifted seven bits have an exponent that is 120 too small."""
        if HARDWARE:
            return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
        byte = byte.to(tl.int32)
        magnitude = ((byte & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
        magnitude = tl.where((byte & 127) == 127, float("nan"), magnitude)
        return tl.where(byte > 127, -magnitude, magnitude)

    @triton.jit
    def _place_e2m1(word, sign_shift: tl.constexpr, shift: tl.constexpr):
        """Make two float16 in an int32 of the codes that the shifts bring to bits 12 to 15 and 28 to 31."""
        magnitude = (word << -shift if shift < 0 else word >> shift) & 0x0E000E00
        return ((word << sign_shift) & -0x7FFF8000) | magnitude

    @triton.jit
    def _low_half(pair):
        return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def _high_half(pair):
        return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def _decode_e2m1(word, HARDWARE: tl.constexpr):
        """Convert the eight codes of each int32 to float32, 2**-6 too small with hardware and 2**-14 without."""
        if HARDWARE:
            return tl.inline_asm_elementwise(
                _ASSEMBLY, "=f,=f,=f,=f,=f,=f,=f,=f,r", [word], dtype=(tl.float32,) * 8, is_pure=True, pack=1
            )
        first, second = _place_e2m1(word, 12, -9), _place_e2m1(word, 8, -5)
        third, fourth = _place_e2m1(word, 4, -1), _place_e2m1(word, 0, 3)
        low = _low_half(first), _low_half(second), _low_half(third), _low_half(fourth)
        high = _high_half(first), _high_half(second), _high_half(third), _high_half(fourth)
        return low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]

    @triton.jit
    def _load_eighths(inputs, first, num_inputs, WORDS: tl.constexpr, WHOLE: tl.constexpr):
        """Load eight inputs for each word, the first ones of all words first."""
        column = first + 8 * tl.arange(0, WORDS)[:, None] + tl.arange(0, 8)[None, :]
        values = tl.load(inputs + column) if WHOLE else tl.load(inputs + column, mask=column < num_inputs, other=0)
        even, odd = tl.split(tl.reshape(values.to(tl.float32), (WORDS, 2, 2, 2)))
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        return x0, x1, x2, x3, x4, x5, x6, x7

    @triton.jit
    def _dot_eighths(w, x):
        total = w[0] * x[0][None, :]
        total += w[1] * x[1][None, :]
        total += w[2] * x[2][None, :]
        total += w[3] * x[3][None, :]
        total += w[4] * x[4][None, :]
        total += w[5] * x[5][None, :]
        total += w[6] * x[6][None, :]
        total += w[7] * x[7][None, :]
        return total

    @triton.jit
    def _add_nvfp4(
        total,
        codes,
        scales,
        inputs,
        start,
        num_inputs,
        OUTPUTS: tl.constexpr,
        WORDS: tl.constexpr,
        WHOLE: tl.constexpr,
    ):
        """Add the products of one row of inputs with some columns: a scale for each block of two words."""
        products = _dot_eighths(codes, _load_eighths(inputs, 8 * start, num_inputs, WORDS, WHOLE))
        return total + tl.sum(tl.reshape(products, (OUTPUTS, WORDS // 2, 2)), axis=2) * scales

    @triton.jit
    def _step_nvfp4(
        total0,
        total1,
        total2,
        total3,
        inputs,
        words,
        block_scales,
        start,
        num_inputs,
        last_row,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        WORDS: tl.constexpr,
        WHOLE: tl.constexpr,
        HARDWARE: tl.constexpr,
    ):
        column = start + tl.arange(0, WORDS)[None, :]
        block = start // 2 + tl.arange(0, WORDS // 2)[None, :]
        if WHOLE:
            word = tl.load(words + column)
            byte = tl.load(block_scales + block)
        else:
            word = tl.load(words + column, mask=column < num_inputs // 8, other=0)
            byte = tl.load(block_scales + block, mask=block < num_inputs // 16, other=0)
        codes, scales = _decode_e2m1(word, HARDWARE), _decode_e4m3(byte, HARDWARE)
        total0 = _add_nvfp4(total0, codes, scales, inputs, start, num_inputs, OUTPUTS, WORDS, WHOLE)
        if ROWS > 1:
            row = inputs + num_inputs
            total1 = _add_nvfp4(total1, codes, scales, row, start, num_inputs, OUTPUTS, WORDS, WHOLE)
        if ROWS > 2:
            row = inputs + 2 * num_inputs
            total2 = _add_nvfp4(total2, codes, scales, row, start, num_inputs, OUTPUTS, WORDS, WHOLE)
            row = inputs + last_row * num_inputs
            total3 = _add_nvfp4(total3, codes, scales, row, start, num_inputs, OUTPUTS, WORDS, WHOLE)
        return total0, total1, total2, total3

    @triton.jit
    def _store_sums(total, outputs, output, factor, num_outputs):
        result = tl.sum(total, axis=1) * factor
        tl.store(outputs + output, result.to(outputs.dtype.element_ty), mask=output < num_outputs)

    @triton.jit
    def _store_rows(
        total0, total1, total2, total3, outputs, output, factor, num_outputs, last_row, ROWS: tl.constexpr
    ):
        """Store the sums of up to four rows. With three rows, the fourth is the third once more."""
        _store_sums(total0, outputs, output, factor, num_outputs)
        if ROWS > 1:
            _store_sums(total1, outputs + num_outputs, output, factor, num_outputs)
        if ROWS > 2:
            _store_sums(total2, outputs + 2 * num_outputs, output, factor, num_outputs)
            _store_sums(total3, outputs + last_row * num_outputs, output, factor, num_outputs)

    @triton.jit
    def _nvfp4_kernel(
        inputs,
        words,
        block_scales,
        scale,
        outputs,
        num_inputs,
        num_outputs,
        last_row,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        INPUTS: tl.constexpr,
        HARDWARE: tl.constexpr,
    ):
        """Compute OUTPUTS outputs of all rows in each program. A word has eight columns, and two words a scale."""
        WORDS: tl.constexpr = INPUTS // 8
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        # Programs beyond the last output compute it again and store nothing: that takes no mask for the weight.
        read = tl.minimum(output, num_outputs - 1)[:, None].to(tl.int64)
        own_words, own_scales = words + read * (num_inputs // 8), block_scales + read * (num_inputs // 16)
        total0 = tl.zeros((OUTPUTS, WORDS // 2), tl.float32)
        total1, total2, total3 = total0, total0, total0
        num_whole = num_inputs // INPUTS * WORDS
        for start in range(0, num_whole, WORDS):
            total0, total1, total2, total3 = _step_nvfp4(
                total0, total1, total2, total3, inputs, own_words, own_scales, start, num_inputs, last_row,
                ROWS, OUTPUTS, WORDS, True, HARDWARE,
            )  # fmt: skip
        if num_whole < num_inputs // 8:
            total0, total1, total2, total3 = _step_nvfp4(
                total0, total1, total2, total3, inputs, own_words, own_scales, num_whole, num_inputs, last_row,
                ROWS, OUTPUTS, WORDS, False, HARDWARE,
            )  # fmt: skip
        factor = tl.load(scale) * (64.0 if HARDWARE else 16384.0)
        _store_rows(total0, total1, total2, total3, outputs, output, factor, num_outputs, last_row, ROWS)

    @triton.jit
    def _add_fp8(
        total, weights, inputs, start, num_inputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, WHOLE: tl.constexpr
    ):
        column = start + tl.arange(0, INPUTS)
        values = tl.load(inputs + column) if WHOLE else tl.load(inputs + column, mask=column < num_inputs, other=0)
        products = weights * values.to(tl.float32)[None, :]
        return total + tl.sum(tl.reshape(products, (OUTPUTS, INPUTS // 16, 16)), axis=2)

    @triton.jit
    def _step_fp8(
        total0,
        total1,
        total2,
        total3,
        inputs,
        weight,
        start,
        num_inputs,
        last_row,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        INPUTS: tl.constexpr,
        WHOLE: tl.constexpr,
        HARDWARE: tl.constexpr,
    ):
        column = start + tl.arange(0, INPUTS)[None, :]
        byte = tl.load(weight + column) if WHOLE else tl.load(weight + column, mask=column < num_inputs, other=0)
        weights = _decode_e4m3(byte, HARDWARE)
        total0 = _add_fp8(total0, weights, inputs, start, num_inputs, OUTPUTS, INPUTS, WHOLE)
        if ROWS > 1:
            total1 = _add_fp8(total1, weights, inputs + num_inputs, start, num_inputs, OUTPUTS, INPUTS, WHOLE)
        if ROWS > 2:
            total2 = _add_fp8(total2, weights, inputs + 2 * num_inputs, start, num_inputs, OUTPUTS, INPUTS, WHOLE)
            row = inputs + last_row * num_inputs
            total3 = _add_fp8(total3, weights, row, start, num_inputs, OUTPUTS, INPUTS, WHOLE)
        return total0, total1, total2, total3

    @triton.jit
    def _fp8_kernel(
        inputs,
        weight,
        scale,
        outputs,
        num_inputs,
        num_outputs,
        last_row,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        INPUTS: tl.constexpr,
        HARDWARE: tl.constexpr,
    ):
        """Compute OUTPUTS outputs of all rows in each program."""
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        own = weight + tl.minimum(output, num_outputs - 1)[:, None].to(tl.int64) * num_inputs
        total0 = tl.zeros((OUTPUTS, INPUTS // 16), tl.float32)
        total1, total2, total3 = total0, total0, total0
        num_whole = num_inputs // INPUTS * INPUTS
        for start in range(0, num_whole, INPUTS):
            total0, total1, total2, total3 = _step_fp8(
                total0, total1, total2, total3, inputs, own, start, num_inputs, last_row,
                ROWS, OUTPUTS, INPUTS, True, HARDWARE,
            )  # fmt: skip
        if num_whole < num_inputs:
            total0, total1, total2, total3 = _step_fp8(
                total0, total1, total2, total3, inputs, own, num_whole, num_inputs, last_row,
                ROWS, OUTPUTS, INPUTS, False, HARDWARE,
            )  # fmt: skip
        _store_rows(total0, total1, total2, total3, outputs, output, tl.load(scale), num_outputs, last_row, ROWS)

    @triton.jit
    def _place_int4(word, shift: tl.constexpr):
        """Make a float32 of 16 + code, of the four bits that begin at `shift`: the bits below the exponent of 16."""
        moved = word << (19 - shift) if shift < 19 else word >> (shift - 19)
        return ((moved & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)

    @triton.jit
    def _decode_int4(word):
        """Convert the eight codes of each int32, the lowest bits first, to float32, 16 too large."""
        low = _place_int4(word, 0), _place_int4(word, 4), _place_int4(word, 8), _place_int4(word, 12)
        high = _place_int4(word, 16), _place_int4(word, 20), _place_int4(word, 24), _place_int4(word, 28)
        return low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]

    @triton.jit
    def _add_awq(even, odd, codes, even_scale, odd_scale, inputs, column, WORDS: tl.constexpr):
        """Add the products of one row of inputs with some columns, of which a word has four."""
        place = 4 * column[:, None] + tl.arange(0, 4)[None, :]
        x02, x13 = tl.split(tl.reshape(tl.load(inputs + place).to(tl.float32), (WORDS, 2, 2)))
        x0, x2 = tl.split(x02)
        x1, x3 = tl.split(x13)
        low = codes[0] * x0[None, :]
        low += codes[2] * x1[None, :]
        low += codes[4] * x2[None, :]
        low += codes[6] * x3[None, :]
        high = codes[1] * x0[None, :]
        high += codes[3] * x1[None, :]
        high += codes[5] * x2[None, :]
        high += codes[7] * x3[None, :]
        offset = ((x0 + x1) + (x2 + x3))[None, :] * 24.0
        return even + (low - offset) * even_scale, odd + (high - offset) * odd_scale

    @triton.jit
    def _awq_kernel(
        inputs,
        words,
        scales,
        outputs,
        num_inputs,
        num_outputs,
        last_row,
        ROWS: tl.constexpr,
        PAIRS: tl.constexpr,
        GROUP: tl.constexpr,
        GROUPS: tl.constexpr,
    ):
        """Compute 2 * PAIRS outputs of all rows in each program, GROUPS groups of inputs at once, for W4A16_AWQ.

        A word has four columns of two rows, the even row in the low bits of each byte. Codes have a sign.
        """
        WORDS: tl.constexpr = GROUPS * GROUP // 4
        pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
        read = tl.minimum(pair, num_outputs // 2 - 1)[:, None].to(tl.int64)
        num_groups = num_inputs // GROUP
        even0 = tl.zeros((PAIRS, WORDS), tl.float32)
        odd0, even1, odd1, even2, odd2, even3, odd3 = even0, even0, even0, even0, even0, even0, even0
        for start in range(0, num_inputs // 4, WORDS):
            column = start + tl.arange(0, WORDS)
            # With the signs turned, 0 to 15 stand for -8 to 7.
            codes = _decode_int4(tl.load(words + read * (num_inputs // 4) + column[None, :]) ^ -0x77777778)
            own_scales = scales + 2 * read * num_groups + (column // (GROUP // 4))[None, :]
            even_scale, odd_scale = tl.load(own_scales), tl.load(own_scales + num_groups)
            even0, odd0 = _add_awq(even0, odd0, codes, even_scale, odd_scale, inputs, column, WORDS)
            if ROWS > 1:
                row = inputs + num_inputs
                even1, odd1 = _add_awq(even1, odd1, codes, even_scale, odd_scale, row, column, WORDS)
            if ROWS > 2:
                row = inputs + 2 * num_inputs
                even2, odd2 = _add_awq(even2, odd2, codes, even_scale, odd_scale, row, column, WORDS)
                row = inputs + last_row * num_inputs
                even3, odd3 = _add_awq(even3, odd3, codes, even_scale, odd_scale, row, column, WORDS)
        # The even outputs, and from one place further on the odd ones.
        _store_rows(even0, even1, even2, even3, outputs, 2 * pair, 1.0, num_outputs, last_row, ROWS)
        _store_rows(odd0, odd1, odd2, odd3, outputs + 1, 2 * pair, 1.0, num_outputs, last_row, ROWS)

    @triton.jit
    def _add_gemm_group(total, sums, sum_of_inputs, zero, scale):
        return total + (sums - sum_of_inputs * zero[None, None, :]) * scale[None, None, :]

    @triton.jit
    def _gemm_scale(scales, first, word, inside, PLACE: tl.constexpr):
        return tl.load(scales + first + 8 * word + PLACE, mask=inside, other=0).to(tl.float32)

    @triton.jit
    def _store_gemm(total, partial, word, inside, PLACE: tl.constexpr):
        tl.store(partial + 8 * word[None, :] + PLACE, tl.sum(total, axis=1), mask=inside[None, :])

    @triton.jit
    def _gemm_kernel(
        inputs,
        words,
        zeros,
        scales,
        partial,
        num_inputs,
        num_outputs,
        num_rows,
        groups_per_part,
        ROWS: tl.constexpr,
        GROUP: tl.constexpr,
        INPUTS: tl.constexpr,
        WORDS: tl.constexpr,
    ):
        """Add up eight outputs of all rows for each word over some groups of inputs, for AutoAWQ's GEMM.

        The nibbles of a word, from the lowest, are the outputs 0, 2, 4, 6, 1, 3, 5, 7.
        """
        part = tl.program_id(1)
        row = tl.minimum(tl.arange(0, ROWS), num_rows - 1)  # those beyond the last are the last again
        num_words = num_outputs // 8
        word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
        inside = word < num_words
        read = tl.minimum(word, num_words - 1)
        t0 = tl.zeros((ROWS, INPUTS, WORDS), tl.float32)
        t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
        first_group = part * groups_per_part
        for group in range(first_group, tl.minimum(first_group + groups_per_part, num_inputs // GROUP)):
            p0 = tl.zeros((ROWS, INPUTS, WORDS), tl.float32)
            p1, p2, p3, p4, p5, p6, p7, sums = p0, p0, p0, p0, p0, p0, p0, p0
            for start in range(0, GROUP, INPUTS):
                column = group * GROUP + start + tl.arange(0, INPUTS)
                value = tl.load(words + column[:, None].to(tl.int64) * num_words + read[None, :])
                x = tl.load(inputs + row[:, None] * num_inputs + column[None, :]).to(tl.float32)[:, :, None]
                sums += x
                p0 += _place_int4(value, 0)[None, :, :] * x
                p1 += _place_int4(value, 4)[None, :, :] * x
                p2 += _place_int4(value, 8)[None, :, :] * x
                p3 += _place_int4(value, 12)[None, :, :] * x
                p4 += _place_int4(value, 16)[None, :, :] * x
                p5 += _place_int4(value, 20)[None, :, :] * x
                p6 += _place_int4(value, 24)[None, :, :] * x
                p7 += _place_int4(value, 28)[None, :, :] * x
            zero = tl.load(zeros + group * num_words + read)
            own = group * num_outputs
            t0 = _add_gemm_group(t0, p0, sums, _place_int4(zero, 0), _gemm_scale(scales, own, read, inside, 0))
            t1 = _add_gemm_group(t1, p1, sums, _place_int4(zero, 4), _gemm_scale(scales, own, read, inside, 2))
            t2 = _add_gemm_group(t2, p2, sums, _place_int4(zero, 8), _gemm_scale(scales, own, read, inside, 4))
            t3 = _add_gemm_group(t3, p3, sums, _place_int4(zero, 12), _gemm_scale(scales, own, read, inside, 6))
            t4 = _add_gemm_group(t4, p4, sums, _place_int4(zero, 16), _gemm_scale(scales, own, read, inside, 1))
            t5 = _add_gemm_group(t5, p5, sums, _place_int4(zero, 20), _gemm_scale(scales, own, read, inside, 3))
            t6 = _add_gemm_group(t6, p6, sums, _place_int4(zero, 24), _gemm_scale(scales, own, read, inside, 5))
            t7 = _add_gemm_group(t7, p7, sums, _place_int4(zero, 28), _gemm_scale(scales, own, read, inside, 7))
        own_part = partial + (part * num_rows + row)[:, None].to(tl.int64) * num_outputs
        _store_gemm(t0, own_part, word, inside, 0)
        _store_gemm(t1, own_part, word, inside, 2)
        _store_gemm(t2, own_part, word, inside, 4)
        _store_gemm(t3, own_part, word, inside, 6)
        _store_gemm(t4, own_part, word, inside, 1)
        _store_gemm(t5, own_part, word, inside, 3)
        _store_gemm(t6, own_part, word, inside, 5)
        _store_gemm(t7, own_part, word, inside, 7)

    @triton.jit
    def _join_kernel(partial, outputs, num_numbers, num_parts, BLOCK: tl.constexpr):
        """Add up the parts of every output, in order."""
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(0, num_parts):
            total += tl.load(partial + part * num_numbers + place, mask=place < num_numbers, other=0)
        tl.store(outputs + place, total.to(outputs.dtype.element_ty), mask=place < num_numbers)


def count_multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; a CPU counts as an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def outputs_per_program(num_outputs: int, most: int, num_multiprocessors: int) -> int:
    """Return how many outputs a program computes: `most`, or fewer if some multiprocessors had too little to do."""
    outputs = most
    while outputs > 1 and num_outputs < outputs * PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors:
        outputs //= 2
    return outputs


def groups_at_once(num_groups: int, most: int) -> int:
    """Return how many groups of inputs a program takes at once: a power of two up to `most` that leaves no rest."""
    groups = 1
    while 2 * groups <= most and num_groups % (2 * groups) == 0:
        groups *= 2
    return groups


def parts_of_inputs(num_words: int, num_groups: int, num_multiprocessors: int) -> int:
    """Return into how many parts AWQ GEMM splits the groups of inputs: its words of outputs alone are too few."""
    programs = -(-num_words // GEMM_TILES[1][1])
    parts = -(-PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // programs)
    return max(1, min(parts, num_groups))


def _launch(format_name: str, rows: torch.Tensor, stored: list[torch.Tensor]) -> torch.Tensor:
    """Multiply `(num_rows, in_features)` by a weight; `stored` are the tensors of `_stored_tensors`."""
    num_rows, num_inputs = rows.shape
    num_outputs = _num_outputs(format_name, stored)
    outputs = rows.new_empty(num_rows, num_outputs)
    num_multiprocessors = count_multiprocessors(rows.device)
    shared = 1 << (num_rows - 1).bit_length()  # rows that share one decoding: 1, 2 or 4
    with torch.cuda.device_of(rows):  # Triton launches on the current device, wherever the tensors are
        if format_name == "AWQ GEMM":
            weight, zeros, scales = stored
            num_groups = len(scales)
            inputs_at_once, num_words = GEMM_TILES[shared]
            parts = parts_of_inputs(num_outputs // 8, num_groups, num_multiprocessors)
            groups_per_part = -(-num_groups // parts)
            parts = -(-num_groups // groups_per_part)
            partial = rows.new_empty(parts, num_rows, num_outputs, dtype=torch.float32)
            grid = (-(-num_outputs // (8 * num_words)), parts)
            sizes = (num_inputs, num_outputs, num_rows, groups_per_part)
            constants = (shared, num_inputs // num_groups, inputs_at_once, num_words)
            _gemm_kernel[grid](rows, weight, zeros, scales, partial, *sizes, *constants)
            _join_kernel[(-(-outputs.numel() // 256),)](partial, outputs, outputs.numel(), parts, 256)
        elif format_name == "W4A16_AWQ":
            weight, scales = stored
            most, block_inputs = AWQ_TILES[shared]
            pairs = outputs_per_program(num_outputs // 2, most, num_multiprocessors)
            num_groups = scales.shape[1]
            group = num_inputs // num_groups
            groups = groups_at_once(num_groups, most // pairs * block_inputs // group)
            grid = (-(-num_outputs // (2 * pairs)),)
            constants = (shared, pairs, group, groups)
            _awq_kernel[grid](rows, weight, scales, outputs, num_inputs, num_outputs, num_rows - 1, *constants)
        else:
            kernel, tiles = (_nvfp4_kernel, NVFP4_TILES) if format_name == "NVFP4" else (_fp8_kernel, FP8_TILES)
            most, block_inputs = tiles[shared]
            block_inputs //= 2 if rows.dtype == torch.float32 else 1
            block_outputs = outputs_per_program(num_outputs, most, num_multiprocessors)
            has_hardware = rows.device.type == "cuda" and capability(rows.device) >= HARDWARE_E4M3
            constants = (shared, block_outputs, block_inputs, has_hardware)
            grid = (-(-num_outputs // block_outputs),)
            kernel[grid](rows, *stored, outputs, num_inputs, num_outputs, num_rows - 1, *constants)
    return outputs


def _num_outputs(format_name: str, stored: list[torch.Tensor]) -> int:
    if format_name == "AWQ GEMM":
        return 8 * stored[0].shape[1]
    return len(stored[0]) * (2 if format_name == "W4A16_AWQ" else 1)


def _stored_tensors(format_name: str, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that a kernel reads, four-bit codes as int32."""
    if format_name == "AWQ GEMM":
        return [tensors["qweight"], tensors["qzeros"], tensors["scales"]]
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if format_name == "W4A16_AWQ":
        return [weight.view(torch.int32), scale]
    if format_name == "FP8":
        return [weight.view(torch.uint8), scale]
    return [weight.view(torch.int32), scale.view(torch.uint8), tensors["weight_scale_2"]]


# transformers runs a copy of this file of its own; an operator of the same name would replace this one.
OPERATOR = "nemotron_vl::multiply_packed_" + re.sub(r"\W", "_", __name__)


if triton is not None:
    # torch.compile sees one operator with a known shape, not the Triton code. Plain calls avoid its overhead.
    _launch_as_operator = torch.library.custom_op(OPERATOR, _launch, mutates_args=())

    @_launch_as_operator.register_fake
    def _(format_name: str, rows: torch.Tensor, stored: list[torch.Tensor]) -> torch.Tensor:
        return rows.new_empty(len(rows), _num_outputs(format_name, stored))


def _has_group(num_inputs: int, num_groups: int) -> bool:
    return num_inputs // num_groups in AWQ_GROUPS


def has_kernel(format_name: str, inputs: torch.Tensor, tensors: dict[str, torch.Tensor]) -> bool:
    """Say whether `multiply_packed` can compute this product, and is the faster way."""
    if format_name not in FORMATS or not 0 < inputs.shape[:-1].numel() <= MAX_ROWS:
        return False
    if format_name == "W4A16_AWQ" and not _has_group(inputs.shape[-1], tensors["weight_scale"].shape[1]):
        return False
    if format_name == "AWQ GEMM" and not _has_group(inputs.shape[-1], len(tensors["scales"])):
        return False
    return runs_kernels(inputs.device)


def multiply_packed(format_name: str, inputs: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute `inputs @ weight.T` for a weight in modelopt's NVFP4, FP8 or W4A16_AWQ layout, or AutoAWQ's GEMM.

    `quantization_nemotron_vl.FORMATS` describes the layouts.

    Args:
        format_name: one of `FORMATS`.
        inputs: `(..., in_features)`, any float dtype.
        tensors: the stored tensors of the layer, on the device of the inputs.

    Returns:
        `(..., out_features)` in the dtype of the inputs.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    if "pre_quant_scale" in tensors:  # of the columns of the weight; that of the inputs is the same
        rows = rows.float() * tensors["pre_quant_scale"].float()
    launch = _launch_as_operator if torch.compiler.is_compiling() else _launch
    outputs = launch(format_name, rows, _stored_tensors(format_name, tensors)).to(inputs.dtype)
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1])
