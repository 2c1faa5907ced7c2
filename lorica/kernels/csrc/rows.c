/* y = x W^T + b of few rows, as in decoding: W is read once, as it is stored, and becomes float32 in registers or in the
 * first cache. Libraries of matrix products are made for many rows; here they reach half the bandwidth of memory.
 *
 * Up to FEW rows each output is a dot product of vectors along the inputs. A core that reads one row of W after the other
 * waits for memory: from STREAMS places far apart it is given half as much again. Of more rows, a vector holds one input
 * of all of them: an element of W meets it, OUTPUTS of W's rows at a time, so no sum of a vector's elements is taken.
 */
#include "activations.h"

enum { FEW = 4, STREAMS = 4 };
enum { OUTPUTS = SIMD == 512 ? 12 : 6 }; /* rows of W in a tile: with two vectors each, most of the registers */
enum { WIDTH = 2 * LANES };              /* rows of x in a tile */
enum { INPUTS = 1024 };                  /* of a row of W, what is widened at once */
enum { AHEAD = 256 };                    /* bytes */
enum { LINE = 16 };                      /* floats in a cache line */
enum { ALONE = 1 << 16 };                /* elements of W below which one thread is faster */

typedef struct {
    const char *weight;
    int type; /* of the weight */
    int64_t rows, inputs, outputs;
    const float *x;    /* [rows, inputs], or in tiles [rows / WIDTH, inputs, WIDTH] */
    const float *bias; /* [outputs], or NULL */
    void *y;
    int y_type;
} Product;

static INLINE int64_t bytes_of(const int type) { return type == FLOAT32 ? 4 : 2; }

static void put(const Product *p, int64_t row, int64_t output, float sum) {
    store(p->y, p->y_type, row * p->outputs + output, sum + (p->bias ? p->bias[output] : 0));
}

/* ------------------------------------------------------------------ dot products */

#define EACH_STREAM _Pragma("GCC unroll 4") for (int s = 0; s < streams; s++)
#define EACH_ROW _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++)

/* With the inputs from the i-th on. */
static __attribute__((noinline)) void finish(const Product *p, int64_t row, int64_t output, float sum, int64_t i) {
    float rest[LANES];
    load(rest, p->weight, p->type, output * p->inputs + i, p->inputs - i);
    for (int64_t j = i; j < p->inputs; j++) sum += rest[j - i] * p->x[row * p->inputs + j];
    put(p, row, output, sum);
}

static INLINE void dot(const Product *p, const int64_t *outputs, const int rows, const int streams, const int type) {
    const char *weights[STREAMS];
    floats total[STREAMS][FEW];
    EACH_STREAM {
        weights[s] = p->weight + outputs[s] * p->inputs * bytes_of(type);
        EACH_ROW total[s][r] = (floats){0};
    }
    int64_t i = 0;
    for (; i + LANES <= p->inputs; i += LANES) {
        EACH_STREAM {
            __builtin_prefetch(weights[s] + i * bytes_of(type) + AHEAD);
            const floats weight = floats_at(weights[s], i, type);
            EACH_ROW total[s][r] += weight * *(const unaligned_floats *)(p->x + r * p->inputs + i);
        }
    }
    EACH_STREAM {
        EACH_ROW finish(p, r, outputs[s], sum_of(total[s][r]), i);
    }
}

/* The outputs from `first` to `end`. As many streams as there are registers for. */
static INLINE void dots(const Product *p, int64_t first, int64_t end, const int type) {
    const int streams = p->rows <= 2 ? 4 : 2;
    const int64_t step = (end - first + streams - 1) / streams;
    for (int64_t output = first; output < first + step; output++) {
        int64_t outputs[STREAMS];
        for (int s = 0; s < streams; s++) outputs[s] = smaller(output + s * step, end - 1);
        switch (p->rows) { /* constants, so that the sums are registers */
        case 1: dot(p, outputs, 1, 4, type); break;
        case 2: dot(p, outputs, 2, 4, type); break;
        case 3: dot(p, outputs, 3, 2, type); break;
        default: dot(p, outputs, 4, 2, type);
        }
    }
}

