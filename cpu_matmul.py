"""Products with packed weights on a CPU: C code that reads only the packed bytes, compiled at its first use.

A decode step multiplies one row by each weight. The C code unpacks 64 weights at a time in registers, multiplies in
float32 and adds up in float32. It differs from the unpacked layer by the order of summation, and in bfloat16 also by
the rounding of the weights, which it leaves out. For a prompt it is faster to unpack the weight once and to multiply
densely: `unpack_on_cpu` gives the numbers that `quantization_nemotron_vl` computes, several times faster.

Without a C compiler (`c_compiler`) plain torch computes the same.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers.utils import logging

from .c_compiler import INSTALL_HINT, load_library

logger = logging.get_logger(__name__)
_PROCESS = os.getpid()

# Beyond this many rows it is faster to unpack the weight and to multiply densely (measured, see docs/performance.md).
MAX_ROWS = {"NVFP4": 16, "FP8": 16, "W4A16_AWQ": 16, "AWQ GEMM": 8}
FORMATS = tuple(MAX_ROWS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = 64  # weights that the C code unpacks at a time; rows of inputs are padded to a multiple
WEIGHTS_PER_TASK = 2**17  # what a thread takes at a time

SOURCE = r"""
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) && defined(__F16C__) && !defined(PORTABLE)
#include <immintrin.h>
#define X86 1
#elif defined(__aarch64__) && !defined(PORTABLE)
#include <arm_neon.h>
#define ARM 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define STEP 64       /* weights unpacked at a time */
#define LANES 8
#define MOST_ROWS 4   /* rows of inputs at a time */
#define STRIP 64      /* words of AWQ GEMM at a time: four cache lines */
#define DEPTH 16      /* inputs of AWQ GEMM at a time */
#define UNPACK_DEPTH 64
#define MOST_STRIP_ROWS 16

typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

enum { NVFP4, FP8, W4A16_AWQ, AWQ_GEMM };

/* One product or one unpacking. */
struct job {
    const uint8_t *weight, *scales, *zeros; /* as stored, but scales of AWQ in float32 */
    const float *e4m3;                      /* the value of each byte */
    const float *inputs;                    /* (rows, stride); NVFP4: the even of 16 columns before the odd ones */
    void *outputs;                          /* product: float32 (rows, num_outputs); see `unpack` */
    int64_t format, rows, stride, num_inputs, num_outputs, group;
    int64_t first, last, chunk;             /* outputs (AWQ GEMM: words of eight outputs) to compute, and at a time */
    int64_t bfloat16;                       /* what `unpack` writes, else float32 */
    float scale;                            /* of the whole weight */
    int64_t next;                           /* the first output that no thread has taken */
};

INLINE float load_float(const uint8_t *p, int64_t index) { float v; memcpy(&v, p + 4 * index, 4); return v; }
INLINE uint32_t load_word(const uint8_t *p, int64_t index) { uint32_t v; memcpy(&v, p + 4 * index, 4); return v; }
INLINE floats load_floats(const float *p) { floats v; memcpy(&v, p, sizeof v); return v; }
INLINE floats repeat(float v) { return (floats){v, v, v, v, v, v, v, v}; }
INLINE float sum(floats v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

/* Eight int8 as float32. */
INLINE floats widen(const int8_t *p) {
#if X86
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
#else
    floats v;
    for (int j = 0; j < LANES; j++) v[j] = p[j];
    return v;
#endif
}

/* The nibbles that start at bit `shift` of 32 bytes, as twice their E2M1 value or as signed integers. */
INLINE void nibbles(const uint8_t *p, int shift, int is_e2m1, int8_t *out) {
    static const int8_t tables[2][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1},
        {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
    };
#if X86
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)tables[is_e2m1]));
    __m256i code = _mm256_srli_epi16(_mm256_loadu_si256((const void *)p), shift);
    code = _mm256_and_si256(code, _mm256_set1_epi8(15));
    _mm256_storeu_si256((void *)out, _mm256_shuffle_epi8(table, code));
#elif ARM
    int8x16_t table = vld1q_s8(tables[is_e2m1]);
    for (int j = 0; j < 32; j += 16) {
        uint8x16_t code = vandq_u8(vshlq_u8(vld1q_u8(p + j), vdupq_n_s8(-shift)), vdupq_n_u8(15));
        vst1q_s8(out + j, vqtbl1q_s8(table, code));
    }
