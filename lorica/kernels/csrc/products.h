/* Products of few rows: y[r, o] = sum over i of x[r, i] w[o, i], where w is read once, as it is stored.
 *
 * A weight in codes becomes float32 in registers only, where it meets x; up to TILE rows of x share that. Scales that
 * are quantised themselves are read as they are too. In 4 bits there are three ways:
 *   any shape        elements looked up one by one, since a row may begin in the middle of a byte;
 *   in % 32 == 0     vectors of float32;
 *   AVX2, 16-bit x   vectors of int16 (below), three times as fast, because AVX2 has no quick lookup of floats.
 */
#pragma once

#include "numbers.h"

enum { TILE = 4 };
enum { NESTED = 256 }; /* scales in a block of scales */
enum { GROUP = 16 }; /* outputs that meet a tile of x while it lies in the first cache */

typedef struct {
    const void *codes, *absmax;
    const float *codebook;
    int64_t inputs, outputs;
    int shift; /* log2 of the block size */
    /* Where absmax is quantised itself, in 8 bits: the absmax of its blocks, its levels and its offset. Else NULL. */
    const float *nested, *levels, *offset;
} Weight;

static inline float scale_of(const Weight *w, int64_t block) {
    if (!w->nested) return ((const float *)w->absmax)[block];
    const float scale = w->levels[((const uint8_t *)w->absmax)[block]] * w->nested[block / NESTED];
    return scale + *w->offset;
}

static inline floats multiply_add(floats a, floats b, floats c) {
#if SIMD == 512
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SIMD == 256
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* x: `rows` rows of float32. */
static void dot_any(const Weight *w, int64_t output, const float *x, int rows, float *sums) {
    for (int r = 0; r < rows; r++) sums[r] = 0;
    for (int64_t i = 0; i < w->inputs; i++) {
        const int64_t index = output * w->inputs + i;
        const float value = w->codebook[code_at(w->codes, index)] * scale_of(w, index >> w->shift);
        for (int r = 0; r < rows; r++) sums[r] += value * x[r * w->inputs + i];
    }
}

/* x: rows of float32 in which, of every 2 * LANES elements, the even ones stand before the odd ones. */
static INLINE void dot_floats_of(const Weight *w, int64_t output, const float *x, const int rows, float *sums) {
    const int64_t begin = output * w->inputs;
    floats total[TILE];
    UNROLLED for (int r = 0; r < rows; r++) total[r] = (floats){0};
    for (int64_t i = 0; i < w->inputs;) {
        const int64_t block = (begin + i) >> w->shift;
        const int64_t end = smaller(w->inputs, ((block + 1) << w->shift) - begin);
        const Table table = table_of(w->codebook, scale_of(w, block));
        for (; i < end; i += 2 * LANES) {
            floats even, odd;
            lookup_floats(table, (const uint8_t *)w->codes + (begin + i) / 2, &even, &odd);
            UNROLLED for (int r = 0; r < rows; r++) {
                const unaligned_floats *here = (const unaligned_floats *)(x + r * w->inputs + i);
                total[r] = multiply_add(even, here[0], total[r]);
                total[r] = multiply_add(odd, here[1], total[r]);
            }
        }
    }
    UNROLLED for (int r = 0; r < rows; r++) sums[r] = sum_of(total[r]);
}

static void dot_floats(const Weight *w, int64_t output, const float *x, int rows, float *sums) {
    switch (rows) { /* constants, so that the accumulators are registers */
    case 1: dot_floats_of(w, output, x, 1, sums); break;
    case 2: dot_floats_of(w, output, x, 2, sums); break;
    case 3: dot_floats_of(w, output, x, 3, sums); break;
    default: dot_floats_of(w, output, x, 4, sums);
    }
}

static void deal_floats(float *x, int64_t count) {
    float copy[2 * LANES];
    for (int64_t start = 0; start < count; start += 2 * LANES) {
        memcpy(copy, x + start, sizeof copy);
        for (int i = 0; i < LANES; i++) {
            x[start + i] = copy[2 * i];
            x[start + LANES + i] = copy[2 * i + 1];
        }
    }
}

#if SIMD == 256
/* In int16, for x of 16 bits. Each STEP elements of x become integers of 14 bits and a power of two (what lies within a
 * factor of 64 of the largest stays exact in bfloat16), the codebook integers of 14 bits and one factor: both errors
 * are below 2^-14 of the largest, a hundredth of bfloat16's rounding of the result. vpmaddwd then multiplies 16 pairs
 * and adds two by two; four of them stay below 2^31. A NaN or an infinity in x makes its row NaN. */
enum { UNIT = 16383 };

typedef struct {
    int16_t *values; /* [rows, inputs], in the order in which the lookup gives the codes */
    float *scales;   /* [rows, inputs / STEP] */
} Integers;

static void to_integers(const float *x, int64_t count, int16_t *values, float *scales) {
    for (int64_t start = 0; start < count; start += STEP) {
        const float most = largest(x + start, STEP);
        int exponent = 0;
        if (isfinite(most)) frexpf(most, &exponent);
        exponent = exponent < -110 ? -110 : exponent;
        const float factor = ldexpf(1.0f, 14 - exponent);
        scales[start / STEP] = isfinite(most) ? ldexpf(1.0f, exponent - 14) : NAN;
        for (int i = 0; i < STEP; i++) {
            /* Byte b holds elements 2b and 2b + 1. First bytes 0-7 and 16-23, then 8-15 and 24-31; even, then odd. */
            const int byte = i / 2, place = (byte & 7) + (byte & 16) / 2 + (byte & 8) * 2 + i % 2 * 32;
            values[start + place] = isfinite(most) ? (int16_t)lrintf(x[start + i] * factor) : 0;
        }
    }
}

static INLINE void dot_integers_of(const Weight *w, int64_t output, Integers x, const int rows, __m256i low,
                                   __m256i high, float unit, float *sums) {
    const int64_t begin = output * w->inputs, steps = w->inputs / STEP;
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 total[TILE];
    UNROLLED for (int r = 0; r < rows; r++) total[r] = _mm256_setzero_ps();
    for (int64_t step = 0; step < steps; step++) {
        const int64_t index = begin + step * STEP;
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)((const uint8_t *)w->codes + index / 2));
        const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        const __m256i odd = _mm256_and_si256(bytes, nibble);
        const __m256i even_low = _mm256_shuffle_epi8(low, even), even_high = _mm256_shuffle_epi8(high, even);
        const __m256i odd_low = _mm256_shuffle_epi8(low, odd), odd_high = _mm256_shuffle_epi8(high, odd);
        const __m256i weights[4] = {
            _mm256_unpacklo_epi8(even_low, even_high), _mm256_unpackhi_epi8(even_low, even_high),
            _mm256_unpacklo_epi8(odd_low, odd_high), _mm256_unpackhi_epi8(odd_low, odd_high)};
        const float scale = scale_of(w, index >> w->shift) * unit;
        UNROLLED for (int r = 0; r < rows; r++) {
            const __m256i *here = (const __m256i *)(x.values + r * w->inputs + step * STEP);
            const __m256i first = _mm256_add_epi32(_mm256_madd_epi16(weights[0], _mm256_loadu_si256(here)),
                                                   _mm256_madd_epi16(weights[1], _mm256_loadu_si256(here + 1)));
            const __m256i second = _mm256_add_epi32(_mm256_madd_epi16(weights[2], _mm256_loadu_si256(here + 2)),
                                                    _mm256_madd_epi16(weights[3], _mm256_loadu_si256(here + 3)));
            const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(first, second));
            total[r] = _mm256_fmadd_ps(sum, _mm256_set1_ps(scale * x.scales[r * steps + step]), total[r]);
        }
    }
    UNROLLED for (int r = 0; r < rows; r++) sums[r] = sum_of((floats)total[r]);
}

