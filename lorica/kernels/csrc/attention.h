/* What the kernels of attention have in common beside their scores (scores.h): the ways through all samples.
 *
 * A kernel defines WIDTH (columns of a panel), QUERIES, KEYS (of a block of scores) and Scratch (what a thread needs
 * for one sample of the greatest length) before it includes this, and then what is declared under "what a kernel
 * brings". A width is a size filled up to whole panels.
 *
 * A thread takes a sample and one head of keys, with all heads of queries that share it, so keys and values are packed
 * once for them; where these are too few for the threads, a sample's blocks of queries are dealt out to several.
 */
#pragma once

#include "scores.h"

/* ------------------------------------------------------------------ rearranging */

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

/* ------------------------------------------------------------------ what a kernel brings */

/* Gives all parts of w their places; how many bytes they take. */
static int64_t lay_out(Scratch *w, const Attention *a, int64_t most_keys, int is_backward, char *memory);

/* How many keys there is room for: whole panels, and whole tiles of rows. */
static int64_t room_for(const Attention *a, Sample s);

/* The blocks of queries part, part + parts ... of all heads that share a head of keys. Backward writes the sums of the
 * gradients of keys and of values, an array of room_for * width floats each; `add_row` adds key j's to a row. */
static void forward_unit(const Attention *a, Sample s, int64_t key_head, int64_t part, int64_t parts, Scratch *w);
static void backward_unit(const Attention *a, Sample s, int64_t key_head, int64_t part, int64_t parts, Scratch *w,
                          float *grad_keys, float *grad_values);
static void add_row(const float *sums, int64_t width, int64_t j, float *row);
static float factor_of_keys(const Attention *a); /* what their sums lack */

/* ------------------------------------------------------------------ memory of a thread */

/* A part of the memory, on a cache line of its own; without memory it is only counted. */
static void *part_of(char *memory, int64_t *used, int64_t bytes) {
    char *here = memory ? memory + *used : NULL;
    *used += rounded(bytes, 64);
    return here;
}

static Scratch *scratch_for(const Attention *a, int64_t most_keys, int is_backward) {
    Scratch w;
    const int64_t bytes = lay_out(&w, a, most_keys, is_backward, NULL);
    char *memory = calloc(1, sizeof w + 64 + bytes); /* zeros: what fills panels and blocks up is read */
    if (memory)
        lay_out((Scratch *)memory, a, most_keys, is_backward,
                (char *)(((uintptr_t)memory + sizeof w + 63) & ~(uintptr_t)63));
    return (Scratch *)memory;
}

/* ------------------------------------------------------------------ gradients of keys */

/* What all parts have summed, times `factor`: into the gradient `to`, and into the prefix's. */
static void give_gradient(const Attention *a, int64_t index, int64_t head, const Tensor4 *to, float *prefix,
                          float *const *sums, int64_t parts, float factor) {
    const Sample s = sample_of(a, index);
    const int64_t width = rounded(to->size, WIDTH);
    float row[width];
    for (int64_t j = 0; j < a->prefix + s.num_keys; j++) {
        memset(row, 0, sizeof row);
        for (int64_t part = 0; part < parts; part++) add_row(sums[part], width, j, row);
        for (int64_t c = 0; c < width; c++) row[c] *= factor;
        if (j >= a->prefix) write_row(a, to, s.row, head, s.key + j - a->prefix, row);
        else memcpy(prefix + ((index * a->key_heads + head) * a->prefix + j) * to->size, row, to->size * sizeof(float));
    }
}

static void give_gradients(const Attention *a, int64_t index, int64_t head, float *const *keys, float *const *values,
                           int64_t parts) {
    give_gradient(a, index, head, &a->grad_key, a->grad_prefix_key, keys, parts, factor_of_keys(a));
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
        Scratch *w = scratch_for(a, most, 0);
        if (!w) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < a->samples * a->key_heads * parts; unit++) {
            const int64_t pair = unit / parts;
            if (w)
                forward_unit(a, sample_of(a, pair / a->key_heads), pair % a->key_heads, unit % parts, parts, w);
        }
        free(w);
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
        Scratch *w = scratch_for(a, most, 1);
        if (!w) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t pair = unit / parts, place = parts > 1 ? unit : thread_number();
            if (!w) continue;
            backward_unit(a, sample_of(a, pair / a->key_heads), pair % a->key_heads, unit % parts, parts, w,
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
        free(w);
    }
    free(sums);
    free(places);
    return is_done;
}