/* ------------------------------------------------------------------ tiles */

/* sums [OUTPUTS, WIDTH] += w [OUTPUTS, inputs], whose rows are `step` apart, times x [inputs, WIDTH]. next: what
 * the next tile reads, in elements of `bytes` bytes and rows `apart` bytes apart. */
static INLINE void tile(const float *w, int64_t step, const float *x, int64_t inputs, float *sums, const int vectors,
                        const char *next, int64_t apart, int64_t bytes) {
    floats total[OUTPUTS][2];
    _Pragma("GCC unroll 12") for (int o = 0; o < OUTPUTS; o++)
        for (int v = 0; v < vectors; v++) total[o][v] = *(const unaligned_floats *)(sums + o * WIDTH + v * LANES);
    for (int64_t i = 0; i < inputs; i++) {
        if (i % LINE == 0)
            for (int o = 0; o < OUTPUTS; o++) __builtin_prefetch(next + o * apart + i * bytes);
        floats here[2];
        for (int v = 0; v < vectors; v++) here[v] = *(const unaligned_floats *)(x + i * WIDTH + v * LANES);
        _Pragma("GCC unroll 12") for (int o = 0; o < OUTPUTS; o++) {
            const float element = w[o * step + i];
            for (int v = 0; v < vectors; v++) total[o][v] += element * here[v];
        }
    }
    _Pragma("GCC unroll 12") for (int o = 0; o < OUTPUTS; o++)
        for (int v = 0; v < vectors; v++) *(unaligned_floats *)(sums + o * WIDTH + v * LANES) = total[o][v];
}

/* OUTPUTS rows of W from `output` on, and all rows of x. wide [OUTPUTS, INPUTS]; sums [rows / WIDTH, OUTPUTS, WIDTH]. */
static void tiles(const Product *p, int64_t output, float *wide, float *sums) {
    const int64_t count = smaller(OUTPUTS, p->outputs - output), row_tiles = (p->rows + WIDTH - 1) / WIDTH;
    const int64_t bytes = bytes_of(p->type), apart = p->inputs * bytes;
    memset(sums, 0, row_tiles * OUTPUTS * WIDTH * sizeof(float));
    for (int64_t i = 0; i < p->inputs; i += INPUTS) {
        const int64_t inputs = smaller(INPUTS, p->inputs - i);
        const char *next = p->weight + (output + OUTPUTS) * apart + i * bytes;
        const float *w = wide;
        int64_t step = INPUTS;
        if (p->type == FLOAT32 && count == OUTPUTS) {
            w = (const float *)p->weight + output * p->inputs + i;
            step = p->inputs;
        } else {
            if (count < OUTPUTS) memset(wide, 0, OUTPUTS * INPUTS * sizeof(float));
            for (int64_t o = 0; o < count; o++)
                load(wide + o * INPUTS, p->weight, p->type, (output + o) * p->inputs + i, inputs);
        }
        for (int64_t t = 0; t < row_tiles; t++) {
            const float *x = p->x + (t * p->inputs + i) * WIDTH;
            float *to = sums + t * OUTPUTS * WIDTH;
            if (p->rows - t * WIDTH <= LANES) tile(w, step, x, inputs, to, 1, next, apart, bytes);
            else tile(w, step, x, inputs, to, 2, next, apart, bytes);
        }
    }
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t o = 0; o < count; o++)
            put(p, r, output + o, sums[(r / WIDTH * OUTPUTS + o) * WIDTH + r % WIDTH]);
}

/* Rows of x beside each other: to [rows / WIDTH, inputs, WIDTH]; what fills the last tile up is zero. */
static void deal(const Product *p, const float *x, float *to) {
    for (int64_t first = 0; first < p->rows; first += WIDTH) {
        const int64_t rows = smaller(WIDTH, p->rows - first);
        float *place = to + first * p->inputs;
        for (int64_t i = 0; i < p->inputs; i++)
            for (int64_t r = 0; r < rows; r++) place[i * WIDTH + r] = x[(first + r) * p->inputs + i];
    }
}

