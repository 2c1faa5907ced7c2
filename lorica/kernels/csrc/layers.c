/* Root-mean-square normalisation and the gate of an MLP, with their gradients, each in one pass over memory.
 *
 * As torch operations each is half a dozen passes, with a float32 copy of every 16-bit tensor between them. Here a piece
 * of STEP elements is widened into registers, worked on in float32 and rounded once. Tensors are contiguous.
 */
#include "activations.h"

enum { PARTS = STEP / LANES };

typedef struct { floats of[PARTS]; } Piece;

/* `count` elements from `start`, zeros behind them. */
static INLINE Piece read_piece(const void *from, int type, int64_t start, int64_t count) {
    Piece piece = {{{0}}};
    load((float *)&piece, from, type, start, count == STEP ? STEP : count);
    return piece;
}

static INLINE void write_piece(void *to, int type, int64_t start, const Piece *piece, int64_t count) {
    save(to, type, start, (const float *)piece, count == STEP ? STEP : count);
}

static INLINE void round_piece(Piece *piece, int type) {
    if (type == FLOAT32) return;
    uint16_t halves[STEP];
    save(halves, type, 0, (const float *)piece, STEP);
    load((float *)piece, halves, type, 0, STEP);
}

#define EACH_PART _Pragma("GCC unroll 16") for (int p = 0; p < PARTS; p++)

static INLINE float sum_of_piece(const Piece *piece) {
    floats sums = {0};
    EACH_PART sums += piece->of[p];
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
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

static INLINE Piece weight_piece(const Norm *n, int type, int64_t i, int64_t count) {
    Piece w = read_piece(n->weight, type, i, count);
    if (n->plus_one) EACH_PART w.of[p] += 1.0f;
    return w;
}

static INLINE void norm_row(const Norm *n, int type, int64_t row) {
    const int64_t start = row * n->size;
    Piece squares = {{{0}}};
    for (int64_t i = 0; i < n->size; i += STEP) {
        const Piece x = read_piece(n->x, type, start + i, smaller(STEP, n->size - i));
        EACH_PART squares.of[p] += x.of[p] * x.of[p];
    }
    const float scale = 1.0f / sqrtf(sum_of_piece(&squares) / n->size + n->epsilon);
    if (n->scale) n->scale[row] = scale;
    for (int64_t i = 0; i < n->size; i += STEP) {
        const int64_t count = smaller(STEP, n->size - i);
        Piece x = read_piece(n->x, type, start + i, count);
        const Piece w = weight_piece(n, type, i, count);
        EACH_PART x.of[p] *= scale;
        if (!n->plus_one) round_piece(&x, type);
        EACH_PART x.of[p] *= w.of[p];
        write_piece(n->out, type, start + i, &x, count);
    }
}

/* With n = x s and h = grad w: s (h - n mean(h n)). */
static INLINE void norm_row_backward(const Norm *n, int type, int64_t row) {
    const int64_t start = row * n->size;
    const float scale = n->scale[row];
    Piece products = {{{0}}};
    for (int64_t i = 0; i < n->size; i += STEP) {
        const int64_t count = smaller(STEP, n->size - i);
        const Piece x = read_piece(n->x, type, start + i, count), w = weight_piece(n, type, i, count);
        const Piece grad = read_piece(n->grad, type, start + i, count);
        EACH_PART products.of[p] += grad.of[p] * w.of[p] * x.of[p];
    }
    const float along = sum_of_piece(&products) / n->size * scale * scale;
    for (int64_t i = 0; i < n->size; i += STEP) {
        const int64_t count = smaller(STEP, n->size - i);
        const Piece x = read_piece(n->x, type, start + i, count), w = weight_piece(n, type, i, count);
        Piece grad = read_piece(n->grad, type, start + i, count);
        EACH_PART grad.of[p] = (grad.of[p] * w.of[p] - x.of[p] * along) * scale;
        write_piece(n->grad_x, type, start + i, &grad, count);
    }
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

static INLINE void gate_piece(const Gate *g, int act, int type, int64_t index) {
    const int64_t i = index * STEP, count = smaller(STEP, g->count - i);
    Piece gate = read_piece(g->gate, type, i, count);
    const Piece up = read_piece(g->up, type, i, count);
    floats slope;
    EACH_PART gate.of[p] = act_of(act, gate.of[p], &slope) * up.of[p];
    write_piece(g->out, type, i, &gate, count);
}

static INLINE void gate_piece_backward(const Gate *g, int act, int type, int64_t index) {
    const int64_t i = index * STEP, count = smaller(STEP, g->count - i);
    Piece gate = read_piece(g->gate, type, i, count), up = read_piece(g->up, type, i, count);
    const Piece grad = read_piece(g->grad, type, i, count);
    EACH_PART {
        floats slope;
        const floats active = act_of(act, gate.of[p], &slope);
        gate.of[p] = grad.of[p] * up.of[p] * slope;
        up.of[p] = grad.of[p] * active;
    }
    write_piece(g->grad_gate, type, i, &gate, count);
    write_piece(g->grad_up, type, i, &up, count);
}

void lorica_gate(const Gate *g, int threads) {
    const int64_t pieces = (g->count + STEP - 1) / STEP;
    threads = enough(g->count, threads);
    if (g->act == SILU) FOR_TYPES(g->type, piece, pieces, threads, gate_piece, g, SILU);
    else FOR_TYPES(g->type, piece, pieces, threads, gate_piece, g, GELU_TANH);
}

void lorica_gate_backward(const Gate *g, int threads) {
    const int64_t pieces = (g->count + STEP - 1) / STEP;
    threads = enough(g->count, threads);
    if (g->act == SILU) FOR_TYPES(g->type, piece, pieces, threads, gate_piece_backward, g, SILU);
    else FOR_TYPES(g->type, piece, pieces, threads, gate_piece_backward, g, GELU_TANH);
}