#else
    for (int j = 0; j < 32; j++) out[j] = tables[is_e2m1][p[j] >> shift & 15];
#endif
}

/* Eight bytes of E4M3 as float32 / 256: shifted by 7 bits they are float16 with an exponent that is 8 too small. */
INLINE floats e4m3_256th(const uint8_t *p, const float *table) {
    (void)table;
#if X86
    __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)p)), 7);
    return (floats)_mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16((short)0xBFFF)));
#elif ARM
    uint16x8_t half = vreinterpretq_u16_s16(vshlq_n_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))), 7));
    float16x8_t values = vreinterpretq_f16_u16(vandq_u16(half, vdupq_n_u16(0xBFFF)));
    float32x4_t low = vcvt_f32_f16(vget_low_f16(values)), high = vcvt_f32_f16(vget_high_f16(values));
    floats v;
    memcpy(&v, &low, 16);
    memcpy((char *)&v + 16, &high, 16);
    return v;
#else
    floats v;
    for (int j = 0; j < LANES; j++) v[j] = table[p[j]] * 0x1p-8f;
    return v;
#endif
}

/* Whether one of 64 bytes is a NaN of E4M3, 127 or 255, which has no place in the float16 above. */
INLINE int any_nan(const uint8_t *p) {
#if X86
    __m256i sign = _mm256_set1_epi8(-128);
    __m256i low = _mm256_or_si256(_mm256_loadu_si256((const void *)p), sign);
    __m256i high = _mm256_or_si256(_mm256_loadu_si256((const void *)(p + 32)), sign);
    __m256i found = _mm256_cmpeq_epi8(_mm256_max_epu8(low, high), _mm256_set1_epi8(-1));
    return !_mm256_testz_si256(found, found);
#elif ARM
    uint8x16_t most = vdupq_n_u8(0), sign = vdupq_n_u8(128);
    for (int j = 0; j < STEP; j += 16) most = vmaxq_u8(most, vorrq_u8(vld1q_u8(p + j), sign));
    return vmaxvq_u8(most) == 255;
#else
    (void)p; /* the table knows NaN */
    return 0;
#endif
}

/* What the weights of `unpack_step` must be multiplied by, besides the scale of the whole weight. */
INLINE float unit(int format) { return format == NVFP4 ? 0.5f : format == FP8 ? 256 : 1; }

/* Unpack 64 weights of an output, times `factor`.
   Unless `in_order`, w[2 i] of NVFP4 are the even columns of block i and w[2 i + 1] the odd ones. */
INLINE void unpack_step(
    const struct job *job, int format, int64_t output, int64_t column, float factor, int in_order, floats *w
) {
    int64_t rest = job->num_inputs - column, first = output * job->num_inputs + column;
    uint8_t tail[STEP] = {0}, tail_scales[STEP / 16] = {0};
    if (format == NVFP4) {
        const uint8_t *p = job->weight + first / 2, *scales = job->scales + first / 16;
        if (rest < STEP) {
            p = memcpy(tail, p, rest / 2);
            scales = memcpy(tail_scales, scales, rest / 16);
        }
        int8_t low[32], high[32], pairs[STEP];
        nibbles(p, 0, 1, low);
        nibbles(p, 4, 1, high);
        for (int j = 0; in_order && j < 32; j++) {
            pairs[2 * j] = low[j];
            pairs[2 * j + 1] = high[j];
        }
        for (int block = 0; block < 4; block++) {
            floats scale = repeat(job->e4m3[scales[block]] * factor);
            w[2 * block] = widen(in_order ? pairs + 16 * block : low + LANES * block) * scale;
            w[2 * block + 1] = widen(in_order ? pairs + 16 * block + LANES : high + LANES * block) * scale;
        }
    } else if (format == FP8) {
        const uint8_t *p = job->weight + first;
        if (rest < STEP) p = memcpy(tail, p, rest);
        if (__builtin_expect(any_nan(p), 0)) {
            for (int i = 0; i < STEP; i++) w[i / LANES][i % LANES] = job->e4m3[p[i]] * 0x1p-8f * factor;
            return;
        }
        for (int i = 0; i < 8; i++) w[i] = e4m3_256th(p + LANES * i, job->e4m3) * factor;
    } else {
        const uint8_t *p = job->weight + output / 2 * job->num_inputs + column;
        if (rest < STEP) p = memcpy(tail, p, rest);
        int8_t codes[STEP];
        nibbles(p, output % 2 * 4, 0, codes);
        nibbles(p + 32, output % 2 * 4, 0, codes + 32);
        uint32_t group = job->group, last = job->num_inputs - 1;
        int64_t row = output * (job->num_inputs / job->group);
        float scale = 0;
        for (uint32_t i = 0; i < 8; i++) {
            uint32_t at = column + LANES * i < last ? column + LANES * i : last;
            if (i == 0 || group % STEP) scale = load_float(job->scales, row + at / group);
            w[i] = widen(codes + LANES * i) * scale;
        }
    }
}

