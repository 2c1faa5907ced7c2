/* The samples of attention, what a query sees of them, and what becomes of its scores: capping, softmax and dropout,
 * and their gradients.
 *
 * Scores are exponents of 2: those of the formula times log2(e). In the space of keys the prefix comes first: key j is
 * prefix j, or the sample's own j - prefix.
 */
#pragma once

#include "numbers.h"

typedef struct {
    char *data;
    int64_t row, head, token; /* strides in elements */
    int64_t size;             /* features of a head, which are adjacent */
} Tensor4;

typedef struct {
    int32_t type, causal;
    int64_t heads, key_heads, samples, prefix, window;
    float scale, softcap; /* scores become softcap * tanh(score / softcap); 0: they do not */
    double dropout;       /* the probability that a weight becomes 0, where the others become 1 / (1 - it) as large */
    const uint64_t *seed; /* of dropout */
    /* For each sample: its row, its first token and how many there are, of queries and of keys. The last query stands
     * at the last key. */
    const int64_t *borders;
    Tensor4 query, key, value, out, grad, grad_query, grad_key, grad_value;
    const void *prefix_key, *prefix_value;      /* [key_heads, prefix, size] */
    float *grad_prefix_key, *grad_prefix_value; /* the same shape, for each sample */
    const float *sinks; /* a score a head that has no value, not yet an exponent of 2; or NULL */
    float *log_sum;     /* log2 of the sum of 2^score, the sink's among them: [queries of all samples, heads] */
    float *grad_sinks;  /* of each query, the same shape; or NULL */
} Attention;

typedef struct { int64_t row, query, num_queries, key, num_keys, position; } Sample;

static Sample sample_of(const Attention *a, int64_t index) {
    const int64_t *b = a->borders + 6 * index;
    return (Sample){b[0], b[1], b[2], b[3], b[4], b[5]};
}

static int64_t rounded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* Which keys query i of a sample sees beside the prefix: from *first to *end, in the space of keys. */
static INLINE void seen(const Attention *a, Sample s, int64_t i, int64_t *first, int64_t *end) {
    const int64_t place = i + s.num_keys - s.num_queries;
    *end = a->prefix + (a->causal ? place + 1 : s.num_keys);
    *first = a->prefix + (place + 1 > a->window ? place + 1 - a->window : 0);
}

/* ------------------------------------------------------------------ rows of numbers */

static void read_row(const Attention *a, const Tensor4 *t, int64_t row, int64_t head, int64_t token, float *to) {
    load(to, t->data, a->type, row * t->row + head * t->head + token * t->token, t->size);
}

static void write_row(const Attention *a, const Tensor4 *t, int64_t row, int64_t head, int64_t token, const float *x) {
    save(t->data, a->type, row * t->row + head * t->head + token * t->token, x, t->size);
}

/* Key or value j of a sample, the prefix's or its own. */
static void read_key(const Attention *a, const Tensor4 *t, const void *prefix, Sample s, int64_t head, int64_t j,
                     float *to) {
    if (j < a->prefix) load(to, prefix, a->type, (head * a->prefix + j) * t->size, t->size);
    else read_row(a, t, s.row, head, s.key + j - a->prefix, to);
}

/* ------------------------------------------------------------------ blocks of scores */

/* The blocks of keys that a block of queries sees: whole blocks from *first to *end, the prefix's among them. */
static void key_blocks(const Attention *a, Sample s, int64_t query, int64_t count, int64_t *first, int64_t *end) {
    int64_t ignored;
    seen(a, s, query, first, &ignored);
    seen(a, s, query + count - 1, &ignored, end);
    *first = a->prefix ? 0 : *first / KEYS * KEYS;
}

/* Query i and a block of keys: the last column that it sees is i - first + diagonal. */
static int64_t diagonal_of(const Attention *a, Sample s, int64_t first, int64_t block) {
    return a->causal ? a->prefix + first + s.num_keys - s.num_queries - block : a->prefix + s.num_keys - 1 - block;
}

/* Minus infinity for those of a block's first columns that query i does not see. */
static INLINE void hide(const Attention *a, Sample s, int64_t i, int64_t block, int64_t columns, float *scores) {
    int64_t low, high;
    seen(a, s, i, &low, &high);
    low -= block, high -= block;
    for (int64_t j = a->prefix > block ? a->prefix - block : 0; j < smaller(low, columns); j++) scores[j] = -INFINITY;
    for (int64_t j = high < 0 ? 0 : high; j < columns; j++) scores[j] = -INFINITY;
}

/* A block's first columns for query i, as the softmax takes them. */
static INLINE void finish_scores(const Attention *a, Sample s, int64_t i, int64_t block, int64_t columns,
                                 float *scores) {
    if (a->softcap) {
        const float most = a->softcap * LOG2_E, each = 1 / most;
        unaligned_floats *row = (unaligned_floats *)scores;
        for (int64_t j = 0; j < columns / LANES; j++) row[j] = most * tanh_of(row[j] * each);
    }
    hide(a, s, i, block, columns, scores);
}

/* What a query's softmax starts from. */
static void begin_row(const Attention *a, int64_t head, float *most, float *sum) {
    *most = a->sinks ? a->sinks[head] * LOG2_E : -INFINITY;
    *sum = a->sinks ? 1 : 0;
}

