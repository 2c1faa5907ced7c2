/* Attention as in attention.c, for bfloat16 on processors that multiply it: AMX, or AVX-512 BF16 (see tiles.h).
 *
 * Products take bfloat16 and add up in float32; scores, softmax and all sums are float32, and weights and the gradients
 * of scores are rounded to bfloat16 where a product takes them. Every product is C += A B in squares of WIDTH x WIDTH,
 * two tiles by two: A by row, B in panels of WIDTH columns whose rows hold pairs of elements. So keys are kept as
 * columns for the scores and as pairs of rows for the queries' gradient. Gradients of keys and values are summed
 * transposed, [width, keys]: then scores serve as B, and to pair their rows needs no shuffle.
 */
#include "numbers.h"

enum { WIDTH = 32 };                   /* of a square, and of a panel */
enum { QUERIES = 64, KEYS = 128 };
_Static_assert(QUERIES == 2 * WIDTH && KEYS % WIDTH == 0 && WIDTH % LANES == 0, "blocks are whole squares");

typedef uint16_t bfloat16;
typedef uint32_t pair; /* of bfloat16, the first in the lower half */
typedef words unaligned_words __attribute__((aligned(4), may_alias));
typedef uint16_t unaligned_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* value_width is the width of values, width that of queries and keys. */
typedef struct {
    int64_t width, value_width;
    bfloat16 *query, *grad;               /* [QUERIES, a width] */
    bfloat16 *query_turned, *grad_turned; /* [a width, QUERIES] */
    float *scores, *grad_scores;          /* [QUERIES, KEYS] */
    bfloat16 *weights;                    /* [QUERIES, KEYS]: of the values, or the gradients of scores */
    pair *paired, *grad_paired;           /* weights, and gradients of scores: [KEYS / WIDTH, QUERIES / 2, WIDTH] */
    float *out;                           /* [QUERIES, either width]: the output, or the queries' gradient */
    bfloat16 *rows;                       /* [WIDTH, either width] */
    pair *pairs;                          /* [QUERIES / 2, either width] */
    pair *key_columns, *value_columns;    /* panels of keys: [keys / WIDTH, a width / 2, WIDTH] */
    pair *keys, *values;                  /* panels of features: [a width / WIDTH, keys / 2, WIDTH] */
} Scratch;

#include "attention.h"
#include "tiles.h"

/* ------------------------------------------------------------------ rearranging */

/* to[c] = the pair of low[c] and high[c] */
static void pair_rows(const bfloat16 *low, const bfloat16 *high, int64_t width, pair *to) {
    for (int64_t c = 0; c < width; c++) to[c] = low[c] | (pair)high[c] << 16;
}

/* Row r of pairs into panels of `length` rows. */
static void pack_pairs(const pair *from, int64_t width, pair *to, int64_t length, int64_t r) {
    for (int64_t c = 0; c < width; c += WIDTH) memcpy(to + (c * length + r * WIDTH), from + c, WIDTH * sizeof(pair));
}

/* Rounded to nearest even in the upper half; a NaN stays one, as all do that arithmetic makes. */
static INLINE words rounded_halves(floats x) {
    const words bits = (words)x;
    return bits + 0x7fff + (bits >> 16 & 1);
}

static void round_row(const float *from, int64_t columns, bfloat16 *to) {
    for (int64_t j = 0; j < columns; j += LANES)
        *(unaligned_halves *)(to + j) = __builtin_convertvector(
            rounded_halves(*(const unaligned_floats *)(from + j)) >> 16, unaligned_halves);
}

/* Two rows, rounded, as a row of pairs in panels of QUERIES / 2 rows. */
static void round_pair(const float *low, const float *high, int64_t columns, pair *to) {
    for (int64_t j = 0; j < columns; j += LANES)
        *(unaligned_words *)(to + j / WIDTH * (QUERIES / 2 * WIDTH) + j % WIDTH) =
            rounded_halves(*(const unaligned_floats *)(low + j)) >> 16 |
            (rounded_halves(*(const unaligned_floats *)(high + j)) & 0xffff0000);
}