INLINE void multiply_rows(
    const struct job *job, int format, int num_rows, int64_t row, int64_t first, int64_t last
) {
    const float *inputs = job->inputs + row * job->stride;
    float *outputs = (float *)job->outputs + row * job->num_outputs;
    for (int64_t output = first; output < last; output++) {
        floats total[MOST_ROWS][2] = {{{0}}};
        for (int64_t column = 0; column < job->num_inputs; column += STEP) {
            floats w[8];
            unpack_step(job, format, output, column, 1, 0, w);
            for (int r = 0; r < num_rows; r++)
                for (int i = 0; i < 8; i++)
                    total[r][i % 2] += w[i] * load_floats(inputs + r * job->stride + column + LANES * i);
        }
        for (int r = 0; r < num_rows; r++)
            outputs[r * job->num_outputs + output] = sum(total[r][0] + total[r][1]) * (job->scale * unit(format));
    }
}

INLINE void multiply_format(const struct job *job, int format, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= job->rows; row += 4) multiply_rows(job, format, 4, row, first, last);
    for (; row + 2 <= job->rows; row += 2) multiply_rows(job, format, 2, row, first, last);
    if (row < job->rows) multiply_rows(job, format, 1, row, first, last);
}

/* AWQ GEMM stores eight outputs of one input in a word: nibble i belongs to output AWQ_OUTPUTS[i] of the word. */
static const int AWQ_OUTPUTS[8] = {0, 2, 4, 6, 1, 3, 5, 7};

INLINE words load_words(const uint8_t *p, int64_t index, int64_t count) {
    words v = {0};
    if (count < LANES) memcpy(&v, p + 4 * index, 4 * count);
    else memcpy(&v, p + 4 * index, sizeof v);
    return v;
}

/* Add the products of `depth` inputs from `input` on with eight words of outputs to `total`. */
INLINE void multiply_words(
    const struct job *job, const float *inputs, int64_t input, int64_t depth, int64_t word, int64_t count,
    floats *total
) {
    int64_t num_words = job->num_outputs / 8;
    words zeros = load_words(job->zeros, input / job->group * num_words + word, count);
    ints zero[8];
    floats sums[8];
    for (int i = 0; i < 8; i++) {
        zero[i] = (ints)(zeros >> 4 * i & 15);
        sums[i] = total[i];
    }
    for (int64_t k = input; k < input + depth; k++) {
        words codes = load_words(job->weight, k * num_words + word, count);
        for (int i = 0; i < 8; i++)
            sums[i] += inputs[k] * __builtin_convertvector((ints)(codes >> 4 * i & 15) - zero[i], floats);
    }
    for (int i = 0; i < 8; i++) total[i] = sums[i];
}

