/* Cross-entropy of rows of logits, and its gradient in their place.
 *
 * What a model does to its logits is z = cap tanh(scale x / cap), or z = scale x without a cap; the loss is
 * log(sum(exp z)) - z[target]. A row is gone through twice: for its greatest z and the sum, kept up to date block by
 * block, and to write (softmax - onehot) dz/dx. The second time it comes from the cache: 49,152 numbers of 16 bits are
 * 96 KB. All arithmetic is float32, a row's sum over its blocks float64.
 */
#include "numbers.h"

#include <float.h>

enum { BLOCK = 512 };

typedef struct {
    char *logits; /* [rows, columns] */
    const int64_t *targets; /* one a row; below 0 a row that counts nothing */
    float *losses;
    int64_t rows, columns;
    float scale, cap; /* cap 0: none */
    int32_t type, with_gradient;
} Loss;

/* cap * tanh(x / cap), and in *slope its derivative, both exact where they are small. */
static INLINE floats capped(floats x, float cap, floats *slope) {
    const float log2e = 1.44269504f;
    const integers sign = (integers)x & (int32_t)0x80000000;
    const floats size = (floats)((integers)x & 0x7fffffff);
    const floats e = exp2_of(size * (-2 * log2e / cap)); /* tanh u = (1 - e) / (1 + e) with e = exp(-2 u) */
    const floats over = 1 / (1 + e);
    *slope = 4 * e * over * over;
    return (floats)((integers)((1 - e) * over * cap) | sign);
}

/* `count` values z of a row from `start` on, filled up to whole vectors with what adds nothing; returns the vectors. */
static INLINE int64_t read_block(const Loss *a, int64_t start, int64_t count, floats *z, floats *slope) {
    const int64_t vectors = (count + LANES - 1) / LANES;
    load((float *)z, a->logits, a->type, start, count);
    for (int64_t v = 0; v < vectors; v++) z[v] *= a->scale;
    if (a->cap)
        for (int64_t v = 0; v < vectors; v++) z[v] = capped(z[v], a->cap, slope + v);
    for (int64_t i = count; i < vectors * LANES; i++) ((float *)z)[i] = -INFINITY;
    return vectors;
}

static void take_row(const Loss *a, int64_t row) {
    const float log2e = 1.44269504f;
    const int64_t start = row * a->columns, target = a->targets[row];
    floats z[BLOCK / LANES], slope[BLOCK / LANES];
    if (target < 0) {
        const int64_t size = a->type == FLOAT32 ? 4 : 2;
        a->losses[row] = 0;
        if (a->with_gradient) memset(a->logits + start * size, 0, a->columns * size);
        return;
    }
    float most = -FLT_MAX, wanted = 0; /* not minus infinity, whose difference from itself is no number */
    double sum = 0;
    for (int64_t c = 0; c < a->columns; c += BLOCK) {
        const int64_t vectors = read_block(a, start + c, smaller(BLOCK, a->columns - c), z, slope);
        floats top = z[0], total = {0};
        for (int64_t v = 1; v < vectors; v++) top = choose(z[v] > top, z[v], top);
        float now = most;
        for (int i = 0; i < LANES; i++) now = top[i] > now ? top[i] : now;
        if (now > most) sum *= exp2f((most - now) * log2e), most = now;
        for (int64_t v = 0; v < vectors; v++) total += exp2_of((z[v] - most) * log2e);
        sum += sum_of(total);
        if (target >= c && target < c + BLOCK) wanted = ((float *)z)[target - c];
    }
    a->losses[row] = (most - wanted) + logf(sum);
    if (!a->with_gradient) return;
    const float share = 1 / sum;
    for (int64_t c = 0; c < a->columns; c += BLOCK) {
        const int64_t count = smaller(BLOCK, a->columns - c), vectors = read_block(a, start + c, count, z, slope);
        for (int64_t v = 0; v < vectors; v++) z[v] = exp2_of((z[v] - most) * log2e) * share;
        if (target >= c && target < c + BLOCK) ((float *)z)[target - c] -= 1;
        for (int64_t v = 0; v < vectors; v++) z[v] *= a->scale;
        if (a->cap)
            for (int64_t v = 0; v < vectors; v++) z[v] *= slope[v];
        save(a->logits, a->type, start + c, (float *)z, count);
    }
}

/* 0, with nothing done, where a target is no column. */
int lorica_cross_entropy(const Loss *a, int threads) {
    for (int64_t row = 0; row < a->rows; row++)
        if (a->targets[row] >= a->columns) return 0;
    threads = a->rows * a->columns < SMALL ? 1 : threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) take_row(a, row);
    return 1;
}