/* ------------------------------------------------------------------ products */

/* c [WIDTH, WIDTH] = (is_added ? c : 0) + A [WIDTH, depth] B; b: `depth` / 2 rows of a panel. */
static INLINE void multiply(float *c, int64_t c_row, const bfloat16 *a, int64_t a_row, const pair *b, int64_t depth,
                            const int is_added) {
    const int64_t c_stride = c_row * 4, a_stride = a_row * 2, b_stride = WIDTH * 4;
    float *below = c + TILE_ROWS * c_row;
    MEMORY_IS_READ(c);
    if (is_added) {
        tile_load(0, c, c_stride);
        tile_load(1, c + 16, c_stride);
        tile_load(2, below, c_stride);
        tile_load(3, below + 16, c_stride);
    } else {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
        tile_load(4, a + k, a_stride);
        tile_load(5, a + TILE_ROWS * a_row + k, a_stride);
        tile_load(6, b + k / 2 * WIDTH, b_stride);
        tile_load(7, b + k / 2 * WIDTH + 16, b_stride);
        tile_multiply(0, 4, 6);
        tile_multiply(1, 4, 7);
        tile_multiply(2, 5, 6);
        tile_multiply(3, 5, 7);
    }
    tile_store(0, c, c_stride);
    tile_store(1, c + 16, c_stride);
    tile_store(2, below, c_stride);
    tile_store(3, below + 16, c_stride);
}

/* How many columns of a block count for the WIDTH queries from `row` on. */
static int64_t columns_for(int64_t row, int64_t diagonal, int64_t columns) {
    const int64_t end = row + WIDTH + diagonal;
    return end <= 0 ? 0 : smaller(columns, rounded(end, WIDTH));
}

/* scores [rows, columns] = A [rows, width] B, as far as they count */
static void scores_of(float *scores, const bfloat16 *a, int64_t width, const pair *b, int64_t rows, int64_t columns,
                      int64_t diagonal) {
    for (int64_t row = 0; row < rows; row += WIDTH)
        for (int64_t column = 0; column < columns_for(row, diagonal, columns); column += WIDTH)
            multiply(scores + row * KEYS + column, KEYS, a + row * width, width, b + column * width / 2, width, 0);
}

/* c [rows, width] += weights [rows, columns] B, whose panels have `keys` keys */
static void add_weights_times(float *c, const bfloat16 *weights, const pair *b, int64_t keys, int64_t rows,
                              int64_t width, int64_t columns, int64_t diagonal) {
    for (int64_t row = 0; row < rows; row += WIDTH) {
        const int64_t depth = columns_for(row, diagonal, columns);
        for (int64_t feature = 0; depth && feature < width; feature += WIDTH)
            multiply(c + row * width + feature, width, weights + row * KEYS, KEYS, b + feature * keys / 2, depth, 1);
    }
}

/* c [width, columns] += A [width, rows] weights [rows, columns]; c: panels [columns / WIDTH, width, WIDTH] */
static void add_times_weights(float *c, const bfloat16 *a, const pair *weights, int64_t rows, int64_t width,
                              int64_t columns, int64_t diagonal) {
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const int64_t begin = column > diagonal ? (column - diagonal) / WIDTH * WIDTH : 0;
        for (int64_t feature = 0; begin < rows && feature < width; feature += WIDTH)
            multiply(c + column * width + feature * WIDTH, WIDTH, a + feature * QUERIES + begin, QUERIES,
                     weights + column * QUERIES / 2 + begin * WIDTH / 2, rows - begin, 1);
    }
}

/* ------------------------------------------------------------------ work */

static int64_t room_for(const Attention *a, Sample s) { return rounded(a->prefix + s.num_keys, WIDTH); }

