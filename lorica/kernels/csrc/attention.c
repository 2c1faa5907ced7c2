/* Attention of packed samples and its gradient: softmax(scale q k^T) v, causal, with windows, prefixes and shared keys.
 *
 * A sample's scores exist one block of QUERIES x KEYS at a time (FlashAttention, arXiv 2205.14135); what is kept of
 * them is a number a query. All arithmetic is float32, whatever the tensors are. Every product has the form C += A B: A
 * is read element by element, row by row or column by column, and B in panels of WIDTH columns that are packed once for
 * all that they meet.
 */
#include "numbers.h"

/* Of a tile: the sums that fill most of the registers (24 of 32, 12 of 16), each of two vectors. */
enum { ROWS = SIMD == 512 ? 12 : SIMD == 256 ? 6 : 2 };
enum { WIDTH = 2 * LANES }; /* columns of a tile, and of a panel */
enum { QUERIES = 48, KEYS = 96 };
_Static_assert(QUERIES % ROWS == 0 && KEYS % ROWS == 0 && KEYS % WIDTH == 0 && ROWS <= LANES, "blocks are whole tiles");

/* All floats; value_width is the width of values, width that of queries and keys. */
typedef struct {
    int64_t width, value_width;
    float *query, *query_panels; /* [QUERIES, width]: by row, and as panels */
    float *grad, *grad_panels;   /* [QUERIES, value_width]: the output's gradient, likewise */
    float *scores, *grad_scores; /* [QUERIES, KEYS] */
    float *out;                  /* [QUERIES, either width]: the output, or the queries' gradient */
    float *rows;                 /* [WIDTH, either width] */
    float *key_columns, *value_columns; /* panels of keys: [keys / WIDTH, a width, WIDTH] */
    float *keys, *values;               /* panels of features: [a width / WIDTH, keys, WIDTH] */
} Scratch;

#include "attention.h"

/* ------------------------------------------------------------------ products */

/* Row r into panels of `length` rows: to[p][r][c] = from[p * WIDTH + c]. */
static void pack_row(const float *from, int64_t width, float *to, int64_t length, int64_t r) {
    for (int64_t c = 0; c < width; c += WIDTH) memcpy(to + (c * length + r * WIDTH), from + c, WIDTH * sizeof(float));
}

/* C[rows, columns] = (is_added ? C : 0) + A B, in tiles; rows are filled up to whole tiles, and columns too.
 *
 * A[i, k] stands at i * across + k * along; B is panels of `depth` rows, one each `panel` floats. Of scores only those
 * of seen keys count, of query i with keys up to i + diagonal: tiles of C without any are left as they are (C the
 * scores), and zeros of A are passed over, at its end (A the scores) or at its beginning (A their transpose).
 */
enum { C_IS_SCORES, A_IS_SCORES, A_IS_TRANSPOSED };

static INLINE void product(float *c, int64_t c_row, const float *a, int64_t across, int64_t along, const float *b,
                           int64_t panel, int64_t rows, int64_t columns, int64_t depth, int64_t diagonal,
                           const int kind) {
    for (int64_t column = 0; column < columns; column += WIDTH, b += panel) {
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t last = row + ROWS - 1 + diagonal;
            if (kind == C_IS_SCORES && column > last) continue;
            const int64_t begin = kind == A_IS_TRANSPOSED && row > diagonal ? row - diagonal : 0;
            const int64_t end = kind == A_IS_SCORES ? smaller(depth, last + 1) : depth;
            floats sums[ROWS][2];
            const float *here = a + row * across;
            float *to = c + row * c_row + column;
            _Pragma("GCC unroll 12") for (int i = 0; i < ROWS; i++) {
                sums[i][0] = sums[i][1] = (floats){0};
                if (kind != C_IS_SCORES) {
                    sums[i][0] = *(const unaligned_floats *)(to + i * c_row);
                    sums[i][1] = *(const unaligned_floats *)(to + i * c_row + LANES);
                }
            }
            for (int64_t k = begin; k < end; k++) {
                const floats left = *(const unaligned_floats *)(b + k * WIDTH);
                const floats right = *(const unaligned_floats *)(b + k * WIDTH + LANES);
                _Pragma("GCC unroll 12") for (int i = 0; i < ROWS; i++) {
                    const float x = here[i * across + k * along];
                    sums[i][0] += x * left;
                    sums[i][1] += x * right;
                }
            }
            _Pragma("GCC unroll 12") for (int i = 0; i < ROWS; i++) {
                *(unaligned_floats *)(to + i * c_row) = sums[i][0];
                *(unaligned_floats *)(to + i * c_row + LANES) = sums[i][1];
            }
        }
    }
}

/* scores [rows, columns] = A [rows, depth] B */
static void scores_of(float *scores, const float *a, int64_t width, const float *b, int64_t rows, int64_t columns,
                      int64_t depth, int64_t diagonal) {
    product(scores, KEYS, a, width, 1, b, depth * WIDTH, rows, columns, depth, diagonal, C_IS_SCORES);
}