/* A strip is at most STRIP words wide. Its inputs are taken DEPTH at a time, so that all of it stays in the cache. */
static void multiply_strip(const struct job *job, int64_t first, int64_t last) {
    int64_t num_words = job->num_outputs / 8, row_bytes = 4 * num_words;
    for (int64_t start = 0; start < job->num_inputs; start += job->group) {
        floats total[MOST_STRIP_ROWS][STRIP / LANES][8];
        memset(total, 0, job->rows * sizeof total[0]);
        int64_t end = start + job->group;
        for (int64_t input = start; input < end; input += DEPTH) {
            int64_t depth = end - input < DEPTH ? end - input : DEPTH;
            /* The rows of the next step lie on other pages, which the processor does not foresee. */
            for (int64_t k = input + DEPTH; k < input + 2 * DEPTH; k++)
                for (int64_t word = first; word < last; word += 16)
                    __builtin_prefetch(job->weight + k * row_bytes + 4 * word, 0, 2);
            for (int64_t row = 0; row < job->rows; row++) {
                const float *inputs = job->inputs + row * job->stride;
                int64_t word = first;
                for (; word + LANES <= last; word += LANES)
                    multiply_words(job, inputs, input, depth, word, LANES, total[row][(word - first) / LANES]);
                if (word < last)
                    multiply_words(job, inputs, input, depth, word, last - word, total[row][(word - first) / LANES]);
            }
        }
        for (int64_t row = 0; row < job->rows; row++)
            for (int64_t word = first; word < last; word++)
                for (int i = 0; i < 8; i++) {
                    int64_t output = 8 * word + AWQ_OUTPUTS[i];
                    float scale = load_float(job->scales, start / job->group * job->num_outputs + output);
                    ((float *)job->outputs)[row * job->num_outputs + output] +=
                        total[row][(word - first) / LANES][i][(word - first) % LANES] * scale;
                }
    }
}

/* Store as float32, or as bfloat16 rounded to the nearest, ties to even. */
INLINE void store(void *out, int bfloat16, floats values, int64_t count) {
    words bits = (words)values;
    if (bfloat16) {
        words is_nan = (words)((bits & 0x7FFFFFFF) > 0x7F800000);
        bits = ((bits + 0x7FFF + (bits >> 16 & 1)) & ~is_nan) | (0x7FC00000 & is_nan);
        halves upper = __builtin_convertvector(bits >> 16, halves);
        if (count < LANES) memcpy(out, &upper, 2 * count);
        else memcpy(out, &upper, sizeof upper);
    } else if (count < LANES) memcpy(out, &bits, 4 * count);
    else memcpy(out, &bits, sizeof bits);
}

INLINE void unpack_rows(const struct job *job, int format, int bfloat16, int64_t first, int64_t last) {
    int64_t num_inputs = job->num_inputs, size = bfloat16 ? 2 : 4;
    float factor = job->scale * unit(format);
    for (int64_t output = first; output < last; output++) {
        uint8_t *out = (uint8_t *)job->outputs + (output - job->first) * num_inputs * size;
        for (int64_t column = 0; column < num_inputs; column += STEP) {
            floats w[8];
            unpack_step(job, format, output, column, factor, 1, w);
            for (int i = 0; i < 8; i++) {
                int64_t rest = num_inputs - column - LANES * i;
                if (rest > 0) store(out + (column + LANES * i) * size, bfloat16, w[i], rest);
            }
        }
    }
}

/* Unpack inputs `start` to `end`, all of one group, of the eight outputs of a word. */
INLINE void unpack_word(const struct job *job, int bfloat16, int64_t start, int64_t end, int64_t word) {
    int64_t num_words = job->num_outputs / 8, row_bytes = 4 * num_words, size = bfloat16 ? 2 : 4;
    int64_t group = start / job->group;
    uint32_t zeros = load_word(job->zeros, group * num_words + word);
    const uint8_t *p = job->weight + start * row_bytes + 4 * word;
    floats scale[8];
    ints zero[8];
    uint8_t *out[8];
    for (int i = 0; i < 8; i++) {
        int64_t output = 8 * word + AWQ_OUTPUTS[i];
        scale[i] = repeat(load_float(job->scales, group * job->num_outputs + output));
        zero[i] = (ints){0} + (int32_t)(zeros >> 4 * i & 15);
        out[i] = (uint8_t *)job->outputs + ((output - 8 * job->first) * job->num_inputs + start) * size;
    }
    int64_t count = end - start, k = 0;
    for (; k + LANES <= count; k += LANES) {
        words codes;
        for (int j = 0; j < LANES; j++) codes[j] = load_word(p + (k + j) * row_bytes, 0);
        for (int i = 0; i < 8; i++) {
            floats w = __builtin_convertvector((ints)(codes >> 4 * i & 15) - zero[i], floats) * scale[i];
            store(out[i] + k * size, bfloat16, w, LANES);
        }
    }
    for (; k < count; k++) {
        words codes = (words){0} + load_word(p + k * row_bytes, 0);
        for (int i = 0; i < 8; i++) {
            floats w = __builtin_convertvector((ints)(codes >> 4 * i & 15) - zero[i], floats) * scale[i];
            store(out[i] + k * size, bfloat16, w, 1);
        }
    }
}