static int64_t lay_out(Scratch *w, const Attention *a, int64_t most_keys, int is_backward, char *memory) {
    const int64_t width = rounded(a->key.size, WIDTH), value_width = rounded(a->value.size, WIDTH);
    const int64_t wide = width > value_width ? width : value_width;
    int64_t used = 0;
    *w = (Scratch){.width = width, .value_width = value_width};
    w->query = part_of(memory, &used, QUERIES * width * 2);
    w->scores = part_of(memory, &used, QUERIES * KEYS * 4);
    w->weights = part_of(memory, &used, QUERIES * KEYS * 2);
    w->out = part_of(memory, &used, QUERIES * wide * 4);
    w->rows = part_of(memory, &used, WIDTH * wide * 2);
    w->pairs = part_of(memory, &used, QUERIES / 2 * wide * 4);
    w->key_columns = part_of(memory, &used, most_keys * width * 2);
    if (!is_backward) {
        w->values = part_of(memory, &used, most_keys * value_width * 2);
        return used;
    }
    w->value_columns = part_of(memory, &used, most_keys * value_width * 2);
    w->keys = part_of(memory, &used, most_keys * width * 2);
    w->query_turned = part_of(memory, &used, QUERIES * width * 2);
    w->grad = part_of(memory, &used, QUERIES * value_width * 2);
    w->grad_turned = part_of(memory, &used, QUERIES * value_width * 2);
    w->grad_scores = part_of(memory, &used, QUERIES * KEYS * 4);
    w->paired = part_of(memory, &used, QUERIES * KEYS * 2);
    w->grad_paired = part_of(memory, &used, QUERIES * KEYS * 2);
    return used;
}

static const bfloat16 *row_at(const Tensor4 *t, int64_t row, int64_t head, int64_t token) {
    return (const bfloat16 *)t->data + row * t->row + head * t->head + token * t->token;
}

/* Keys (or values) of a sample and the prefix before them, as columns and as pairs of rows; NULL: not as these. Filled
 * up with zeros. */
static void pack_keys(const Attention *a, const Tensor4 *t, const void *prefix, Sample s, int64_t head, Scratch *w,
                      pair *columns, pair *pairs) {
    const int64_t keys = a->prefix + s.num_keys, padded = room_for(a, s), width = rounded(t->size, WIDTH);
    const int64_t bytes = t->size * (int64_t)sizeof(bfloat16);
    memset(w->rows, 0, WIDTH * width * sizeof(bfloat16));
    for (int64_t j = 0; j < padded; j++) {
        bfloat16 *row = w->rows + j % WIDTH * width;
        if (j >= keys) memset(row, 0, width * sizeof(bfloat16));
        else if (j >= a->prefix) memcpy(row, row_at(t, s.row, head, s.key + j - a->prefix), bytes);
        else memcpy(row, (const bfloat16 *)prefix + (head * a->prefix + j) * t->size, bytes);
        if (pairs && j % 2) {
            pair_rows(row - width, row, width, w->pairs);
            pack_pairs(w->pairs, width, pairs, padded / 2, j / 2);
        }
        if (columns && j % WIDTH == WIDTH - 1)
            pack_columns((const float *)w->rows, width / 2, (float *)(columns + (j - WIDTH + 1) * width / 2));
    }
}

/* The block's queries (or gradients) by row, filled up with zeros; and turned, unless that is NULL. */
static int64_t take_queries(Sample s, const Tensor4 *from, int64_t head, int64_t first, Scratch *w, bfloat16 *to,
                            bfloat16 *turned) {
    const int64_t count = smaller(QUERIES, s.num_queries - first), width = rounded(from->size, WIDTH);
    for (int64_t i = 0; i < count; i++)
        memcpy(to + i * width, row_at(from, s.row, head, s.query + first + i), from->size * sizeof(bfloat16));
    memset(to + count * width, 0, (QUERIES - count) * width * sizeof(bfloat16));
    if (turned) { /* columns of pairs of rows are rows of the transpose */
        for (int64_t i = 0; i < QUERIES; i += 2)
            pair_rows(to + i * width, to + (i + 1) * width, width, w->pairs + i / 2 * width);
        pack_columns((const float *)w->pairs, width, (float *)turned);
    }
    return count;
}

