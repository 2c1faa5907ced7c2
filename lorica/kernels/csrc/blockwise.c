/* Blockwise quantisation on the CPU: quantise, dequantise, and multiply by a 4-bit weight that is never written out.
 *
 * A tensor is seen flat, in blocks of `blocksize` elements (32 to 4096, a power of two). Each block has one float32,
 * its absmax, and each element the index of the level of a codebook that lies nearest to element / absmax. 4-bit codes
 * lie two in a byte, the even element in the high half. The formulas are those of reference.py, bit for bit.
 *
 * What makes it fast. A block has only 16 different values, so the product codebook * absmax is computed and rounded
 * to the output's type 16 times a block instead of once an element; what remains is one table lookup an element, which
 * processors do in registers: vpermw looks up 32 elements at once (AVX-512), vpshufb looks up 32 bytes at once (AVX2).
 * Everything else is plain C that compilers vectorise. Which path is built is decided by the compiler's flags
 * (-march=native), so each can be built and tested alone. Products with such weights are in products.h.
 *
 * No header of torch: pointers come in, numbers go out. Types are numbered as in cpu.py.
 */
#include "numbers.h"
#include "products.h"

int lorica_simd(void) { return SIMD; } /* bits of a vector; 0: plain C */

/* ------------------------------------------------------------------ quantise */

static float clamp(float x) { /* to [-1, 1]; NaN stays */
    x = x < -1.0f ? -1.0f : x;
    return x > 1.0f ? 1.0f : x;
}

/* bounds: the 15 midpoints between the sorted levels; order: the code of each level in sorted order. */
void lorica_quantize_4bit(const void *x, int type, int64_t count, int64_t blocksize, const float *bounds,
                          const uint8_t *order, uint8_t *codes, float *absmax, int threads) {
    const float least = 1e-38f;
    const int64_t blocks = (count + blocksize - 1) / blocksize;
#pragma omp parallel for num_threads(count < SMALL ? 1 : threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * blocksize, here = smaller(blocksize, count - start);
        const int is_partial = here < blocksize;
        float values[4096];
        uint32_t levels[4096];
        load(values, x, type, start, here);
        float most = largest(values, here);
        float divisor = most < least ? least : most, factor = 1.0f / divisor;
        /* bitsandbytes divides in a last, partial block and keeps its lower limit there; elsewhere it multiplies. */
        absmax[block] = is_partial ? divisor : most;
        for (int64_t i = 0; i < here; i++)
            values[i] = clamp(is_partial ? values[i] / divisor : values[i] * factor);
        /* How many bounds lie below: a tie goes to the lower level, NaN to the highest. */
        for (int64_t i = 0; i < here; i++) {
            uint32_t level = 0;
            for (int b = 0; b < 15; b++) level += !(values[i] <= bounds[b]);
            levels[i] = level;
        }
        if (here % 2) { /* the half byte behind the last element holds the code of 0 */
            uint32_t level = 0;
            for (int b = 0; b < 15; b++) level += !(0.0f <= bounds[b]);
            levels[here] = level;
        }
        for (int64_t i = 0; i < here; i += 2)
            codes[(start + i) / 2] = order[levels[i]] << 4 | order[levels[i + 1]];
    }
}

/* nearest: the code for each of 65536 steps from -1 to 1, which is how bitsandbytes looks for the nearest of 256. */
void lorica_quantize_8bit(const void *x, int type, int64_t count, int64_t blocksize, const uint8_t *nearest,
                          uint8_t *codes, float *absmax, int threads) {
    const int64_t blocks = (count + blocksize - 1) / blocksize;
#pragma omp parallel for num_threads(count < SMALL ? 1 : threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * blocksize, here = smaller(blocksize, count - start);
        float values[4096];
        int32_t steps[4096];
        load(values, x, type, start, here);
        absmax[block] = largest(values, here);
        const float factor = 1.0f / absmax[block];
        for (int64_t i = 0; i < here; i++) {
            float value = clamp(values[i] * factor);
            float step = (value + 1.0f) * 0.5f * 65535.0f + 0.5f;
            steps[i] = step == step ? (int32_t)step : -1; /* 0 / 0: a block of zeros, and gets code 0 */
        }
        for (int64_t i = 0; i < here; i++) codes[start + i] = steps[i] < 0 ? 0 : nearest[steps[i]];
    }
}

/* ------------------------------------------------------------------ dequantise */

#if SIMD == 512
static inline void put(void *to, __m512i vector, int stream) {
    if (stream) _mm512_stream_si512(to, vector);
    else _mm512_storeu_si512(to, vector);
}

/* The 16 values of a block as words, twice. */
static inline __m512i words_of(const float *codebook, float scale, int type) {
    const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
    __m256i words = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    if (type == BFLOAT16) {
        const __m512i bits = _mm512_castps_si512(values);
        const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i nearest_even = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
        words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest_even, 16));
    }
    return _mm512_broadcast_i64x4(words);
}
#elif SIMD == 256
static inline void put(void *to, __m256i vector, int stream) {
    if (stream) _mm256_stream_si256(to, vector);
    else _mm256_storeu_si256(to, vector);
}

/* The 16 values of a block as words, their low bytes and their high bytes apart, both twice. */
typedef struct { __m256i low, high; } Bytes;

static inline __m256i rounded_above_16(__m256 x) { /* the upper half of each element becomes its bfloat16 */
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
}