/* p->x is [rows, inputs]. 0: there is no memory. */
static int multiply(Product p, int threads) {
    const int64_t row_tiles = (p.rows + WIDTH - 1) / WIDTH, sums_size = row_tiles * OUTPUTS * WIDTH;
    const int is_few = p.rows <= FEW;
    float *dealt = is_few ? NULL : calloc(row_tiles * WIDTH * p.inputs, sizeof(float));
    if (!is_few && !dealt) return 0;
    if (!is_few) {
        deal(&p, p.x, dealt);
        p.x = dealt;
    }
    threads = p.inputs * p.outputs < ALONE ? 1 : threads;
    /* More than there are threads, so that one that is held up by other work on the machine does not hold up the rest. */
    const int64_t parts = threads > 1 ? 4 * threads : 1;
    const int64_t step = (p.outputs + parts * OUTPUTS - 1) / (parts * OUTPUTS) * OUTPUTS;
    int is_done = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t first = 0; first < p.outputs; first += step) {
        const int64_t end = smaller(p.outputs, first + step);
        float *sums = is_few ? NULL : malloc((sums_size + OUTPUTS * INPUTS) * sizeof(float));
        if (is_few) {
            if (p.type == FLOAT32) dots(&p, first, end, FLOAT32);
            else if (p.type == BFLOAT16) dots(&p, first, end, BFLOAT16);
            else dots(&p, first, end, FLOAT16);
        } else if (sums) {
            for (int64_t output = first; output < end; output += OUTPUTS) tiles(&p, output, sums + sums_size, sums);
        } else {
#pragma omp atomic write
            is_done = 0;
        }
        free(sums);
    }
    free(dealt);
    return is_done;
}

/* As float32: where it stands, or widened into `room`. */
static const float *widened(const void *x, int type, int64_t count, float *room) {
    if (type == FLOAT32) return x;
    load(room, x, type, 0, count);
    return room;
}

/* x [rows, inputs] of x_type, weight [outputs, inputs] of type, bias [outputs] float32 or NULL, y [rows, outputs] of
 * x_type. 0: there is no memory. */
int lorica_linear_rows(const void *x, int x_type, int64_t rows, int64_t inputs, int64_t outputs, const void *weight,
                       int type, const float *bias, void *y, int threads) {
    float *room = x_type == FLOAT32 ? NULL : malloc(rows * inputs * sizeof(float));
    if (x_type != FLOAT32 && !room) return 0;
    const float *wide = widened(x, x_type, rows * inputs, room);
    const int is_done = multiply((Product){weight, type, rows, inputs, outputs, wide, bias, y, x_type}, threads);
    free(room);
    return is_done;
}

/* ------------------------------------------------------------------ gated */

static INLINE void gate(float *to, const float *up, int64_t count, const int act) {
    for (int64_t i = 0; i < count; i += LANES) {
        unaligned_floats *here = (unaligned_floats *)(to + i);
        floats slope;
        *here = act_of(act, *here, &slope) * *(const unaligned_floats *)(up + i);
    }
}

/* down (act(gate x) * (up x)): gate and up [inner, inputs], down [outputs, inner], all of type; the rest as above. */
int lorica_gated_rows(const void *x, int x_type, int64_t rows, int64_t inputs, int64_t inner, int64_t outputs,
                      const void *gate_weight, const void *up_weight, const void *down_weight, int type, int act, void *y,
                      int threads) {
    const int64_t count = (rows * inner + LANES - 1) / LANES * LANES;
    float *gates = calloc(2 * count + rows * inputs, sizeof(float)), *ups = gates + count;
    if (!gates) return 0;
    const float *wide = widened(x, x_type, rows * inputs, ups + count);
    int is_done = multiply((Product){gate_weight, type, rows, inputs, inner, wide, NULL, gates, FLOAT32}, threads);
    is_done &= multiply((Product){up_weight, type, rows, inputs, inner, wide, NULL, ups, FLOAT32}, threads);
    if (act == SILU) gate(gates, ups, count, SILU);
    else gate(gates, ups, count, GELU_TANH);
    is_done &= multiply((Product){down_weight, type, rows, inner, outputs, gates, NULL, y, x_type}, threads);
    free(gates);
    return is_done;
}