/* Products of queries and keys become exponents of 2. */
static INLINE void scale_scores(const Attention *a, int64_t columns, float *scores) {
    const float factor = a->scale * LOG2_E;
    for (int64_t j = 0; j < columns; j += LANES) *(unaligned_floats *)(scores + j) *= factor;
}

/* ------------------------------------------------------------------ forward */

static void forward_head(const Attention *a, Sample s, int64_t head, int64_t first, Scratch *w, int64_t num_keys) {
    const int64_t count = take_queries(s, &a->query, head, first, w, w->query, NULL);
    const int64_t rows = rounded(count, WIDTH), width = w->value_width;
    float most[QUERIES], sums[QUERIES];
    for (int64_t i = 0; i < QUERIES; i++) begin_row(a, head, most + i, sums + i);
    memset(w->out, 0, rows * width * sizeof(float));
    int64_t block, end;
    key_blocks(a, s, first, count, &block, &end);
    for (; block < end; block += KEYS) {
        const int64_t columns = smaller(KEYS, rounded(end - block, WIDTH));
        const int64_t diagonal = diagonal_of(a, s, first, block);
        scores_of(w->scores, w->query, w->width, w->key_columns + block * w->width / 2, rows, columns, diagonal);
        for (int64_t i = 0; i < count; i++) {
            float *scores = w->scores + i * KEYS;
            const int64_t some = columns_for(i / WIDTH * WIDTH, diagonal, columns);
            if (!some) continue;
            scale_scores(a, some, scores);
            finish_scores(a, s, first + i, block, some, scores);
            take_scores(scores, some, most + i, sums + i, w->out + i * width, width);
            if (a->dropout > 0) drop(a, s, first + i, head, block, some, scores);
            round_row(scores, some, w->weights + i * KEYS);
        }
        add_weights_times(w->out, w->weights, w->values + block * WIDTH / 2, num_keys, rows, width, columns, diagonal);
    }
    for (int64_t i = 0; i < count; i++) {
        float *row = w->out + i * width;
        const float factor = 1 / sums[i];
        for (int64_t c = 0; c < width; c++) row[c] *= factor;
        write_row(a, &a->out, s.row, head, s.query + first + i, row);
        a->log_sum[(s.position + first + i) * a->heads + head] = most[i] + log2f(sums[i]);
    }
}

static void forward_unit(const Attention *a, Sample s, int64_t key_head, int64_t part, int64_t parts, Scratch *w) {
    const int64_t padded = room_for(a, s), group = a->heads / a->key_heads;
    const TileConfig before = tiles_begin();
    pack_keys(a, &a->key, a->prefix_key, s, key_head, w, w->key_columns, NULL);
    pack_keys(a, &a->value, a->prefix_value, s, key_head, w, NULL, w->values);
    for (int64_t first = part * QUERIES; first < s.num_queries; first += parts * QUERIES)
        for (int64_t g = 0; g < group; g++) forward_head(a, s, key_head * group + g, first, w, padded);
    tiles_end(before);
}

/* ------------------------------------------------------------------ backward */