INLINE void unpack_strip(const struct job *job, int bfloat16, int64_t first, int64_t last) {
    int64_t row_bytes = 4 * (job->num_outputs / 8);
    for (int64_t start = 0; start < job->num_inputs; start += job->group)
        for (int64_t input = start; input < start + job->group; input += UNPACK_DEPTH) {
            int64_t end = input + UNPACK_DEPTH < start + job->group ? input + UNPACK_DEPTH : start + job->group;
            for (int64_t k = end; k < end + UNPACK_DEPTH; k++)
                for (int64_t word = first; word < last; word += 16)
                    __builtin_prefetch(job->weight + k * row_bytes + 4 * word, 0, 2);
            for (int64_t word = first; word < last; word++) unpack_word(job, bfloat16, input, end, word);
        }
}

INLINE void unpack_format(const struct job *job, int bfloat16, int64_t first, int64_t last) {
    if (job->format == NVFP4) unpack_rows(job, NVFP4, bfloat16, first, last);
    else if (job->format == FP8) unpack_rows(job, FP8, bfloat16, first, last);
    else if (job->format == W4A16_AWQ) unpack_rows(job, W4A16_AWQ, bfloat16, first, last);
    else unpack_strip(job, bfloat16, first, last);
}

static void multiply_part(const struct job *job, int64_t first, int64_t last) {
    if (job->format == NVFP4) multiply_format(job, NVFP4, first, last);
    else if (job->format == FP8) multiply_format(job, FP8, first, last);
    else if (job->format == W4A16_AWQ) multiply_format(job, W4A16_AWQ, first, last);
    else multiply_strip(job, first, last);
}

static void unpack_part(const struct job *job, int64_t first, int64_t last) {
    if (job->bfloat16) unpack_format(job, 1, first, last);
    else unpack_format(job, 0, first, last);
}

/* Take and compute parts until none is left. Every thread runs this. */
INLINE void work(struct job *job, void (*part)(const struct job *, int64_t, int64_t)) {
    for (;;) {
        int64_t first = __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED);
        if (first >= job->last) return;
        part(job, first, first + job->chunk < job->last ? first + job->chunk : job->last);
    }
}

static void multiply_work(void *job) { work(job, multiply_part); }
static void unpack_work(void *job) { work(job, unpack_part); }

/* `team` is GOMP_parallel of torch's OpenMP: it runs a function in `num_threads` threads and waits for them. */
typedef void (*team_type)(void (*)(void *), void *, unsigned, unsigned);

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif
EXPORT void run(struct job *job, int unpacks, team_type team, unsigned num_threads) {
    void (*function)(void *) = unpacks ? unpack_work : multiply_work;
    if (team && num_threads > 1) team(function, job, num_threads, 0);
    else function(job);
}
"""


class _Job(ctypes.Structure):
    """`struct job` of the C code."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "zeros", "e4m3", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("format", "rows", "stride", "num_inputs", "num_outputs", "group")),
        *((name, ctypes.c_int64) for name in ("first", "last", "chunk", "bfloat16")),
        ("scale", ctypes.c_float),
        ("next", ctypes.c_int64),
    )


@functools.cache
def _e4m3_values() -> torch.Tensor:
    """The float32 value of each byte of E4M3, `(256,)`."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


@functools.cache
def _library() -> tuple[Callable[..., None], ctypes.c_void_p] | None:
    """Return the C code's `run` and torch's `GOMP_parallel`, None if the code cannot run. The first call tries it."""
    try:
        library = load_library(SOURCE)
        team = _openmp_team()
        _check(library.run, team)
    except (OSError, RuntimeError) as error:
        logger.warning(
            f"Products with packed weights take the slow way of plain torch on this CPU, because {error!s:.500} "
            f"{INSTALL_HINT}"
        )
        return None
    return library.run, team


def _openmp_team() -> ctypes.c_void_p:
    """Find GOMP_parallel in torch's OpenMP library, so that both share its threads; null if there is none."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            return ctypes.cast(getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None), ctypes.c_void_p)
    return ctypes.c_void_p()


