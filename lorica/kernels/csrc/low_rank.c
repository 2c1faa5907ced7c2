/* The low-rank update of a linear layer in float32, y += s B A x, and its gradients, each in one pass over the rows.
 *
 * Its products are thin: a library that is made for square ones reaches half of its rate, and each of seven reads x, y
 * or a gradient from memory anew. Here a block of rows goes through all products while it is in the cache. They have one
 * form, c += a b with a tile of c in registers; sums over rows are taken by each thread for itself, and added in order.
 */
#include "numbers.h"

#include <omp.h>

enum { ROWS = 6, BLOCK = 8 * ROWS }; /* a tile of 6 rows and two vectors fills 16 registers; a block stays in the cache */

typedef struct {
    int64_t rows, inputs, outputs, rank; /* inputs and outputs are multiples of 32 */
    float scale;
    const float *x, *a, *b; /* [rows, inputs], [rank, inputs], [outputs, rank] */
    float *h;               /* [rows, rank]: A x, which forward makes and backward reads */
    float *y;               /* [rows, outputs]: added to */
    const float *grad;      /* of y */
    float *grad_x;          /* [rows, inputs]: added to; or NULL */
    float *grad_a, *grad_b; /* [rank, inputs], [outputs, rank]; or both NULL */
} LowRank;

/* A matrix whose element (row, column) stands at row * down + column * along. */
typedef struct { const float *at; int64_t down, along; } Matrix;

/* c [rows, vectors] += a [rows, depth] b [depth, vectors], b and c in rows of vectors. */
static INLINE void tile(float *c, int64_t c_row, Matrix a, const float *b, int64_t b_row, int64_t depth, const int rows,
                        const int vectors) {
    floats sums[ROWS][2];
#define EACH                                                        \
    _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++)          \
        _Pragma("GCC unroll 2") for (int v = 0; v < vectors; v++)
    EACH sums[r][v] = *(const unaligned_floats *)(c + r * c_row + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        floats right[2];
        for (int v = 0; v < vectors; v++) right[v] = *(const unaligned_floats *)(b + k * b_row + v * LANES);
        EACH sums[r][v] += a.at[r * a.down + k * a.along] * right[v];
    }
    EACH *(unaligned_floats *)(c + r * c_row + v * LANES) = sums[r][v];
#undef EACH
}

#define TILES(name, vectors)                                                                                            \
    static void name(float *c, int64_t c_row, Matrix a, const float *b, int64_t b_row, int64_t depth, int64_t rows) {   \
        switch (rows) { /* constants, so that the sums are registers */                                                 \
        case 1: tile(c, c_row, a, b, b_row, depth, 1, vectors); break;                                                  \
        case 2: tile(c, c_row, a, b, b_row, depth, 2, vectors); break;                                                  \
        case 3: tile(c, c_row, a, b, b_row, depth, 3, vectors); break;                                                  \
        case 4: tile(c, c_row, a, b, b_row, depth, 4, vectors); break;                                                  \
        case 5: tile(c, c_row, a, b, b_row, depth, 5, vectors); break;                                                  \
        default: tile(c, c_row, a, b, b_row, depth, 6, vectors);                                                        \
        }                                                                                                               \
    }
TILES(narrow_tile, 1)
TILES(wide_tile, 2)

/* c [rows, columns] += a [rows, depth] b [depth, columns]; columns is a multiple of LANES. Rows of tiles one after the
 * other, so that c is read as it lies in memory. */
static void multiply(float *c, int64_t rows, int64_t columns, Matrix a, const float *b, int64_t depth) {
    for (int64_t row = 0; row < rows; row += ROWS) {
        const Matrix part = {a.at + row * a.down, a.down, a.along};
        const int64_t count = smaller(ROWS, rows - row);
        int64_t column = 0;
        for (; column + 2 * LANES <= columns; column += 2 * LANES)
            wide_tile(c + row * columns + column, columns, part, b + column, columns, depth, count);
        if (column < columns) narrow_tile(c + row * columns + column, columns, part, b + column, columns, depth, count);
    }
}

/* The same where `depth` are the rows of a block: two vectors of each are copied side by side first, for rows that are a
 * power of two apart, or half as much again, push each other out of the cache. columns is a multiple of 2 * LANES. */