static inline Bytes bytes_of(const float *codebook, float scale, int type) {
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256 first = _mm256_mul_ps(_mm256_loadu_ps(codebook), factor);
    const __m256 second = _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), factor);
    if (type == FLOAT16) {
        const __m256i words = _mm256_set_m128i(_mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT),
                                               _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
        const __m256i apart = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(_mm_setr_epi8(
            0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
        return (Bytes){_mm256_permute4x64_epi64(apart, 0x88), _mm256_permute4x64_epi64(apart, 0xdd)};
    }
    /* In each half of a vector: four low bytes, four high ones; those of `first` in front, of `second` behind. */
    const __m256i front = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        2, 6, 10, 14, 3, 7, 11, 15, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i behind = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        -1, -1, -1, -1, -1, -1, -1, -1, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i apart = _mm256_or_si256(_mm256_shuffle_epi8(rounded_above_16(first), front),
                                          _mm256_shuffle_epi8(rounded_above_16(second), behind));
    return (Bytes){_mm256_permutevar8x32_epi32(apart, _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6)),
                   _mm256_permutevar8x32_epi32(apart, _mm256_setr_epi32(1, 5, 3, 7, 1, 5, 3, 7))};
}
#endif

/* One block to 16-bit elements. A NaN in `scale` is made the usual one: rounding would turn others into numbers. */
static void lookup_16bit(uint16_t *to, const uint8_t *codes, const float *codebook, float scale, int64_t count,
                         int type, int stream) {
    int64_t i = 0;
    scale = scale == scale ? scale : NAN;
#if SIMD == 512
    /* vpermw: 32 indices of 5 bits into 32 words. The table stands there twice, so the fifth bit may be anything. */
    const __m512i table = words_of(codebook, scale, type);
    for (; i + 32 <= count; i += 32) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        put(to + i, _mm512_permutexvar_epi16(index, table), stream);
    }
#elif SIMD == 256
    /* vpshufb: 32 indices into 16 bytes. So once for the low bytes of the words and once for the high ones. */
    const Bytes table = bytes_of(codebook, scale, type);
    const __m256i nibble = _mm256_set1_epi8(15);
    /* Interleaving works inside each half of a vector; dealing the dwords out first makes its results come in order. */
    const __m256i deal = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (; i + 64 <= count; i += 64) {
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(codes + i / 2)), deal);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        const __m256i odd = _mm256_and_si256(bytes, nibble);
        const __m256i index[2] = {_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)};
        for (int half = 0; half < 2; half++) {
            const __m256i lows = _mm256_shuffle_epi8(table.low, index[half]);
            const __m256i highs = _mm256_shuffle_epi8(table.high, index[half]);
            put(to + i + 32 * half, _mm256_unpacklo_epi8(lows, highs), stream);
            put(to + i + 32 * half + 16, _mm256_unpackhi_epi8(lows, highs), stream);
        }
    }
#endif
    (void)stream;
    for (; i < count; i++) store(to, type, i, codebook[code_at(codes, i)] * scale);
}

/* One block to float32. */
static void lookup_32bit(float *to, const uint8_t *codes, const float *codebook, float scale, int64_t count,
                         int stream) {
    int64_t i = 0;
#if SIMD
    const Table table = table_of(codebook, scale);
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        floats even, odd;
        lookup_floats(table, codes + i / 2, &even, &odd);
#if SIMD == 512
        const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        put(to + i, _mm512_castps_si512(_mm512_permutex2var_ps((__m512)even, first, (__m512)odd)), stream);
        put(to + i + 16, _mm512_castps_si512(_mm512_permutex2var_ps((__m512)even, second, (__m512)odd)), stream);
#else
        const __m256 low = _mm256_unpacklo_ps((__m256)even, (__m256)odd);
        const __m256 high = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
        put(to + i, _mm256_castps_si256(_mm256_permute2f128_ps(low, high, 0x20)), stream);
        put(to + i + 8, _mm256_castps_si256(_mm256_permute2f128_ps(low, high, 0x31)), stream);
#endif
    }
#endif
    (void)stream;
    for (; i < count; i++) to[i] = codebook[code_at(codes, i)] * scale;
}

void lorica_dequantize_4bit(const uint8_t *codes, const float *absmax, const float *codebook, int64_t count,
                            int64_t blocksize, void *out, int type, int threads) {
    const int64_t blocks = (count + blocksize - 1) / blocksize;
    const int64_t bytes = count * (type == FLOAT32 ? 4 : 2);
    const int stream = bytes >= STREAM_BYTES && (uintptr_t)out % 64 == 0 && blocksize % STEP == 0;
#pragma omp parallel num_threads(count < SMALL ? 1 : threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t start = block * blocksize, here = smaller(blocksize, count - start);
            const uint8_t *from = codes + start / 2;
            if (type == FLOAT32) lookup_32bit((float *)out + start, from, codebook, absmax[block], here, stream);
            else lookup_16bit((uint16_t *)out + start, from, codebook, absmax[block], here, type, stream);
        }
#if SIMD
        if (stream) _mm_sfence();
#endif
    }
}

void lorica_dequantize_8bit(const uint8_t *codes, const float *absmax, const float *codebook, int64_t count,
                            int64_t blocksize, void *out, int type, int threads) {
    const int64_t blocks = (count + blocksize - 1) / blocksize;
#pragma omp parallel for num_threads(count < SMALL ? 1 : threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * blocksize, here = smaller(blocksize, count - start);
        float values[4096];
        for (int64_t i = 0; i < here; i++) values[i] = codebook[codes[start + i]] * absmax[block];
        save(out, type, start, values, here);
    }
}