static void multiply_integers(const Weight *w, const float *x, int64_t rows, void *y, int type, int threads) {
    const int64_t steps = w->inputs / STEP;
    int16_t *values = malloc(2 * rows * w->inputs);
    float *scales = malloc(4 * rows * steps);
    for (int64_t r = 0; r < rows; r++)
        to_integers(x + r * w->inputs, w->inputs, values + r * w->inputs, scales + r * steps);
    const float most = largest(w->codebook, 16), unit = most / UNIT;
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) {
        const int16_t level = (int16_t)lrintf(w->codebook[i] / most * UNIT);
        bytes[0][i] = (uint8_t)level, bytes[1][i] = (uint8_t)((uint16_t)level >> 8);
    }
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[0]));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[1]));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < w->outputs; group += GROUP) {
        for (int64_t r = 0; r < rows; r += TILE) {
            const Integers tile = {values + r * w->inputs, scales + r * steps};
            const int here = (int)smaller(TILE, rows - r);
            for (int64_t output = group; output < smaller(group + GROUP, w->outputs); output++) {
                float sums[TILE];
                switch (here) {
                case 1: dot_integers_of(w, output, tile, 1, low, high, unit, sums); break;
                case 2: dot_integers_of(w, output, tile, 2, low, high, unit, sums); break;
                case 3: dot_integers_of(w, output, tile, 3, low, high, unit, sums); break;
                default: dot_integers_of(w, output, tile, 4, low, high, unit, sums);
                }
                for (int t = 0; t < here; t++) store(y, type, (r + t) * w->outputs + output, sums[t]);
            }
        }
    }
    free(values);
    free(scales);
}
#endif

/* In 8 bits, for evenly spaced levels: a code is a number already. x: rows of float32. */
static INLINE void numbers_at(const uint8_t *codes, floats numbers[2]) { /* code - 128: the highest bit turned over */
#if SIMD == 512
    const __m256i bytes = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)codes), _mm256_set1_epi8(-128));
    numbers[0] = (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    numbers[1] = (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
#elif SIMD == 256
    const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)codes), _mm_set1_epi8(-128));
    numbers[0] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    numbers[1] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
