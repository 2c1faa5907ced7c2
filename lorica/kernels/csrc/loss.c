/* Cross-entropy of rows of logits, and its gradient in their place.
 *
 * What a model does to its logits is z = cap tanh(scale x / cap), or z = scale x without a cap; the loss is
 * log(sum(exp z)) - z[target]. A row is gone through three times, the later times in the cache: for its greatest z, for
 * exp(z - greatest), which are summed and kept in float32 beside it, and to write (softmax - onehot) dz/dx. One pass
 * that keeps a running greatest z would take all exponentials twice, and they are most of the work. All arithmetic is
 * float32, a row's sum over its blocks float64.
 */
#include "numbers.h"

#include <float.h>

enum { BLOCK = 512, SUMS = 4 };

typedef struct {
    char *logits; /* [rows, columns] */
    const int64_t *targets; /* one a row; below 0 a row that counts nothing */
    float *losses;
    int64_t rows, columns;
    float scale, cap; /* cap 0: none */
    int32_t type, with_gradient;
} Loss;

/* cap * tanh(x / cap), and in *slope its derivative. */
static INLINE floats capped(floats x, float cap, floats *slope) {
    const floats share = tanh_of(x / cap);
    *slope = 1.0f - share * share;
    return share * cap;
}

/* z of the logits from the i-th on, of which `left` are there; the others are what adds nothing. */
static INLINE floats z_at(const Loss *a, const int type, int64_t i, int64_t left, floats *slope) {
    floats z = read_at(a->logits, type, i, left) * a->scale;
    if (a->cap) z = capped(z, a->cap, slope);
    for (int64_t lane = left; lane < LANES; lane++) z[lane] = -INFINITY;
    return z;
}

/* The greatest z of a row; not minus infinity, whose difference from itself is no number. */
static INLINE float greatest(const Loss *a, const int type, int64_t start) {
    floats top[SUMS], slope;
    for (int s = 0; s < SUMS; s++) top[s] = (floats){0} - FLT_MAX;
    int64_t i = 0;
    for (; i + SUMS * LANES <= a->columns;)
        _Pragma("GCC unroll 4") for (int s = 0; s < SUMS; s++, i += LANES) {
            const floats x = floats_at(a->logits, start + i, type) * a->scale;
            top[s] = choose(x > top[s], x, top[s]);
        }
    /* Capping keeps the order. */
    for (int s = 0; s < SUMS && a->cap; s++) top[s] = capped(top[s], a->cap, &slope);
    for (; i < a->columns; i += LANES) {
        const floats z = z_at(a, type, start + i, a->columns - i, &slope);
        top[0] = choose(z > top[0], z, top[0]);
    }
    float most = -FLT_MAX;
    for (int s = 0; s < SUMS; s++)
        for (int lane = 0; lane < LANES; lane++) most = top[s][lane] > most ? top[s][lane] : most;
    return most;
}

/* exps: room for a row in whole vectors. */
static INLINE void take_row(const Loss *a, const int type, int64_t row, floats *exps) {
    const int64_t start = row * a->columns, target = a->targets[row];
    if (target < 0) {
        const int64_t size = type == FLOAT32 ? 4 : 2;
        a->losses[row] = 0;
        if (a->with_gradient) memset(a->logits + start * size, 0, a->columns * size);
        return;
    }
    floats slope;
    const float most = greatest(a, type, start);
    const float wanted = z_at(a, type, start + target, a->columns - target, &slope)[0];
    double sum = 0;
    for (int64_t c = 0; c < a->columns; c += BLOCK) {
        floats total = {0};
        for (int64_t i = c; i < smaller(c + BLOCK, a->columns); i += LANES) {
            const floats z = z_at(a, type, start + i, a->columns - i, &slope);
            total += exps[i / LANES] = exp2_of((z - most) * LOG2_E);
        }
        sum += sum_of(total);
    }
    a->losses[row] = (most - wanted) + logf(sum);
    if (!a->with_gradient) return;
    const float share = 1 / sum;
    ((float *)exps)[target] -= sum;
    for (int64_t i = 0; i < a->columns; i += LANES) {
        floats gradient = exps[i / LANES] * (share * a->scale);
        if (a->cap) {
            z_at(a, type, start + i, a->columns - i, &slope);
            gradient *= slope;
        }
        put_at(a->logits, type, start + i, gradient, a->columns - i);
    }
}

static INLINE void take_rows(const Loss *a, const int type, int threads, int *has_room) {
#pragma omp parallel num_threads(threads)
    {
        floats *exps = aligned_alloc(64, (a->columns + 64) / 16 * 64);
        if (!exps) *has_room = 0;
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a->rows; row++)
            if (*has_room) take_row(a, type, row, exps);
        free(exps);
    }
}

/* 1; 0, with nothing done, where a target is no column, and -1 where there is no memory for a row a thread. */
int lorica_cross_entropy(const Loss *a, int threads) {
    for (int64_t row = 0; row < a->rows; row++)
        if (a->targets[row] >= a->columns) return 0;
    int has_room = 1;
    threads = a->rows * a->columns < SMALL ? 1 : threads;
    if (a->type == FLOAT32) take_rows(a, FLOAT32, threads, &has_room);
    else if (a->type == BFLOAT16) take_rows(a, BFLOAT16, threads, &has_room);
    else take_rows(a, FLOAT16, threads, &has_room);
    return has_room ? 1 : -1;
}