/* c [rows, width] += scores [rows, keys] B */
static void add_scores_times(float *c, const float *scores, const float *b, int64_t panel, int64_t rows, int64_t width,
                             int64_t keys, int64_t diagonal) {
    product(c, width, scores, KEYS, 1, b, panel, rows, width, keys, diagonal, A_IS_SCORES);
}

/* c [keys, width] += scores [queries, keys] transposed, times B */
static void add_transposed_times(float *c, const float *scores, const float *b, int64_t keys, int64_t width,
                                 int64_t queries, int64_t diagonal) {
    product(c, width, scores, 1, KEYS, b, QUERIES * WIDTH, keys, width, queries, diagonal, A_IS_TRANSPOSED);
}

/* ------------------------------------------------------------------ work */

static int64_t room_for(const Attention *a, Sample s) { return rounded(a->prefix + s.num_keys + ROWS - 1, WIDTH); }

static int64_t lay_out(Scratch *w, const Attention *a, int64_t most_keys, int is_backward, char *memory) {
    const int64_t width = rounded(a->key.size, WIDTH), value_width = rounded(a->value.size, WIDTH);
    const int64_t wide = 4 * (width > value_width ? width : value_width);
    int64_t used = 0;
    *w = (Scratch){.width = width, .value_width = value_width};
    w->query = part_of(memory, &used, QUERIES * width * 4);
    w->scores = part_of(memory, &used, QUERIES * KEYS * 4);
    w->out = part_of(memory, &used, QUERIES * wide);
    w->rows = part_of(memory, &used, WIDTH * wide);
    w->key_columns = part_of(memory, &used, most_keys * width * 4);
    if (!is_backward) {
        w->values = part_of(memory, &used, most_keys * value_width * 4);
        return used;
    }
    w->value_columns = part_of(memory, &used, most_keys * value_width * 4);
    w->keys = part_of(memory, &used, most_keys * width * 4);
    w->query_panels = part_of(memory, &used, QUERIES * width * 4);
    w->grad = part_of(memory, &used, QUERIES * value_width * 4);
    w->grad_panels = part_of(memory, &used, QUERIES * value_width * 4);
    w->grad_scores = part_of(memory, &used, QUERIES * KEYS * 4);
    return used;
}

/* Keys (or values) of a sample and the prefix before them, as panels of columns and as panels of rows; NULL: not as
 * these. Filled up with zeros. */
static void pack_keys(const Attention *a, const Tensor4 *t, const void *prefix, Sample s, int64_t head, Scratch *w,
                      float *columns, float *rows) {
    const int64_t keys = a->prefix + s.num_keys, padded = room_for(a, s), width = rounded(t->size, WIDTH);
    memset(w->rows, 0, WIDTH * width * sizeof(float));
    for (int64_t j = 0; j < padded; j++) {
        float *row = w->rows + j % WIDTH * width;
        if (j < keys) read_key(a, t, prefix, s, head, j, row);
        else memset(row, 0, width * sizeof(float));
        if (rows) pack_row(row, width, rows, padded, j);
        if (columns && j % WIDTH == WIDTH - 1) pack_columns(w->rows, width, columns + (j - WIDTH + 1) * width);
    }
}

/* The block's queries, times `factor`, by row; rows beyond the last are zero. */
static int64_t take_queries(const Attention *a, Sample s, const Tensor4 *from, int64_t head, int64_t first,
                            float factor, float *to) {
    const int64_t count = smaller(QUERIES, s.num_queries - first), width = rounded(from->size, WIDTH);
    for (int64_t i = 0; i < count; i++) {
        float *row = to + i * width;
        read_row(a, from, s.row, head, s.query + first + i, row);
        for (int64_t c = 0; c < from->size; c++) row[c] *= factor;
    }
    memset(to + count * width, 0, (rounded(count, ROWS) - count) * width * sizeof(float));
    return count;
}

/* How many columns of a block count for query i: those that it sees, and as many more as a tile has rows, since a tile
 * reads them. */
static INLINE int64_t columns_for(int64_t i, int64_t diagonal, int64_t columns) {
    const int64_t end = i + diagonal + 1;
    return smaller(columns, (end < 0 ? 0 : rounded(end, LANES)) + LANES);
}

/* ------------------------------------------------------------------ forward */

