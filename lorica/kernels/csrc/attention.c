/* Attention of packed samples and its gradient: softmax(scale q k^T) v, causal, with windows, prefixes and shared keys.
 *
 * A sample's scores exist one block of QUERIES x KEYS at a time (FlashAttention, arXiv 2205.14135); what is kept of
 * them is a number a query. All arithmetic is float32, whatever the tensors are. Every product has the form C += A B: A
 * is read element by element, row by row or column by column, and B in panels of WIDTH columns that are packed once for
 * all that they meet. A thread takes a sample and one head of keys, with all heads of queries that share it, so keys
 * and values are packed once for them; where these are too few for the threads, a sample's blocks of queries are dealt
 * out to several.
 *
 * In the space of keys the prefix comes first: key j is prefix j, or the sample's own j - prefix.
 */
#include "numbers.h"

/* Of a tile: the sums that fill most of the registers (24 of 32, 12 of 16), each of two vectors. */
enum { ROWS = SIMD == 512 ? 12 : SIMD == 256 ? 6 : 2 };
enum { WIDTH = 2 * LANES }; /* columns of a tile, and of a panel */
enum { QUERIES = 48, KEYS = 96 };
_Static_assert(QUERIES % ROWS == 0 && KEYS % ROWS == 0 && KEYS % WIDTH == 0 && ROWS <= LANES, "blocks are whole tiles");

typedef int32_t integers __attribute__((vector_size(4 * LANES)));

typedef struct {
    char *data;
    int64_t row, head, token; /* strides in elements */
    int64_t size;             /* features of a head, which are adjacent */
} Tensor4;

typedef struct {
    int32_t type, causal;
    int64_t heads, key_heads, samples, prefix, window;
    float scale;
    /* For each sample: its row, its first token and how many there are, of queries and of keys. The last query stands
     * at the last key. */
    const int64_t *borders;
    Tensor4 query, key, value, out, grad, grad_query, grad_key, grad_value;
    const void *prefix_key, *prefix_value;      /* [key_heads, prefix, size] */
    float *grad_prefix_key, *grad_prefix_value; /* the same shape, for each sample */
    float *log_sum; /* log2 of the sum of 2^score: [queries of all samples, heads] */
} Attention;

typedef struct { int64_t row, query, num_queries, key, num_keys, position; } Sample;

static Sample sample_of(const Attention *a, int64_t index) {
    const int64_t *b = a->borders + 6 * index;
    return (Sample){b[0], b[1], b[2], b[3], b[4], b[5]};
}

static int64_t rounded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* How many keys there is room for: whole panels, and whole tiles of rows. */
static int64_t room_for(const Attention *a, Sample s) { return rounded(a->prefix + s.num_keys + ROWS - 1, WIDTH); }

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

/* Where the mask is set a, else b. */
static inline floats choose(integers mask, floats a, floats b) {
    return (floats)((mask & (integers)a) | (~mask & (integers)b));
}

/* 2^x for x <= 0, to 1e-7 of the result; 0 below the smallest normal number. */
static inline floats exp2_of(floats x) {
    const float magic = 0x1.8p23f; /* adding it rounds to a whole number, which stands in the last bits */
    const integers small = x <= -126.0f; /* not set for a NaN, which stays one */
    const floats low = choose(small, (floats){0} - 126.0f, x);
    const floats shifted = low + magic, f = low - (shifted - magic);
    const floats power = (floats)(((integers)shifted - (int32_t)bits_of(magic) + 127) << 23);
    /* The polynomial nearest to 2^f for |f| <= 1/2. */
    floats y = f * 1.54352254e-4f + 1.33999557e-3f;
    y = y * f + 9.61804048e-3f;
    y = y * f + 5.55032795e-2f;
    y = y * f + 2.40226509e-1f;
    y = y * f + 6.93147182e-1f;
    y = y * f + 1.0f;
    return choose(small, (floats){0}, y * power);
}

static inline float sum_of(floats vector) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += vector[i];
    return sum;
}

