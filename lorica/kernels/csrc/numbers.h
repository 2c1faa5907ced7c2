/* What all sources here work with: types of numbers and the ways between them, vectors, and tables of 16 numbers. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define SIMD 512
#else
#define SIMD 256
#endif
#else
#define SIMD 0
#endif
#define LANES (SIMD ? SIMD / 32 : 4) /* floats in a vector */

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { STEP = 64 };                     /* elements that the vector loops take at once */
enum { SMALL = 1 << 14 };               /* below this many elements a second thread costs more than it brings */
/* Outputs of this size leave the caches anyway: written past them, a line is not read before it is written. */
static const int64_t STREAM_BYTES = (int64_t)24 << 20;

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef float unaligned_floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* Loops over the rows of a tile: unrolled, so that their accumulators are registers. */
#define UNROLLED _Pragma("GCC unroll 4")
#define INLINE inline __attribute__((always_inline))

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ------------------------------------------------------------------ one number from one type to another */

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t nearest_even = bits + 0x7fff + ((bits >> 16) & 1);
    return x == x ? nearest_even >> 16 : 0x7fc0;
}

/* Adding 1/2 to a subnormal rounds away the bits that do not fit; the others are rounded as integers. */
static uint16_t to_float16(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
    float size = float_of(bits & 0x7fffffff);
    if (size != size) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | (uint16_t)(bits_of(size + 0.5f) - bits_of(0.5f)); /* subnormal: steps of 2^-24 */
    uint32_t magnitude = bits_of(size);
    return sign | (uint16_t)((magnitude + 0xfff + (magnitude >> 13 & 1) - ((127 - 15) << 23)) >> 13);
}

static float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13);
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f)); /* exact, subnormals included */
}

/* ------------------------------------------------------------------ many numbers from one type to another */

static void load(float *to, const void *from, int type, int64_t start, int64_t count) {
    if (type == FLOAT32) {
        memcpy(to, (const float *)from + start, 4 * count);
    } else if (type == BFLOAT16) {
        const uint16_t *halves = (const uint16_t *)from + start;
        for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)halves[i] << 16);
    } else {
        const uint16_t *halves = (const uint16_t *)from + start;
        int64_t i = 0;
#if SIMD
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
        for (; i < count; i++) to[i] = from_float16(halves[i]);
    }
}

static void store(void *to, int type, int64_t index, float x) {
    if (type == FLOAT32) ((float *)to)[index] = x;
    else if (type == BFLOAT16) ((uint16_t *)to)[index] = to_bfloat16(x);
    else ((uint16_t *)to)[index] = to_float16(x);
}

static void save(void *to, int type, int64_t start, const float *from, int64_t count) {
    if (type == FLOAT32) {
        memcpy((float *)to + start, from, 4 * count);
    } else if (type == BFLOAT16) {
        uint16_t *halves = (uint16_t *)to + start;
        for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
    } else {
        uint16_t *halves = (uint16_t *)to + start;
        int64_t i = 0;
#if SIMD
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128((__m128i *)(halves + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < count; i++) halves[i] = to_float16(from[i]);
    }
}

/* ------------------------------------------------------------------ functions of vectors */

/* Where the mask is set a, else b. */
static inline floats choose(integers mask, floats a, floats b) {
    return (floats)((mask & (integers)a) | (~mask & (integers)b));
}

static inline float sum_of(floats vector) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += vector[i];
    return sum;
}

/* 2^x for x <= 0, to 1e-7 of the result; 0 below the smallest normal number. */
static inline floats exp2_of(floats x) {
    const float magic = 0x1.8p23f; /* adding it rounds to a whole number, which stands in the last bits */
    const integers small = x <= -126.0f; /* not set for a NaN, which stays one */
    const floats low = choose(small, (floats){0} - 126.0f, x);
    const floats shifted = low + magic, f = low - (shifted - magic);
    const floats power = (floats)(((integers)shifted - (int32_t)bits_of(magic) + 127) << 23);
    /* The polynomial nearest to 2^f for |f| <= 1/2. */
    floats y = f * 1.54352254e-4f + 1.33999557e-3f;
    y = y * f + 9.61804048e-3f;
    y = y * f + 5.55032795e-2f;
    y = y * f + 2.40226509e-1f;
    y = y * f + 6.93147182e-1f;
    y = y * f + 1.0f;
    return choose(small, (floats){0}, y * power);
}

/* The largest |x|. As integers, a float's bits without the sign order as the floats do, and NaN above all: it wins. */
static float largest(const float *x, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t size = bits_of(x[i]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    return float_of(most);
}

/* ------------------------------------------------------------------ tables of 16 numbers */

static uint8_t code_at(const uint8_t *codes, int64_t index) {
    return index % 2 ? codes[index / 2] & 15 : codes[index / 2] >> 4;
}

/* A table of 16 floats, and the lookup of 2 * LANES codes in it: the even elements and the odd ones. */
#if SIMD == 512
typedef struct { __m512 values; } Table;

static inline Table table_of(const float *values, float scale) {
    return (Table){_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale))};
}

static inline void lookup_floats(Table table, const uint8_t *codes, floats *even, floats *odd) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    *even = (floats)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table.values); /* takes the low 4 bits */
    *odd = (floats)_mm512_permutexvar_ps(bytes, table.values);
}
#elif SIMD == 256
typedef struct { __m256 low, high; } Table;

static inline Table table_of(const float *values, float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    return (Table){_mm256_mul_ps(_mm256_loadu_ps(values), factor), _mm256_mul_ps(_mm256_loadu_ps(values + 8), factor)};
}

/* vpermps takes the low 3 bits of an index; the fourth, shifted to the sign, picks between the halves of the table. */
static inline __m256 lookup_eight(Table table, __m256i index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

static inline void lookup_floats(Table table, const uint8_t *codes, floats *even, floats *odd) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    *even = (floats)lookup_eight(table, _mm256_srli_epi32(bytes, 4));
    *odd = (floats)lookup_eight(table, bytes);
}
#else
typedef struct { float values[16]; } Table;

static inline Table table_of(const float *values, float scale) {
    Table table;
    for (int i = 0; i < 16; i++) table.values[i] = values[i] * scale;
    return table;
}

static inline void lookup_floats(Table table, const uint8_t *codes, floats *even, floats *odd) {
    for (int i = 0; i < LANES; i++) {
        (*even)[i] = table.values[codes[i] >> 4];
        (*odd)[i] = table.values[codes[i] & 15];
    }
}
#endif
