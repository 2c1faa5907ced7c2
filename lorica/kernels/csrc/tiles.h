/* Products of tiles of bfloat16: 8 tiles of 16 rows, each of 16 float32 (sums) or of 16 pairs of bfloat16.
 *
 * tile_multiply(c, a, b) adds A B to c. Row m of a holds A[m, 0 .. 31]; row k of b holds the pairs B[2k, n], B[2k + 1, n]
 * for each of its 16 columns n. Numbers of tiles are literals, because registers are.
 *
 *   -DAMX            the instructions of that name
 *   else             vdpbf16ps (AVX-512 BF16), on tiles in memory: one memory access for eight products
 *   and -DEMULATED   either of them in C, after the definitions in Intel's manual (volume 2, TDPBF16PS and VDPBF16PS),
 *                    for tests on other processors
 *
 * AMX wants a thread's tiles configured; `tiles_begin` keeps what another library has configured for `tiles_end`.
 */
#pragma once

#include "numbers.h"

enum { TILE_ROWS = 16, TILE_BYTES = 64 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

#if defined(AMX) && !defined(EMULATED)
#include <sys/syscall.h>
#include <unistd.h>

/* What the compiler knows of the tile instructions leaves out most of the memory that they read. */
#define MEMORY_IS_READ(pointer) __asm__ volatile("" ::"r"(pointer) : "memory")

/* Linux lends the tiles' state to processes that ask for it. */
static int tiles_are_lent(void) {
    const int request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

static TileConfig tiles_begin(void) {
    static const TileConfig ours = {
        .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    TileConfig before = {0};
    MEMORY_IS_READ(&before);
    _tile_storeconfig(&before);
    MEMORY_IS_READ(&ours);
    _tile_loadconfig(&ours);
    return before;
}

static void tiles_end(TileConfig before) {
    MEMORY_IS_READ(&before);
    _tile_loadconfig(&before); /* of palette 0: releases them */
}

#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride) _tile_loadd(t, from, stride)
#define tile_store(t, to, stride) _tile_stored(t, to, stride)
#define tile_multiply(c, a, b) _tile_dpbf16ps(c, a, b)

#else
#define MEMORY_IS_READ(pointer) (void)(pointer)

static _Thread_local struct { _Alignas(64) float sums[16]; } tiles[8][TILE_ROWS];

static int tiles_are_lent(void) { return 1; }
static TileConfig tiles_begin(void) { return (TileConfig){0}; }
static void tiles_end(TileConfig before) { (void)before; }

static INLINE void tile_zero(int t) { memset(tiles[t], 0, sizeof tiles[t]); }

static INLINE void tile_load(int t, const void *from, int64_t stride) {
    for (int r = 0; r < TILE_ROWS; r++) memcpy(&tiles[t][r], (const char *)from + r * stride, TILE_BYTES);
}

static INLINE void tile_store(int t, void *to, int64_t stride) {
    for (int r = 0; r < TILE_ROWS; r++) memcpy((char *)to + r * stride, &tiles[t][r], TILE_BYTES);
}

static INLINE uint32_t pair_at(int t, int row, int k) { return bits_of(tiles[t][row].sums[k]); }

#ifdef EMULATED
/* Numbers below the smallest normal one count as zero, and become zero. */
static INLINE float flushed(float x) { return float_of(bits_of(x) & (bits_of(x) & 0x7f800000 ? ~0u : 0x80000000)); }

/* One rounding, as the instructions have it. x and y: the upper halves of these. */
static INLINE void add_product(float *sums, uint32_t x, const uint32_t *y) {
    const float left = flushed(float_of(x & 0xffff0000));
    for (int n = 0; n < 16; n++)
        sums[n] = flushed(fmaf(left, flushed(float_of(y[n] & 0xffff0000)), flushed(sums[n])));
}
#endif

#ifdef AMX
/* The first and the second elements of the pairs have sums of their own. */
static void tile_multiply(int c, int a, int b) {
    for (int m = 0; m < TILE_ROWS; m++) {
        float first[16] = {0}, second[16] = {0};
        for (int k = 0; k < 16; k++) {
            uint32_t low[16], high[16];
            for (int n = 0; n < 16; n++) high[n] = pair_at(b, k, n), low[n] = high[n] << 16;
            add_product(first, pair_at(a, m, k) << 16, low);
            add_product(second, pair_at(a, m, k), high);
        }
        float *sums = tiles[c][m].sums;
        for (int n = 0; n < 16; n++) sums[n] = flushed(flushed(sums[n]) + flushed(first[n] + second[n]));
    }
}
#else
#ifdef EMULATED
typedef struct { float sums[16]; } Dots;

/* The second elements of the pairs are added before the first. */
static __attribute__((noinline)) Dots dot_pairs(Dots dots, uint32_t pair, Dots row) {
    uint32_t low[16], high[16];
    for (int n = 0; n < 16; n++) high[n] = bits_of(row.sums[n]), low[n] = high[n] << 16;
    add_product(dots.sums, pair, high);
    add_product(dots.sums, pair << 16, low);
    return dots;
}
#else
typedef __m512 Dots;

static INLINE Dots dot_pairs(Dots dots, uint32_t pair, Dots row) {
    return _mm512_dpbf16_ps(dots, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)row);
}
#endif

static INLINE void tile_multiply(int c, int a, int b) {
    Dots dots[TILE_ROWS], row;
    memcpy(dots, tiles[c], sizeof dots);
    for (int k = 0; k < 16; k++) {
        memcpy(&row, &tiles[b][k], sizeof row);
        _Pragma("GCC unroll 16") for (int m = 0; m < TILE_ROWS; m++)
            dots[m] = dot_pairs(dots[m], pair_at(a, m, k), row);
    }
    memcpy(tiles[c], dots, sizeof dots);
}
#endif
#endif