#else
    float values[2 * LANES];
    for (int i = 0; i < 2 * LANES; i++) values[i] = (float)(codes[i] - 128);
    memcpy(numbers, values, sizeof values);
#endif
}

static INLINE void dot_numbers_of(const Weight *w, int64_t output, const float *x, const int rows, float *sums) {
    const int64_t begin = output * w->inputs;
    floats total[TILE];
    UNROLLED for (int r = 0; r < rows; r++) total[r] = (floats){0};
    for (int64_t i = 0; i < w->inputs;) {
        const int64_t block = (begin + i) >> w->shift;
        const int64_t end = smaller(w->inputs, ((block + 1) << w->shift) - begin);
        floats sum[TILE][2];
        UNROLLED for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (floats){0};
        for (; i < end; i += 2 * LANES) {
            floats numbers[2];
            numbers_at((const uint8_t *)w->codes + begin + i, numbers);
            UNROLLED for (int r = 0; r < rows; r++) {
                const unaligned_floats *here = (const unaligned_floats *)(x + r * w->inputs + i);
                sum[r][0] = multiply_add(numbers[0], here[0], sum[r][0]);
                sum[r][1] = multiply_add(numbers[1], here[1], sum[r][1]);
            }
        }
        const floats scale = scale_of(w, block) / 127.0f - (floats){0};
        UNROLLED for (int r = 0; r < rows; r++) total[r] = multiply_add(sum[r][0] + sum[r][1], scale, total[r]);
    }
    UNROLLED for (int r = 0; r < rows; r++) sums[r] = sum_of(total[r]);
}

static void dot_numbers(const Weight *w, int64_t output, const float *x, int rows, float *sums) {
    switch (rows) {
    case 1: dot_numbers_of(w, output, x, 1, sums); break;
    case 2: dot_numbers_of(w, output, x, 2, sums); break;
    case 3: dot_numbers_of(w, output, x, 3, sums); break;
    default: dot_numbers_of(w, output, x, 4, sums);
    }
}

typedef void Dot(const Weight *w, int64_t output, const float *x, int rows, float *sums);

static void multiply(Dot *dot, const Weight *w, const float *x, int64_t rows, void *y, int type, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < w->outputs; group += GROUP) {
        for (int64_t r = 0; r < rows; r += TILE) {
            const int here = (int)smaller(TILE, rows - r);
            for (int64_t output = group; output < smaller(group + GROUP, w->outputs); output++) {
                float sums[TILE];
                dot(w, output, x + r * w->inputs, here, sums);
                for (int t = 0; t < here; t++) store(y, type, (r + t) * w->outputs + output, sums[t]);
            }
        }
    }
}

/* x [rows, inputs] and y [rows, outputs] of `type`; nested, levels and offset: as in Weight. 1: done. */
int lorica_linear_4bit(const void *x, int type, int64_t rows, int64_t inputs, int64_t outputs, const uint8_t *codes,
                       const void *absmax, const float *codebook, int64_t blocksize, void *y, int threads,
                       const float *nested, const float *levels, const float *offset) {
    const Weight w = {codes, absmax, codebook, inputs, outputs, __builtin_ctzll(blocksize), nested, levels, offset};
    float *wide = malloc(4 * rows * inputs);
    load(wide, x, type, 0, rows * inputs);
    threads = inputs * outputs < SMALL ? 1 : threads;
#if SIMD == 256
    if (type != FLOAT32 && inputs % STEP == 0 && blocksize % STEP == 0) {
        multiply_integers(&w, wide, rows, y, type, threads);
        free(wide);
        return 1;
    }
#endif
    if (inputs % 32 == 0) {
        deal_floats(wide, rows * inputs);
        multiply(dot_floats, &w, wide, rows, y, type, threads);
    } else {
        multiply(dot_any, &w, wide, rows, y, type, threads);
    }
    free(wide);
    return 1;
}

/* The same in 8 bits. 0, with nothing done: for other levels than (code - 128) / 127, and for inputs % 32 != 0. */
int lorica_linear_8bit(const void *x, int type, int64_t rows, int64_t inputs, int64_t outputs, const uint8_t *codes,
                       const void *absmax, const float *codebook, int64_t blocksize, void *y, int threads,
                       const float *nested, const float *levels, const float *offset) {
    const Weight w = {codes, absmax, codebook, inputs, outputs, __builtin_ctzll(blocksize), nested, levels, offset};
    if (inputs % 32) return 0;
    for (int code = 0; code < 256; code++)
        if (codebook[code] != (float)(code - 128) / 127.0f) return 0;
    float *wide = malloc(4 * rows * inputs);
    load(wide, x, type, 0, rows * inputs);
    multiply(dot_numbers, &w, wide, rows, y, type, inputs * outputs < SMALL ? 1 : threads);
    free(wide);
    return 1;
}