/* One more block of scores into a query's running maximum, sum and output. */
static void take_scores(float *scores, int64_t columns, float *most, float *sum, float *out, int64_t width) {
    unaligned_floats *row = (unaligned_floats *)scores;
    floats top = row[0];
    for (int64_t j = 1; j < columns / LANES; j++) top = choose(row[j] > top, row[j], top);
    float now = *most;
    for (int i = 0; i < LANES; i++) now = top[i] > now ? top[i] : now;
    if (now == -INFINITY) { /* nothing to see in this block, or nothing but NaN */
        for (int64_t j = 0; j < columns; j++) *sum += scores[j] == scores[j] ? 0 : scores[j];
        memset(scores, 0, columns * sizeof(float));
        return;
    }
    floats total = {0};
    for (int64_t j = 0; j < columns / LANES; j++) {
        row[j] = exp2_of(row[j] - now);
        total += row[j];
    }
    if (now != *most) {
        const float factor = exp2f(*most - now);
        *sum *= factor;
        for (int64_t c = 0; c < width; c++) out[c] *= factor;
    }
    *sum += sum_of(total);
    *most = now;
}

/* ------------------------------------------------------------------ dropout */

/* Random numbers of one query's keys: a counter of its own start and step, mixed. So what is drawn depends on seed,
 * head, query and key alone, and is drawn again in backward. (With one step for all queries and only the start its own,
 * keys at some distances are dropped together too often, by 5 to 20 standard errors over 4 * 10^7 pairs.) */
typedef struct {
    words counter, step;
    int32_t limit; /* what is drawn, as a signed number, is kept above this */
    float factor;
} Draws;

static INLINE Draws draws_of(const Attention *a, Sample s, int64_t i, int64_t head, int64_t block) {
    /* SplitMix64 (doi 10.1145/2660193.2660195) at the place that head and query make. */
    uint64_t place = *a->seed + ((uint64_t)head << 32 | (uint32_t)(s.position + i)) * 0x9e3779b97f4a7c15;
    place = (place ^ place >> 30) * 0xbf58476d1ce4e5b9;
    place = (place ^ place >> 27) * 0x94d049bb133111eb;
    place ^= place >> 31;
    const uint32_t step = (uint32_t)place | 1, first = (uint32_t)(block - a->prefix);
    words key = {0};
    for (uint32_t lane = 0; lane < LANES; lane++) key[lane] = first + lane;
    return (Draws){
        .counter = (uint32_t)(place >> 32) + step * key,
        .step = (words){0} + step * LANES,
        .limit = (int32_t)(a->dropout * 0x1p32 - 0x1p31 - 1),
        .factor = a->dropout < 1 ? (float)(1 / (1 - a->dropout)) : 0,
    };
}

/* Of the next keys, what dropout multiplies their weights by. The factors are those of hash-prospector's lowbias32. */
static INLINE floats draw(Draws *draws) {
    words x = draws->counter;
    draws->counter += draws->step;
    x = (x ^ x >> 16) * 0x7feb352d;
    x = (x ^ x >> 15) * 0x846ca68b;
    return (floats)(((integers)x > draws->limit) & (integers)((floats){0} + draws->factor));
}

static void drop(const Attention *a, Sample s, int64_t i, int64_t head, int64_t block, int64_t columns,
                 float *weights) {
    Draws draws = draws_of(a, s, i, head, block);
    unaligned_floats *row = (unaligned_floats *)weights;
    for (int64_t j = 0; j < columns / LANES; j++) row[j] *= draw(&draws);
}

/* ------------------------------------------------------------------ gradients of scores */

/* See take_gradients; what is called for is known where it is compiled. */
static INLINE void gradients_of(const Attention *a, Draws draws, int64_t columns, float log_sum, float along,
                                float *scores, float *grad_scores, const int is_capped, const int is_thinned) {
    const float each = is_capped ? 1 / (a->softcap * LOG2_E) : 0;
    unaligned_floats *p = (unaligned_floats *)scores, *d = (unaligned_floats *)grad_scores;
    for (int64_t j = 0; j < columns / LANES; j++) {
        const floats score = p[j];
        floats weight = exp2_of(score - log_sum), grad = d[j], keep;
        if (is_thinned) grad *= keep = draw(&draws);
        grad = weight * (grad - along);
        if (is_capped) { /* times 1 - tanh^2; what is not seen, minus infinity, gets 0 */
            const floats tanh = score * each;
            grad *= 1.0f - choose(tanh > -1.0f, tanh * tanh, (floats){0} + 1.0f);
        }
        d[j] = grad;
        p[j] = is_thinned ? weight * keep : weight;
    }
}

/* Query i's scores become its weights as dropout leaves them, and these weights' gradients become the scores'. `along`
 * is the mean of the gradients, which is the output's gradient times the output. */
static void take_gradients(const Attention *a, Sample s, int64_t i, int64_t head, int64_t block, int64_t columns,
                           float along, float *scores, float *grad_scores) {
    const float log_sum = a->log_sum[(s.position + i) * a->heads + head];
    const Draws draws = a->dropout > 0 ? draws_of(a, s, i, head, block) : (Draws){0};
    finish_scores(a, s, i, block, columns, scores);
    if (a->dropout > 0) gradients_of(a, draws, columns, log_sum, along, scores, grad_scores, a->softcap > 0, 1);
    else if (a->softcap > 0) gradients_of(a, draws, columns, log_sum, along, scores, grad_scores, 1, 0);
    else gradients_of(a, draws, columns, log_sum, along, scores, grad_scores, 0, 0);
}

/* The sink's share in the gradient, which has a weight but no value. */
static void take_sink(const Attention *a, Sample s, int64_t i, int64_t head, float along) {
    const int64_t place = (s.position + i) * a->heads + head;
    if (a->grad_sinks) a->grad_sinks[place] = -along * exp2f(a->sinks[head] * LOG2_E - a->log_sum[place]);
}
