/* Root-mean-square normalisation and the gate of an MLP, with their gradients, each in one pass over memory.
 *
 * As torch operations each is half a dozen passes, with a float32 copy of every 16-bit tensor between them. Here a vector
 * is widened into a register, worked on in float32 and rounded once. Tensors are contiguous.
 */
#include "activations.h"

enum { SUMS = 4 };    /* accumulators: an addition waits for the one before it, so others go on beside it */
enum { BLOCK = 4096 }; /* elements of a gate that one turn of a thread takes */

static INLINE floats rounded(floats x, int type) {
    if (type == FLOAT32) return x;
    if (type == BFLOAT16) return (floats)(to_bfloat16s(x) & 0xffff0000);
    uint16_t halves[LANES];
    put_floats(halves, 0, type, x);
    return floats_at(halves, 0, type);
}

/* ------------------------------------------------------------------ normalisation */

typedef struct {
    int32_t type, plus_one; /* plus_one: the weight is what 1 is moved by, and nothing is rounded before the product */
    int64_t rows, size;
    float epsilon;
    const void *x, *weight, *grad; /* grad and x [rows, size], weight [size], all of `type` */
    void *out, *grad_x;            /* [rows, size] */
    float *scale;                  /* [rows]: 1 / sqrt(mean(x^2) + epsilon) */
} Norm;

static INLINE floats weight_at(const Norm *n, int type, int64_t i) {
    const floats w = read_at(n->weight, type, i, n->size - i);
    return n->plus_one ? w + 1.0f : w;
}

/* The sum of TERM over a row, where TERM is said of the vector from `i` on. */
#define SUM_OVER_ROW(total, n, TERM)                                                         \
    do {                                                                                     \
        floats sums_[SUMS] = {{0}};                                                          \
        int64_t i = 0;                                                                       \
        for (; i + SUMS * LANES <= (n)->size;)                                               \
            _Pragma("GCC unroll 4") for (int s = 0; s < SUMS; s++, i += LANES) sums_[s] += TERM; \
        for (; i < (n)->size; i += LANES) sums_[0] += TERM;                                  \
        total = sum_of((sums_[0] + sums_[1]) + (sums_[2] + sums_[3]));                       \
    } while (0)

static INLINE floats square(floats x) { return x * x; }

static INLINE void norm_row(const Norm *n, int type, int64_t row) {
    const int64_t start = row * n->size;
    float squares;
    SUM_OVER_ROW(squares, n, square(read_at(n->x, type, start + i, n->size - i)));
    const float scale = 1.0f / sqrtf(squares / n->size + n->epsilon);
    if (n->scale) n->scale[row] = scale;
    for (int64_t i = 0; i < n->size; i += LANES) {
        floats x = read_at(n->x, type, start + i, n->size - i) * scale;
        if (!n->plus_one) x = rounded(x, type);
        put_at(n->out, type, start + i, x * weight_at(n, type, i), n->size - i);
    }
}

/* With n = x s and h = grad w: s (h - n mean(h n)). */
static INLINE void norm_row_backward(const Norm *n, int type, int64_t row) {
    const int64_t start = row * n->size;
    const float scale = n->scale[row];
    float products;
#define AT(tensor) read_at(n->tensor, type, start + i, n->size - i)
    SUM_OVER_ROW(products, n, AT(grad) * weight_at(n, type, i) * AT(x));
    const float along = products / n->size * scale * scale;
    for (int64_t i = 0; i < n->size; i += LANES) {
        const floats inner = AT(grad) * weight_at(n, type, i) - AT(x) * along;
        put_at(n->grad_x, type, start + i, inner * scale, n->size - i);
    }
#undef AT
}

/* A loop over rows for each type, so that it is a constant inside. */
#define OVER(index, count, threads, CALL)                                                  \
    _Pragma("omp parallel for num_threads(threads) schedule(static)")                      \
    for (int64_t index = 0; index < (count); index++) CALL

#define FOR_TYPES(type, index, count, threads, FUNCTION, ...)                              \
    do {                                                                                   \
        if ((type) == FLOAT32) OVER(index, count, threads, FUNCTION(__VA_ARGS__, FLOAT32, index));        \
        else if ((type) == BFLOAT16) OVER(index, count, threads, FUNCTION(__VA_ARGS__, BFLOAT16, index)); \
        else OVER(index, count, threads, FUNCTION(__VA_ARGS__, FLOAT16, index));           \
    } while (0)

static int enough(int64_t elements, int threads) { return elements < SMALL ? 1 : threads; }

void lorica_rms_norm(const Norm *n, int threads) {
    threads = enough(n->rows * n->size, threads);
    FOR_TYPES(n->type, row, n->rows, threads, norm_row, n);
}

void lorica_rms_norm_backward(const Norm *n, int threads) {
    threads = enough(n->rows * n->size, threads);
    FOR_TYPES(n->type, row, n->rows, threads, norm_row_backward, n);
}

/* ------------------------------------------------------------------ act(gate) * up */

typedef struct {
    int32_t type, act;
    int64_t count;
    const void *gate, *up, *grad;
    void *out, *grad_gate, *grad_up;
} Gate;

static INLINE void gate_block(const Gate *g, int act, int type, int64_t block) {
    const int64_t end = smaller((block + 1) * BLOCK, g->count);
    for (int64_t i = block * BLOCK; i < end; i += LANES) {
        floats slope;
        const floats active = act_of(act, read_at(g->gate, type, i, end - i), &slope);
        put_at(g->out, type, i, active * read_at(g->up, type, i, end - i), end - i);
    }
}

static INLINE void gate_block_backward(const Gate *g, int act, int type, int64_t block) {
    const int64_t end = smaller((block + 1) * BLOCK, g->count);
    for (int64_t i = block * BLOCK; i < end; i += LANES) {
        floats slope;
        const floats active = act_of(act, read_at(g->gate, type, i, end - i), &slope);
        const floats up = read_at(g->up, type, i, end - i), grad = read_at(g->grad, type, i, end - i);
        put_at(g->grad_gate, type, i, grad * up * slope, end - i);
        put_at(g->grad_up, type, i, grad * active, end - i);
    }
}

void lorica_gate(const Gate *g, int threads) {
    const int64_t blocks = (g->count + BLOCK - 1) / BLOCK;
    threads = enough(g->count, threads);
    if (g->act == SILU) FOR_TYPES(g->type, block, blocks, threads, gate_block, g, SILU);
    else FOR_TYPES(g->type, block, blocks, threads, gate_block, g, GELU_TANH);
}

void lorica_gate_backward(const Gate *g, int threads) {
    const int64_t blocks = (g->count + BLOCK - 1) / BLOCK;
    threads = enough(g->count, threads);
    if (g->act == SILU) FOR_TYPES(g->type, block, blocks, threads, gate_block_backward, g, SILU);
    else FOR_TYPES(g->type, block, blocks, threads, gate_block_backward, g, GELU_TANH);
}