def _check(run: Callable[..., None], team: ctypes.c_void_p) -> None:
    """Compare a product with torch's.

    Raises:
        RuntimeError: if they differ.
    """
    weight = torch.arange(STEP, dtype=torch.uint8, device="cpu").view(1, STEP).view(torch.float8_e4m3fn)
    inputs = torch.arange(STEP, dtype=torch.float32, device="cpu").view(1, STEP)
    outputs = torch.zeros(1, 1, device="cpu")
    _run((run, team), "FP8", (weight, None, None, torch.tensor(0.5)), outputs, range(1), inputs)
    expected = inputs @ weight.float().t() / 2
    if not torch.allclose(outputs, expected):
        raise RuntimeError(f"the compiled code computes {outputs.item()} instead of {expected.item()}.")


def _num_threads() -> int:
    """As many threads as torch uses; one in a forked process, which has lost the threads of OpenMP."""
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


# The weight, the scales of its groups, their zero points, and one scale for all of it, for the C code.
Operands = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _operands(format_name: str, tensors: Mapping[str, torch.Tensor]) -> Operands:
    """Sort the stored tensors of a layer; `quantization_nemotron_vl.FORMATS` describes the layouts."""
    if format_name == "AWQ GEMM":
        return tensors["qweight"], tensors["scales"], tensors["qzeros"], None
    if format_name == "NVFP4":
        return tensors["weight"], tensors["weight_scale"], None, tensors["weight_scale_2"]
    if format_name == "FP8":
        return tensors["weight"], None, None, tensors["weight_scale"]
    return tensors["weight"], tensors["weight_scale"], None, None


def _sizes(format_name: str, weight: torch.Tensor) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    if format_name == "AWQ GEMM":
        return 8 * weight.shape[1], weight.shape[0]
    outputs_per_row, inputs_per_byte = {"NVFP4": (1, 2), "FP8": (1, 1), "W4A16_AWQ": (2, 1)}[format_name]
    return outputs_per_row * weight.shape[0], inputs_per_byte * weight.shape[1]