static void multiply_rows(float *c, int64_t rows, int64_t columns, Matrix a, const float *b, int64_t depth) {
    floats side[BLOCK][2];
    for (int64_t column = 0; column < columns; column += 2 * LANES) {
        for (int64_t k = 0; k < depth; k++) memcpy(side[k], b + k * columns + column, sizeof side[k]);
        for (int64_t row = 0; row < rows; row += ROWS)
            wide_tile(c + row * columns + column, columns, (Matrix){a.at + row * a.down, a.down, a.along},
                      (const float *)side, 2 * LANES, depth, smaller(ROWS, rows - row));
    }
}

static float *room(int64_t floats_wanted) { return aligned_alloc(64, (floats_wanted + 16) / 16 * 64); }
static int64_t whole(int64_t rank) { return (rank + LANES - 1) / LANES * LANES; }

/* to [columns, rows] = scale * from [rows, columns]^T, its rows filled up with zeros to `width`. */
static void transpose(const float *from, int64_t rows, int64_t columns, float scale, int64_t width, float *to) {
    memset(to, 0, columns * width * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[c * width + r] = scale * from[r * columns + c];
}

/* 0 where there is no memory. */
int lorica_low_rank(const LowRank *p, int threads) {
    const int64_t width = whole(p->rank), blocks = (p->rows + BLOCK - 1) / BLOCK;
    float *a = room(p->inputs * width), *b = room(p->rank * p->outputs), *inner = room(threads * BLOCK * width);
    const int has_room = a && b && inner;
    if (has_room) {
        transpose(p->a, p->rank, p->inputs, 1, width, a);
        transpose(p->b, p->outputs, p->rank, p->scale, p->outputs, b);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float *h = inner + omp_get_thread_num() * BLOCK * width;
            const int64_t first = block * BLOCK, rows = smaller(BLOCK, p->rows - first);
            memset(h, 0, rows * width * sizeof(float));
            multiply(h, rows, width, (Matrix){p->x + first * p->inputs, p->inputs, 1}, a, p->inputs);
            multiply(p->y + first * p->outputs, rows, p->outputs, (Matrix){h, width, 1}, b, p->rank);
            for (int64_t r = 0; r < rows; r++)
                memcpy(p->h + (first + r) * p->rank, h + r * width, p->rank * sizeof(float));
        }
    }
    free(a), free(b), free(inner);
    return has_room;
}

int lorica_low_rank_backward(const LowRank *p, int threads) {
    const int64_t width = whole(p->rank), blocks = (p->rows + BLOCK - 1) / BLOCK;
    const int64_t size = p->grad_a ? p->rank * (p->inputs + p->outputs) : 0; /* of a thread's sums: of A, of B^T */
    float *b = room(p->outputs * width), *inner = room(threads * BLOCK * width), *sums = room(threads * size);
    const int has_room = b && inner && sums;
    if (has_room) {
        for (int64_t o = 0; o < p->outputs; o++)
            for (int64_t r = 0; r < width; r++) b[o * width + r] = r < p->rank ? p->scale * p->b[o * p->rank + r] : 0;
        memset(sums, 0, threads * size * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float *of_h = inner + omp_get_thread_num() * BLOCK * width, *of_a = sums + omp_get_thread_num() * size;
            const int64_t first = block * BLOCK, rows = smaller(BLOCK, p->rows - first);
            const float *grad = p->grad + first * p->outputs, *x = p->x + first * p->inputs;
            memset(of_h, 0, rows * width * sizeof(float));
            multiply(of_h, rows, width, (Matrix){grad, p->outputs, 1}, b, p->outputs);
            if (p->grad_x)
                multiply(p->grad_x + first * p->inputs, rows, p->inputs, (Matrix){of_h, width, 1}, p->a, p->rank);
            if (size) {
                float *of_b = of_a + p->rank * p->inputs;
                multiply_rows(of_a, p->rank, p->inputs, (Matrix){of_h, 1, width}, x, rows);
                multiply_rows(of_b, p->rank, p->outputs, (Matrix){p->h + first * p->rank, 1, p->rank}, grad, rows);
            }
        }
        for (int t = 1; t < threads; t++)
            for (int64_t i = 0; i < size; i++) sums[i] += sums[t * size + i];
        if (size) {
            memcpy(p->grad_a, sums, p->rank * p->inputs * sizeof(float));
            transpose(sums + p->rank * p->inputs, p->rank, p->outputs, p->scale, p->rank, p->grad_b);
        }
    }
    free(b), free(inner), free(sums);
    return has_room;
}
