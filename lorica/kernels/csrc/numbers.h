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
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float unaligned_floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* Loops over the rows of a tile: unrolled, so that their accumulators are registers. */
#define UNROLLED _Pragma("GCC unroll 4")
#define INLINE inline __attribute__((always_inline))
#define LOG2_E 1.44269504f

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

/* Where the mask is set a, else b. */
static inline floats choose(integers mask, floats a, floats b) {
#if SIMD == 512
    return (floats)_mm512_ternarylogic_epi32((__m512i)mask, (__m512i)a, (__m512i)b, 0xca);
#elif SIMD == 256
    return (floats)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (floats)((mask & (integers)a) | (~mask & (integers)b));
#endif
}

/* ------------------------------------------------------------------ a vector from one type to another */

/* LANES elements from the i-th on, of a type that is a constant where it is called. */
static INLINE floats floats_at(const void *from, int64_t i, const int type) {
    if (type == FLOAT32) return *(const unaligned_floats *)((const float *)from + i);
    const uint16_t *halves = (const uint16_t *)from + i;
#if SIMD == 512
    const __m256i words = _mm256_loadu_si256((const __m256i *)halves);
    if (type == FLOAT16) return (floats)_mm512_cvtph_ps(words);
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
#elif SIMD == 256
    const __m128i words = _mm_loadu_si128((const __m128i *)halves);
    if (type == FLOAT16) return (floats)_mm256_cvtph_ps(words);
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
#else
    float values[LANES];
    load(values, halves, type, 0, LANES);
    return *(const unaligned_floats *)values;
#endif
}

/* bfloat16's nearest to each x, in the upper half of a word; below it lie bits of no meaning. A NaN stays one. */
static INLINE words to_bfloat16s(floats x) {
    const words nearest = (words)x + 0x7fff + ((words)x >> 16 & 1);
    return (words)choose(x == x, (floats)nearest, (floats)((words){0} + 0x7fc00000));
}

/* `floats_at`, the other way. */
static INLINE void put_floats(void *to, int64_t i, const int type, floats x) {
    if (type == FLOAT32) {
        *(unaligned_floats *)((float *)to + i) = x;
        return;
    }
    uint16_t *halves = (uint16_t *)to + i;
#if SIMD == 512
    const __m512i shifted = _mm512_srli_epi32((__m512i)to_bfloat16s(x), 16);
    const __m256i narrow = type == FLOAT16 ? _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)
                                           : _mm512_cvtepi32_epi16(shifted);
    _mm256_storeu_si256((__m256i *)halves, narrow);
#elif SIMD == 256
    const __m256i shifted = _mm256_srli_epi32((__m256i)to_bfloat16s(x), 16);
    const __m128i narrow = type == FLOAT16 ? _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)
                                           : _mm_packus_epi32(_mm256_castsi256_si128(shifted),
                                                              _mm256_extracti128_si256(shifted, 1));
    _mm_storeu_si128((__m128i *)halves, narrow);
#else
    save(halves, type, 0, (const float *)&x, LANES);
#endif
}

/* What is left behind the last whole vector passes through a buffer, zeros behind it. */
static __attribute__((noinline, unused)) floats read_rest(const void *from, int type, int64_t i, int64_t count) {
    floats rest = {0};
    load((float *)&rest, from, type, i, count);
    return rest;
}

static __attribute__((noinline, unused)) void put_rest(void *to, int type, int64_t i, floats x, int64_t count) {
    save(to, type, i, (const float *)&x, count);
}

/* A vector from the i-th element on, of which `left` are there. */
static INLINE floats read_at(const void *from, int type, int64_t i, int64_t left) {
    return left >= LANES ? floats_at(from, i, type) : read_rest(from, type, i, left);
}

static INLINE void put_at(void *to, int type, int64_t i, floats x, int64_t left) {
    if (left >= LANES) put_floats(to, i, type, x);
    else put_rest(to, type, i, x, left);
}

/* ------------------------------------------------------------------ functions of vectors */

static inline float sum_of(floats vector) {
#if SIMD == 512
    return _mm512_reduce_add_ps((__m512)vector);
#elif SIMD == 256
    /* One half onto the other until one is left. */
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)vector), _mm256_extractf128_ps((__m256)vector, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += vector[i];
    return sum;
#endif
}

/* x, but at least `low` and at most `high`; a NaN stays one. */
static inline floats between(floats x, float low, float high) {
#if SIMD == 512
    return (floats)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#elif SIMD == 256
    return (floats)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)x));
#else
    const floats above = choose(x < low, (floats){0} + low, x);
    return choose(above > high, (floats){0} + high, above);
#endif
}

/* 2^x as *whole (1 + *rest y), for the y that is returned: a power of 2, and 2^f - 1 = f y for |f| <= 1/2. */
static INLINE floats exp2_parts(floats x, floats *whole, floats *rest) {
    const float magic = 0x1.8p23f; /* adding it rounds to a whole number, which stands in the last bits */
    const floats shifted = x + magic, f = x - (shifted - magic);
    *whole = (floats)(((integers)shifted << 23) + (127 << 23));
    *rest = f;
    /* The polynomial nearest to (2^f - 1) / f. */
    floats y = f * 1.54352254e-4f + 1.33999557e-3f;
    y = y * f + 9.61804048e-3f;
    y = y * f + 5.55032795e-2f;
    y = y * f + 2.40226509e-1f;
    return y * f + 6.93147182e-1f;
}

/* 2^x for |x| <= 126, to 1e-7 of the result. */
static INLINE floats exp2_within(floats x) {
    floats whole, rest;
    const floats y = exp2_parts(x, &whole, &rest);
    return (y * rest + 1.0f) * whole;
}

/* 2^x for x <= 0; 0 from 2^-126 down. */
static inline floats exp2_of(floats x) {
    const integers small = x <= -126.0f; /* not set for a NaN, which stays one */
    return (floats)(~small & (integers)exp2_within(x));
}

/* tanh(x), to 3e-7 of the result. */
static INLINE floats tanh_of(floats x) {
    const integers sign = (integers)x & INT32_MIN;
    const floats size = (floats)((integers)x ^ sign) * (-2 * LOG2_E);
    floats whole, rest;
    const floats y = exp2_parts(choose(size <= -40.0f, (floats){0} - 40.0f, size), &whole, &rest);
    /* e^(-2|x|) - 1, which keeps its digits where x is small. */
    const floats less = y * rest * whole + (whole - 1.0f);
    return (floats)((integers)(-less / (less + 2.0f)) | sign);
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