/* ------------------------------------------------------------------ products */

/* Row r into panels of `length` rows: to[p][r][c] = from[p * WIDTH + c]. */
static void pack_row(const float *from, int64_t width, float *to, int64_t length, int64_t r) {
    for (int64_t c = 0; c < width; c += WIDTH) memcpy(to + (c * length + r * WIDTH), from + c, WIDTH * sizeof(float));
}

/* LANES vectors, of which element j of vector i becomes element i of vector j. */
static INLINE void transpose(floats *rows) {
    _Pragma("GCC unroll 4") for (int step = 1; step < LANES; step *= 2) {
        integers first, second;
        for (int i = 0; i < LANES; i++) {
            first[i] = i & step ? LANES + i - step : i;
            second[i] = i & step ? LANES + i : i + step;
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            const floats a = rows[i], b = rows[i + step];
            rows[i] = __builtin_shuffle(a, b, first);
            rows[i + step] = __builtin_shuffle(a, b, second);
        }
    }
}

/* WIDTH rows [WIDTH, width] into a panel of columns: to[c][r] = from[r][c]. */
static void pack_columns(const float *from, int64_t width, float *to) {
    for (int64_t c = 0; c < width; c += LANES) {
        for (int half = 0; half < WIDTH; half += LANES) {
            floats rows[LANES];
            for (int r = 0; r < LANES; r++) rows[r] = *(const unaligned_floats *)(from + (half + r) * width + c);
            transpose(rows);
            for (int r = 0; r < LANES; r++) *(unaligned_floats *)(to + (c + r) * WIDTH + half) = rows[r];
        }
    }
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

/* What a thread needs for one sample of the greatest length; all floats. A width is a size filled up to whole panels:
 * that of queries and keys, and that of values. */
typedef struct {
    int64_t width, value_width;
    float *query, *query_panels; /* [QUERIES, width]: by row, and as panels */
    float *grad, *grad_panels;   /* [QUERIES, value_width]: the output's gradient, likewise */
    float *scores, *grad_scores; /* [QUERIES, KEYS] */
    float *out;                  /* [QUERIES, either width]: the output, or the queries' gradient */
    float *rows;                 /* [WIDTH, either width] */
    float *key_columns, *value_columns; /* panels of keys: [keys / WIDTH, a width, WIDTH] */
    float *keys, *values;               /* panels of features: [a width / WIDTH, keys, WIDTH] */
    void *memory;
} Scratch;

static Scratch scratch_for(const Attention *a, int64_t most_keys, int is_backward) {
    Scratch s = {.width = rounded(a->key.size, WIDTH), .value_width = rounded(a->value.size, WIDTH)};
    const int64_t wide = s.width > s.value_width ? s.width : s.value_width;
    const struct { float **place; int64_t size; } parts[] = {
        {&s.query, QUERIES * s.width}, {&s.out, QUERIES * wide}, {&s.scores, QUERIES * KEYS}, {&s.rows, WIDTH * wide},
        {&s.key_columns, most_keys * s.width}, {is_backward ? &s.value_columns : &s.values, most_keys * s.value_width},
        /* Of the gradient alone. */
        {&s.query_panels, QUERIES * s.width}, {&s.grad, QUERIES * s.value_width},
        {&s.grad_panels, QUERIES * s.value_width}, {&s.grad_scores, QUERIES * KEYS}, {&s.keys, most_keys * s.width}};
    const int count = is_backward ? 11 : 6;
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += rounded(parts[i].size, 16);
    s.memory = calloc(total + 16, sizeof(float)); /* zeros: what fills panels and blocks up is read */
    if (!s.memory) return s;
    float *next = (float *)(((uintptr_t)s.memory + 63) & ~(uintptr_t)63);
    for (int i = 0; i < count; i++) {
        *parts[i].place = next;
        next += rounded(parts[i].size, 16);
    }
    return s;
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

/* How many columns of a block count for query i. What it does not see of them becomes minus infinity; a tile beyond its
 * last key reads as many more as a tile has rows. */
static INLINE int64_t hide(const Attention *a, Sample s, int64_t i, int64_t block, float *scores) {
    int64_t low, high;
    seen(a, s, i, &low, &high);
    low -= block, high -= block;
    high = high < 0 ? 0 : smaller(high, KEYS);
    const int64_t columns = smaller(KEYS, rounded(high, LANES) + LANES);
    for (int64_t j = a->prefix > block ? a->prefix - block : 0; j < smaller(low, columns); j++) scores[j] = -INFINITY;
    for (int64_t j = high; j < columns; j++) scores[j] = -INFINITY;
    return columns;
}

/* ------------------------------------------------------------------ forward */

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

static void forward_head(const Attention *a, Sample s, int64_t head, int64_t first, Scratch *w, int64_t num_keys) {
    const float log2e = 1.44269504f;
    const int64_t count = take_queries(a, s, &a->query, head, first, a->scale * log2e, w->query);
    const int64_t rows = rounded(count, ROWS), width = w->value_width;
    float most[QUERIES], sums[QUERIES];
    for (int64_t i = 0; i < QUERIES; i++) most[i] = -INFINITY, sums[i] = 0;
    memset(w->out, 0, rows * width * sizeof(float));
    int64_t block, end;
    key_blocks(a, s, first, count, &block, &end);
    for (; block < end; block += KEYS) {
        const int64_t columns = smaller(KEYS, rounded(end - block, WIDTH));
        const int64_t diagonal = diagonal_of(a, s, first, block);
        scores_of(w->scores, w->query, w->width, w->key_columns + block * w->width, rows, columns, w->width, diagonal);
        for (int64_t i = 0; i < count; i++) {
            float *scores = w->scores + i * KEYS;
            const int64_t seen_columns = hide(a, s, first + i, block, scores);
            take_scores(scores, seen_columns, most + i, sums + i, w->out + i * width, width);
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

/* grad_keys [keys, width] and grad_values [keys, value_width] are added to. */
static void backward_head(const Attention *a, Sample s, int64_t head, int64_t first, Scratch *w, int64_t num_keys,
                          float *grad_keys, float *grad_values) {
    const float log2e = 1.44269504f;
    const int64_t width = w->width, value_width = w->value_width;
    const int64_t count = take_queries(a, s, &a->query, head, first, a->scale * log2e, w->query);
    take_queries(a, s, &a->grad, head, first, 1, w->grad);
    const int64_t rows = rounded(count, ROWS);
    float along[QUERIES]; /* the gradient's product with the output, which is its mean over the keys */
    for (int64_t i = 0; i < count; i++) {
        read_row(a, &a->out, s.row, head, s.query + first + i, w->rows);
        along[i] = 0;
        for (int64_t c = 0; c < a->out.size; c++) along[i] += w->rows[c] * w->grad[i * value_width + c];
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
        for (int64_t i = 0; i < count; i++) {
            const float log_sum = a->log_sum[(s.position + first + i) * a->heads + head];
            const int64_t seen_columns = hide(a, s, first + i, block, w->scores + i * KEYS);
            unaligned_floats *p = (unaligned_floats *)(w->scores + i * KEYS);
            unaligned_floats *d = (unaligned_floats *)(w->grad_scores + i * KEYS);
            for (int64_t j = 0; j < seen_columns / LANES; j++) {
                p[j] = exp2_of(p[j] - log_sum);
                d[j] = p[j] * (d[j] - along[i]);
            }
        }
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

/* What all parts have summed, [keys, width] each, times `factor`: into the gradient `to`, and into the prefix's. */
static void give_gradient(const Attention *a, int64_t index, int64_t head, const Tensor4 *to, float *prefix,
                          float *const *sums, int64_t parts, float factor) {
    const Sample s = sample_of(a, index);
    const int64_t width = rounded(to->size, WIDTH);
    for (int64_t j = 0; j < a->prefix + s.num_keys; j++) {
        float *row = sums[0] + j * width;
        for (int64_t part = 1; part < parts; part++)
            for (int64_t c = 0; c < width; c++) row[c] += sums[part][j * width + c];
        for (int64_t c = 0; c < width; c++) row[c] *= factor;
        if (j >= a->prefix) write_row(a, to, s.row, head, s.key + j - a->prefix, row);
        else memcpy(prefix + ((index * a->key_heads + head) * a->prefix + j) * to->size, row, to->size * sizeof(float));
    }
}

static void give_gradients(const Attention *a, int64_t index, int64_t head, float *const *keys, float *const *values,
                           int64_t parts) {
    const float ln2 = 0.693147181f; /* the keys' sums hold the queries times scale * log2(e) */
    give_gradient(a, index, head, &a->grad_key, a->grad_prefix_key, keys, parts, ln2);
    give_gradient(a, index, head, &a->grad_value, a->grad_prefix_value, values, parts, 1);
}

/* ------------------------------------------------------------------ all samples */

#ifdef _OPENMP
#include <omp.h>
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_number(void) { return 0; }
#endif

static int64_t most_keys(const Attention *a) {
    int64_t most = 0;
    for (int64_t i = 0; i < a->samples; i++) {
        const int64_t keys = room_for(a, sample_of(a, i));
        most = keys > most ? keys : most;
    }
    return most;
}

/* Into how many parts a sample's queries are dealt out, so that all threads have work. */
static int64_t num_parts(const Attention *a, int threads) {
    const int64_t units = a->samples * a->key_heads;
    return threads == 1 || units >= 2 * threads ? 1 : (2 * threads + units - 1) / units;
}

/* 0 where memory ran out. */
int lorica_attention(const Attention *a, int threads) {
    const int64_t most = most_keys(a), parts = num_parts(a, threads);
    int is_done = 1;
#pragma omp parallel num_threads(threads)
    {
        Scratch w = scratch_for(a, most, 0);
        if (!w.memory) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < a->samples * a->key_heads * parts; unit++) {
            const int64_t pair = unit / parts;
            if (w.memory)
                forward_unit(a, sample_of(a, pair / a->key_heads), pair % a->key_heads, unit % parts, parts, &w);
        }
        free(w.memory);
    }
    return is_done;
}

/* As above. The gradients of prefixes are those of each sample. */
int lorica_attention_backward(const Attention *a, int threads) {
    const int64_t most = most_keys(a), parts = num_parts(a, threads), pairs = a->samples * a->key_heads;
    const int64_t sizes[] = {rounded(a->key.size, WIDTH), rounded(a->value.size, WIDTH)};
    const int64_t each = most * (sizes[0] > sizes[1] ? sizes[0] : sizes[1]);
    /* One pair of sums a thread, or a part where several threads share a sample. */
    const int64_t held = parts > 1 ? pairs * parts : threads;
    float *sums = malloc(2 * held * each * sizeof(float)), **places = malloc(2 * held * sizeof(float *));
    int is_done = sums && places;
    for (int64_t i = 0; is_done && i < 2 * held; i++) places[i] = sums + i * each;
    const int64_t units = is_done ? pairs * parts : 0;
#pragma omp parallel num_threads(threads)
    {
        Scratch w = scratch_for(a, most, 1);
        if (!w.memory) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t pair = unit / parts, place = parts > 1 ? unit : thread_number();
            if (!w.memory) continue;
            backward_unit(a, sample_of(a, pair / a->key_heads), pair % a->key_heads, unit % parts, parts, &w,
                          places[place], places[held + place]);
            if (parts == 1)
                give_gradients(a, pair / a->key_heads, pair % a->key_heads, places + place, places + held + place, 1);
        }
        if (parts > 1 && units) {
#pragma omp for schedule(dynamic)
            for (int64_t pair = 0; pair < pairs; pair++)
                give_gradients(a, pair / a->key_heads, pair % a->key_heads, places + pair * parts,
                               places + held + pair * parts, parts);
        }
        free(w.memory);
    }
    free(sums);
    free(places);
    return is_done;
}