static void forward_head(const Attention *a, Sample s, int64_t head, int64_t first, Scratch *w, int64_t num_keys) {
    const int64_t count = take_queries(a, s, &a->query, head, first, a->scale * LOG2_E, w->query);
    const int64_t rows = rounded(count, ROWS), width = w->value_width;
    float most[QUERIES], sums[QUERIES];
    for (int64_t i = 0; i < QUERIES; i++) begin_row(a, head, most + i, sums + i);
    memset(w->out, 0, rows * width * sizeof(float));
    int64_t block, end;
    key_blocks(a, s, first, count, &block, &end);
    for (; block < end; block += KEYS) {
        const int64_t columns = smaller(KEYS, rounded(end - block, WIDTH));
        const int64_t diagonal = diagonal_of(a, s, first, block);
        scores_of(w->scores, w->query, w->width, w->key_columns + block * w->width, rows, columns, w->width, diagonal);
        for (int64_t i = 0; i < count; i++) {
            float *scores = w->scores + i * KEYS;
            const int64_t some = columns_for(i, diagonal, columns);
            finish_scores(a, s, first + i, block, some, scores);
            take_scores(scores, some, most + i, sums + i, w->out + i * width, width);
            if (a->dropout > 0) drop(a, s, first + i, head, block, some, scores);
        }
        add_scores_times(w->out, w->scores, w->values + block * WIDTH, num_keys * WIDTH, rows, width,
                         smaller(KEYS, end - block), diagonal);
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
    pack_keys(a, &a->key, a->prefix_key, s, key_head, w, w->key_columns, NULL);
    pack_keys(a, &a->value, a->prefix_value, s, key_head, w, NULL, w->values);
    for (int64_t first = part * QUERIES; first < s.num_queries; first += parts * QUERIES)
        for (int64_t g = 0; g < group; g++) forward_head(a, s, key_head * group + g, first, w, padded);
}

/* ------------------------------------------------------------------ backward */

static void add_row(const float *sums, int64_t width, int64_t j, float *row) {
    for (int64_t c = 0; c < width; c++) row[c] += sums[j * width + c];
}

/* They hold the queries times scale * log2(e). */
static float factor_of_keys(const Attention *a) {
    (void)a;
    return 0.693147181f;
}

/* grad_keys [keys, width] and grad_values [keys, value_width] are added to. */
static void backward_head(const Attention *a, Sample s, int64_t head, int64_t first, Scratch *w, int64_t num_keys,
                          float *grad_keys, float *grad_values) {
    const int64_t width = w->width, value_width = w->value_width;
    const int64_t count = take_queries(a, s, &a->query, head, first, a->scale * LOG2_E, w->query);
    take_queries(a, s, &a->grad, head, first, 1, w->grad);
    const int64_t rows = rounded(count, ROWS);
    float along[QUERIES]; /* the gradient's product with the output, which is its mean over the keys */
    for (int64_t i = 0; i < count; i++) {
        read_row(a, &a->out, s.row, head, s.query + first + i, w->rows);
        along[i] = 0;
        for (int64_t c = 0; c < a->out.size; c++) along[i] += w->rows[c] * w->grad[i * value_width + c];
        take_sink(a, s, first + i, head, along[i]);
        pack_row(w->query + i * width, width, w->query_panels, QUERIES, i);
        pack_row(w->grad + i * value_width, value_width, w->grad_panels, QUERIES, i);
    }
    memset(w->out, 0, rows * width * sizeof(float));
    int64_t block, end;
    key_blocks(a, s, first, count, &block, &end);
    for (; block < end; block += KEYS) {
        const int64_t keys = smaller(KEYS, end - block), columns = rounded(keys, WIDTH);
        const int64_t diagonal = diagonal_of(a, s, first, block);
        scores_of(w->scores, w->query, width, w->key_columns + block * width, rows, columns, width, diagonal);
        scores_of(w->grad_scores, w->grad, value_width, w->value_columns + block * value_width, rows, columns,
                  value_width, diagonal);
        for (int64_t i = 0; i < count; i++)
            take_gradients(a, s, first + i, head, block, columns_for(i, diagonal, columns), along[i],
                           w->scores + i * KEYS, w->grad_scores + i * KEYS);
        const int64_t filled = rounded(keys, ROWS);
        add_transposed_times(grad_values + block * value_width, w->scores, w->grad_panels, filled, value_width, count,
                             diagonal);
        add_transposed_times(grad_keys + block * width, w->grad_scores, w->query_panels, filled, width, count,
                             diagonal);
        add_scores_times(w->out, w->grad_scores, w->keys + block * WIDTH, num_keys * WIDTH, rows, width, keys,
                         diagonal);
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
    pack_keys(a, &a->key, a->prefix_key, s, key_head, w, w->key_columns, w->keys);
    pack_keys(a, &a->value, a->prefix_value, s, key_head, w, w->value_columns, NULL);
    memset(grad_keys, 0, padded * w->width * sizeof(float));
    memset(grad_values, 0, padded * w->value_width * sizeof(float));
    for (int64_t first = part * QUERIES; first < s.num_queries; first += parts * QUERIES)
        for (int64_t g = 0; g < group; g++)
            backward_head(a, s, key_head * group + g, first, w, padded, grad_keys, grad_values);
}