def _run(
    library: tuple[Callable[..., None], ctypes.c_void_p],
    format_name: str,
    operands: Operands,
    outputs: torch.Tensor,
    span: range,
    inputs: torch.Tensor | None = None,
) -> None:
    """Run the C code: a product with `inputs`, or without them an unpacking of the outputs in `span`.

    Args:
        library: see `_library`.
        format_name: one of FORMATS.
        operands: see `_operands`.
        outputs: contiguous, filled with the result; with zeros before a product in AWQ GEMM.
        span: outputs to compute.
        inputs: `(rows, stride)` float32 as the C code wants them.
    """
    weight, scales, zeros, scale = operands
    num_outputs, num_inputs = _sizes(format_name, weight)
    per_word, group = 1, num_inputs
    kept = [tensor.contiguous() if tensor is not None else None for tensor in (weight, scales, zeros)]
    if format_name in ("W4A16_AWQ", "AWQ GEMM"):
        group = num_inputs // scales.shape[format_name == "W4A16_AWQ"]
        kept[1] = kept[1].float()
    if format_name == "AWQ GEMM":
        per_word = 8
    num_threads = _num_threads()
    chunk = max(1, WEIGHTS_PER_TASK // (per_word * num_inputs))
    if per_word == 8:  # a strip of 64 words reads whole pages best, narrower ones keep more threads busy
        chunk = 64 if len(span) // 8 >= 64 * 4 * num_threads or num_threads == 1 else 16
    pointers = [tensor.data_ptr() if tensor is not None else None for tensor in kept]
    job = _Job(
        *pointers,
        _e4m3_values().data_ptr(),
        inputs.data_ptr() if inputs is not None else None,
        outputs.data_ptr(),
        FORMATS.index(format_name),
        *(inputs.shape if inputs is not None else (0, 0)),
        *(num_inputs, num_outputs, group),
        *(span.start // per_word, span.stop // per_word, chunk),
        outputs.dtype == torch.bfloat16,
        1.0 if scale is None else scale.item(),
        span.start // per_word,
    )
    run, team = library
    run(ctypes.byref(job), inputs is None, team, num_threads)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has bytes in main memory: it is not fake, not a subclass, not on another device."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def _suits(format_name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the C code can read a weight."""
    if format_name not in FORMATS:
        return False
    weight, scales, _, _ = _operands(format_name, tensors)
    if weight.device.type != "cpu" or weight.numel() == 0:
        return False
    return format_name != "W4A16_AWQ" or weight.shape[1] // scales.shape[1] % 8 == 0


def runs_on_cpu() -> bool:
    """Say whether the C code runs here. The first call compiles it, unless the cache has it."""
    return _library() is not None


def has_product(format_name: str, inputs: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Say whether `multiply_on_cpu` can compute this product, and is the faster way."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype in DTYPES
        and _suits(format_name, tensors)
        and 0 < inputs.shape[:-1].numel() <= MAX_ROWS[format_name]
        and (torch.compiler.is_compiling() or _library() is not None)  # what compiles a graph compiles C as well
    )


def multiply_on_cpu(format_name: str, inputs: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute `inputs @ weight.T`: exact products, sums in float32, one rounding to the dtype of the inputs.

    Args:
        format_name: one of FORMATS.
        inputs: `(..., in_features)` in one of DTYPES.
        tensors: the stored tensors of the layer.

    Returns:
        `(..., out_features)` in the dtype of the inputs.

    Raises:
        RuntimeError: if the C code cannot run here, see `has_product`.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    direct = _is_plain(inputs) and not torch.compiler.is_compiling()
    multiply = _multiply if direct else _multiply_as_operator
    outputs = multiply(rows, format_name, *_operands(format_name, tensors), tensors.get("pre_quant_scale"))
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def _multiply(
    rows: torch.Tensor,
    format_name: str,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    scale: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
) -> torch.Tensor:
    library = _library()
    if library is None:
        raise RuntimeError(f"Packed weights in a compiled graph need a C compiler on a CPU. {INSTALL_HINT}")
    num_outputs, num_inputs = _sizes(format_name, weight)
    inputs = rows.float()
    if pre_quant_scale is not None:
        inputs = inputs * pre_quant_scale.float()
    if format_name == "NVFP4":
        inputs = inputs.unflatten(1, (-1, 8, 2)).transpose(2, 3).reshape(len(rows), num_inputs)
    if format_name != "AWQ GEMM" and num_inputs % STEP:
        inputs = torch.nn.functional.pad(inputs, (0, -num_inputs % STEP))
    outputs = torch.zeros(len(rows), num_outputs, dtype=torch.float32, device="cpu")
    operands = (weight, scales, zeros, scale)
    _run(library, format_name, operands, outputs, range(num_outputs), inputs.contiguous())
    return outputs.to(rows.dtype)


# torch.compile sees one operator with a known shape. Plain calls avoid its overhead.
_multiply_as_operator = torch.library.custom_op("nemotron_vl::multiply_packed_on_cpu", _multiply, mutates_args=())


@_multiply_as_operator.register_fake
def _(
    rows: torch.Tensor,
    format_name: str,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    scale: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
) -> torch.Tensor:
    return rows.new_empty(len(rows), _sizes(format_name, weight)[0])


def unpack_on_cpu(
    format_name: str,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    span: range,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Compute some rows of a weight, the same numbers as `Format.decode` does.

    Args:
        format_name: of the weight.
        tensors: the stored tensors of the layer.
        dtype: of the result.
        span: the outputs whose weights are wanted; in AWQ GEMM, multiples of 8.
        out: an earlier result of the same shape and dtype that may be overwritten. New memory costs page faults.

    Returns:
        `(len(span), in_features)`, None where the C code cannot do it.
    """
    if torch.compiler.is_compiling() or dtype not in DTYPES or not _suits(format_name, tensors):
        return None
    if not all(map(_is_plain, tensors.values())) or (library := _library()) is None:
        return None
    operands = _operands(format_name, tensors)
    num_inputs = _sizes(format_name, operands[0])[1]
    pre_quant_scale = tensors.get("pre_quant_scale")
    direct = torch.bfloat16 if dtype == torch.bfloat16 and pre_quant_scale is None else torch.float32
    reused = out is not None and out.dtype == direct
    weight = out if reused else torch.empty(len(span), num_inputs, dtype=direct, device="cpu")
    _run(library, format_name, operands, weight, span)
    return (weight if pre_quant_scale is None else weight * pre_quant_scale.float()).to(dtype)