/* grad_keys [width, keys] and grad_values [value_width, keys], in panels of keys, are added to. */
static void backward_head(const Attention *a, Sample s, int64_t head, int64_t first, Scratch *w, int64_t num_keys,
                          float *grad_keys, float *grad_values) {
    const int64_t width = w->width, value_width = w->value_width;
    const int64_t count = take_queries(s, &a->query, head, first, w, w->query, w->query_turned);
    take_queries(s, &a->grad, head, first, w, w->grad, w->grad_turned);
    const int64_t rows = rounded(count, WIDTH);
    float along[QUERIES]; /* the gradient's product with the output, which is its mean over the keys */
    for (int64_t i = 0; i < count; i++) {
        float *out = w->out, *grad = w->out + value_width;
        read_row(a, &a->out, s.row, head, s.query + first + i, out);
        read_row(a, &a->grad, s.row, head, s.query + first + i, grad);
        along[i] = 0;
        for (int64_t c = 0; c < a->out.size; c++) along[i] += out[c] * grad[c];
        take_sink(a, s, first + i, head, along[i]);
    }
    memset(w->out, 0, rows * width * sizeof(float));
    int64_t block, end;
    key_blocks(a, s, first, count, &block, &end);
    for (; block < end; block += KEYS) {
        const int64_t columns = smaller(KEYS, rounded(end - block, WIDTH));
        const int64_t diagonal = diagonal_of(a, s, first, block);
        scores_of(w->scores, w->query, width, w->key_columns + block * width / 2, rows, columns, diagonal);
        scores_of(w->grad_scores, w->grad, value_width, w->value_columns + block * value_width / 2, rows, columns,
                  diagonal);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t some = columns_for(i / WIDTH * WIDTH, diagonal, columns);
            float *scores = w->scores + i * KEYS, *grad_scores = w->grad_scores + i * KEYS;
            if (i < count) {
                scale_scores(a, some, scores);
                take_gradients(a, s, first + i, head, block, some, along[i], scores, grad_scores);
            } else {
                memset(scores, 0, some * sizeof(float));
                memset(grad_scores, 0, some * sizeof(float));
            }
            round_row(grad_scores, some, w->weights + i * KEYS);
            if (i % 2) {
                round_pair(scores - KEYS, scores, some, w->paired + i / 2 * WIDTH);
                round_pair(grad_scores - KEYS, grad_scores, some, w->grad_paired + i / 2 * WIDTH);
            }
        }
        add_times_weights(grad_values + block * value_width, w->grad_turned, w->paired, rows, value_width, columns,
                          diagonal);
        add_times_weights(grad_keys + block * width, w->query_turned, w->grad_paired, rows, width, columns, diagonal);
        add_weights_times(w->out, w->weights, w->keys + block * WIDTH / 2, num_keys, rows, width, columns, diagonal);
    }
    for (int64_t i = 0; i < count; i++) {
        float *row = w->out + i * width;
        for (int64_t c = 0; c < width; c++) row[c] *= a->scale;
        write_row(a, &a->grad_query, s.row, head, s.query + first + i, row);
    }
}

static void backward_unit(const Attention *a, Sample s, int64_t key_head, int64_t part, int64_t parts, Scratch *w,
                          float *grad_keys, float *grad_values) {
    const int64_t padded = room_for(a, s), group = a->heads / a->key_heads;
    const TileConfig before = tiles_begin();
    pack_keys(a, &a->key, a->prefix_key, s, key_head, w, w->key_columns, w->keys);
    pack_keys(a, &a->value, a->prefix_value, s, key_head, w, w->value_columns, NULL);
    memset(grad_keys, 0, padded * w->width * sizeof(float));
    memset(grad_values, 0, padded * w->value_width * sizeof(float));
    for (int64_t first = part * QUERIES; first < s.num_queries; first += parts * QUERIES)
        for (int64_t g = 0; g < group; g++)
            backward_head(a, s, key_head * group + g, first, w, padded, grad_keys, grad_values);
    tiles_end(before);
}

static void add_row(const float *sums, int64_t width, int64_t j, float *row) {
    const float *panel = sums + j / WIDTH * WIDTH * width + j % WIDTH;
    for (int64_t c = 0; c < width; c++) row[c] += panel[c * WIDTH];
}

static float factor_of_keys(const Attention *a) { return a->scale; }

/* Whether the processor's tiles may be used. */
int lorica_tiles_are_lent(void) { return tiles_are_lent(); }