/* ------------------------------------------------------------------ low rank */

/* Softmax of `heads` logits / temperature, and heads times `rank` of the row h: to[n * rank + k] = gate n times h[k]. */
static void spread(float *logits, int64_t heads, float temperature, const float *h, int64_t rank, float *to) {
    float most = -INFINITY, sum = 0;
    for (int64_t n = 0; n < heads; n++) most = logits[n] > most ? logits[n] : most;
    for (int64_t n = 0; n < heads; n++) sum += logits[n] = expf((logits[n] - most) / temperature);
    for (int64_t n = 0; n < heads; n++)
        for (int64_t k = 0; k < rank; k++) to[n * rank + k] = logits[n] / sum * h[k];
}

/* y += scale B (g (x) A x): x [rows, inputs] and y [rows, outputs] of x_type; A [rank, inputs], B [outputs, heads rank]
 * and router [heads, inputs] float32. g is the softmax of the router's outputs; without a router heads is 1, and so
 * is g. 0: there is no memory. */
int lorica_add_low_rank(const void *x, int x_type, int64_t rows, int64_t inputs, int64_t outputs, int64_t rank,
                        int64_t heads, const float *a, const float *b, const float *router, float temperature,
                        float scale, void *y, int threads) {
    float *wide = malloc(rows * (inputs + rank + heads + heads * rank + 2 * outputs) * sizeof(float));
    if (!wide) return 0;
    float *h = wide + rows * inputs, *logits = h + rows * rank, *mixed = logits + rows * heads;
    float *added = mixed + rows * heads * rank, *sums = added + rows * outputs;
    const float *from = widened(x, x_type, rows * inputs, wide);
    const char *weights[] = {(const char *)a, (const char *)router, (const char *)b};
    int is_done = multiply((Product){weights[0], FLOAT32, rows, inputs, rank, from, NULL, h, FLOAT32}, threads);
    if (router) {
        is_done &= multiply((Product){weights[1], FLOAT32, rows, inputs, heads, from, NULL, logits, FLOAT32}, threads);
        for (int64_t r = 0; r < rows; r++)
            spread(logits + r * heads, heads, temperature, h + r * rank, rank, mixed + r * heads * rank);
        h = mixed;
    }
    is_done &= multiply((Product){weights[2], FLOAT32, rows, heads * rank, outputs, h, NULL, added, FLOAT32}, threads);
    load(sums, y, x_type, 0, rows * outputs);
    for (int64_t i = 0; i < rows * outputs; i++) sums[i] += scale * added[i];
    save(y, x_type, 0, sums, rows * outputs);
    free(wide);
    return is_done;
}

/* ------------------------------------------------------------------ the largest */

static int64_t argmax(const float *x, int64_t size) {
    floats most = (floats){0} - INFINITY;
    integers has_nan = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const floats here = *(const unaligned_floats *)(x + i);
        most = choose(here > most, here, most);
        has_nan |= here != here;
    }
    float largest_one = -INFINITY;
    for (int j = 0; j < LANES; j++) {
        largest_one = most[j] > largest_one ? most[j] : largest_one;
        if (has_nan[j]) largest_one = NAN;
    }
    for (; i < size; i++) largest_one = x[i] > largest_one || x[i] != x[i] ? x[i] : largest_one;
    const int is_nan = largest_one != largest_one;
    for (i = 0; i + 1 < size; i++)
        if (is_nan ? x[i] != x[i] : x[i] == largest_one) break;
    return i;
}

/* to[r]: where the largest of the r-th row stands, the first of several; a NaN counts as the largest. */
void lorica_argmax(const float *x, int64_t rows, int64_t size, int64_t *to, int threads) {
    threads = rows * size < ALONE ? 1 : threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) to[r] = argmax(x + r * size, size);
}
