/* Attention of one query a row, as in decoding: softmax(scale q k^T) v, where keys and values are read once, as they
 * stand in the cache. A thread takes one head of keys of one row, with all heads of queries that share it. All sums are
 * float32. */
#include "numbers.h"

typedef struct {
    int32_t type, threads;
    int64_t rows, heads, key_heads, keys, size, value_size;
    float scale, softcap; /* softcap 0: none */
    const char *query; /* [rows, heads, size] */
    const char *key, *value;
    int64_t key_row, key_head, key_token, value_row, value_head, value_token; /* strides in elements */
    const uint8_t *mask; /* [rows, keys], 0 where a key is not seen, rows mask_row apart; or NULL */
    int64_t mask_row;
    const float *sinks; /* [heads]: a logit that has no value; or NULL */
    char *out;          /* [rows, heads, value_size] */
} OneQuery;

static float dot(const float *a, const float *b, int64_t size) {
    floats sum[2] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        sum[0] += *(const unaligned_floats *)(a + i) * *(const unaligned_floats *)(b + i);
        sum[1] += *(const unaligned_floats *)(a + i + LANES) * *(const unaligned_floats *)(b + i + LANES);
    }
    float total = sum_of(sum[0] + sum[1]);
    for (; i < size; i++) total += a[i] * b[i];
    return total;
}

static void add(float *to, float factor, const float *from, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] += factor * from[i];
}

/* Row `start` of a tensor as float32: where it stands, or widened into `room`. */
static INLINE const float *row_at(const char *tensor, int type, int64_t start, int64_t size, float *room) {
    if (type == FLOAT32) return (const float *)tensor + start;
    load(room, tensor, type, start, size);
    return room;
}

static void attend(const OneQuery *a, int64_t row, int64_t key_head, float *room) {
    const int64_t group = a->heads / a->key_heads, first = row * a->heads + key_head * group;
    const int64_t wide = (a->keys + LANES - 1) / LANES * LANES;
    const uint8_t *mask = a->mask ? a->mask + row * a->mask_row : NULL;
    float *query = room, *out = query + group * a->size, *one = out + group * a->value_size;
    float *scores = one + a->size + a->value_size;
    load(query, a->query, a->type, first * a->size, group * a->size);
    for (int64_t j = 0; j < a->keys; j++) {
        if (mask && !mask[j]) {
            for (int64_t g = 0; g < group; g++) scores[g * wide + j] = -INFINITY;
            continue;
        }
        const int64_t start = row * a->key_row + key_head * a->key_head + j * a->key_token;
        const float *key = row_at(a->key, a->type, start, a->size, one);
        for (int64_t g = 0; g < group; g++) {
            const float score = a->scale * dot(query + g * a->size, key, a->size);
            scores[g * wide + j] = a->softcap ? a->softcap * tanhf(score / a->softcap) : score;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *score = scores + g * wide, most = a->sinks ? a->sinks[key_head * group + g] : -INFINITY;
        for (int64_t j = 0; j < a->keys; j++) most = score[j] > most ? score[j] : most;
        for (int64_t j = a->keys; j < wide; j++) score[j] = -INFINITY;
        most = most == -INFINITY ? 0 : most; /* a row of padding sees nothing */
        floats sums = {0};
        for (int64_t j = 0; j < wide; j += LANES) {
            unaligned_floats *here = (unaligned_floats *)(score + j);
            *here = exp2_of((*here - most) * 1.44269504f);
            sums += *here;
        }
        float sum = sum_of(sums);
        if (a->sinks) sum += expf(a->sinks[key_head * group + g] - most);
        for (int64_t j = 0; j < a->keys; j++) score[j] = sum > 0 ? score[j] / sum : sum;
    }
    memset(out, 0, group * a->value_size * sizeof(float));
    for (int64_t j = 0; j < a->keys; j++) {
        if (mask && !mask[j]) continue;
        const int64_t start = row * a->value_row + key_head * a->value_head + j * a->value_token;
        const float *value = row_at(a->value, a->type, start, a->value_size, one);
        for (int64_t g = 0; g < group; g++) add(out + g * a->value_size, scores[g * wide + j], value, a->value_size);
    }
    save(a->out, a->type, first * a->value_size, out, group * a->value_size);
}

/* 0: there is no memory. */
int lorica_one_query(const OneQuery *a) {
    const int64_t group = a->heads / a->key_heads, units = a->rows * a->key_heads;
    const int64_t size = group * (a->size + a->value_size + a->keys + LANES) + a->size + a->value_size;
    const int threads = units * group * a->keys * a->size < SMALL * 8 ? 1 : a->threads;
    int is_done = 1;
#pragma omp parallel num_threads(threads)
    {
        float *room = malloc(size * sizeof(float));
        if (!room) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; unit++)
            if (room) attend(a, unit / a->key_heads, unit % a->key_heads, room);
        free(room);
    }
    return is_done;
}
