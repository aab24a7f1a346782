/* Norms, rotation, gate and attention of a decode step, for fp32 and bf16.
 *
 * `reference.py` defines what each function computes. A token's results do not depend, bit for bit, on how many tokens
 * a call has, nor on keys that the token does not see. Tensors are contiguous unless a stride is given. Sums are in
 * fp32; results in bf16 are rounded once.
 */
#include "numbers.h"

/* The inverse of the root mean square of one token or head. */
INLINE float inverse_norm(const void *x, long first, long width, float eps, int half) {
    F sum = {};
    for (long i = 0; i < width; i += LANES) sum += run(x, first, i, width, half) * run(x, first, i, width, half);
    return 1 / sqrtf(sum_of(sum) / width + eps);
}

INLINE void norm_of_token(const void *x, const void *residual, const void *weight, int half_weight, float eps,
                          long first, long width, int half, void *normed, void *total) {
    for (long i = 0; residual && i < width; i += LANES)
        put_run(total, first, i, width, half, run(x, first, i, width, half) + run(residual, first, i, width, half));
    const void *sum = residual ? total : x;
    float scale = inverse_norm(sum, first, width, eps, half);
    for (long i = 0; i < width; i += LANES)
        put_run(normed, first, i, width, half, run(sum, first, i, width, half) * scale * run(weight, 0, i, width, half_weight));
}

void add_rms_norm(const void *x, const void *residual, const void *weight, int half_weight, float eps, long tokens,
                  long width, int half, void *normed, void *total) {
#pragma omp parallel for schedule(static) if (tokens >= 32)
    for (long t = 0; t < tokens; t++)
        if (half) norm_of_token(x, residual, weight, half_weight, eps, t * width, width, 1, normed, total);
        else norm_of_token(x, residual, weight, half_weight, eps, t * width, width, 0, normed, total);
}

INLINE void rotate_head(void *x, long first, const void *norm, const void *cosine, const void *sine, long angle, long size,
                        float eps, int half) {
    float scale = norm ? inverse_norm(x, first, size, eps, half) : 1;
    long middle = size / 2;
    for (long d = 0; d < middle; d += LANES) {
        F low = run(x, first, d, middle, half) * scale, high = run(x, first + middle, d, middle, half) * scale;
        if (norm) low *= run(norm, 0, d, middle, half), high *= run(norm, middle, d, middle, half);
        F turned = low * run(cosine, angle, d, middle, half) - high * run(sine, angle, d, middle, half);
        put_run(x, first + middle, d, middle, half,
                high * run(cosine, angle + middle, d, middle, half) + low * run(sine, angle + middle, d, middle, half));
        put_run(x, first, d, middle, half, turned);
    }
}

/* `clean` leading ones of each `per_sequence` tokens are stored; `norm` is [heads + kv_heads, size] or null. */
void rotate_and_store(void *qkv, const void *norm, const void *cosine, const void *sine, void *pages, const int64_t *slot,
                      long tokens, long per_sequence, long clean, long heads, long kv_heads, long size, float eps, int half) {
    long bytes = half ? 2 : 4, width = (heads + 2 * kv_heads) * size, kept = 2 * kv_heads * size;
#pragma omp parallel for schedule(static) if (tokens >= 32)
    for (long t = 0; t < tokens; t++) {
        for (long h = 0; h < heads + kv_heads; h++) {
            const char *scale = norm ? (const char *)norm + h * size * bytes : 0;
            if (half) rotate_head(qkv, t * width + h * size, scale, cosine, sine, t * size, size, eps, 1);
            else rotate_head(qkv, t * width + h * size, scale, cosine, sine, t * size, size, eps, 0);
        }
        long index = t % per_sequence;
        if (index < clean)
            memcpy((char *)pages + slot[t / per_sequence * clean + index] * kept * bytes,
                   (char *)qkv + (t * width + heads * size) * bytes, kept * bytes);
    }
}

INLINE void gate(const void *gate_up, long token, long width, int half, void *y) {
    for (long i = 0; i < width; i += LANES) {
        F gate = run(gate_up, 2 * token * width, i, width, half);
        F up = run(gate_up, (2 * token + 1) * width, i, width, half);
        put_run(y, token * width, i, width, half, gate / (exponential(smaller(-gate, all(88.f))) + 1.f) * up);
    }
}

/* silu(gate) * up [tokens, width] of gate, then up. */
void silu_mul(const void *gate_up, long tokens, long width, int half, void *y) {
#pragma omp parallel for schedule(static) if (tokens >= 32)
    for (long t = 0; t < tokens; t++)
        if (half) gate(gate_up, t, width, 1, y);
        else gate(gate_up, t, width, 0, y);
}

#define QUERIES 8 /* of one key head that share what is read of keys and values */

struct attention {
    const void *q, *k, *v, *pages;
    const int64_t *table, *prefix_len;
    const uint8_t *visible;
    void *out;
    long q_stride, kv_stride, table_stride, table_len, page_len, per_sequence, heads, kv_heads, size;
};

/* A thread's room: queries and sums [QUERIES, padded], keys or values of a block [16, padded], scores. */
struct room { float *queries, *sums, *block, *scores; };

/* Queries of one key head: `count` from `first` on, counted token by token. They see at most `keys` keys. */
struct group { long sequence, head, first, count, prefix, keys, padded; };

INLINE long share_of(const struct attention *a) { return a->heads / a->kv_heads; }

/* Copy up to 16 keys (`values` 0) or values (1) from number `first` on to the block, filled up with zeros. */
INLINE void read_block(const struct attention *a, const struct group *g, long first, int values, float *block, int half) {
    long kept = a->kv_heads * a->size, page = first / a->page_len, place = first % a->page_len;
    const int64_t *table = a->table + g->sequence * a->table_stride;
    for (long key = first; key < first + LANES; key++, place++, block += g->padded) {
        const void *from = a->pages;
        long at = g->head * a->size;
        if (key >= g->keys) {
            memset(block, 0, g->padded * sizeof(float));
            continue;
        }
        if (place == a->page_len) page++, place = 0;
        if (key < g->prefix) at += ((table[page] * a->page_len + place) * 2 + values) * kept;
        else {
            from = values ? a->v : a->k;
            at += (g->sequence * a->per_sequence + key - g->prefix) * a->kv_stride;
        }
        for (long d = 0; d < g->padded; d += LANES) *(F *)(block + d) = run(from, at, d, a->size, half);
    }
}

INLINE F folded(F x, F y) {
    return __builtin_shuffle(x, y, (I){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
           __builtin_shuffle(x, y, (I){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}

/* Products of a query with the keys of a block, in lanes. `runs` is padded / 16, a constant where that is common. */
INLINE F scores_of_block(const float *query, const float *block, long runs) {
    F part[4];
    UNROLL for (int n = 0; n < 4; n++) {
        F four[4];
        UNROLL for (int m = 0; m < 4; m++) {
            const float *key = block + (4 * n + m) * runs * LANES;
            four[m] = (F){};
            for (long r = 0; r < runs; r++) four[m] += *(const F *)(query + r * LANES) * *(const F *)(key + r * LANES);
        }
        part[n] = folded(folded(four[0], four[1]), folded(four[2], four[3]));
    }
    return folded(folded(part[0], part[1]), folded(part[2], part[3]));
}

/* Scores of all keys, -inf for those that are hidden. */
INLINE void score(const struct attention *a, const struct group *g, const struct room *room, int half) {
    long wide = (g->keys + LANES - 1) / LANES * LANES, runs = g->padded / LANES;
    for (long first = 0; first < g->keys; first += LANES) {
        read_block(a, g, first, 0, room->block, half);
        for (long n = 0; n < g->count; n++) {
            const float *query = room->queries + n * g->padded;
            F value = runs == 4   ? scores_of_block(query, room->block, 4)
                      : runs == 8 ? scores_of_block(query, room->block, 8)
                                  : scores_of_block(query, room->block, runs);
            if (first + LANES > g->prefix) {
                const uint8_t *seen = a->visible + (g->first + n) / share_of(a) * a->per_sequence;
                for (long m = 0; m < LANES; m++) {
                    long own = first + m - g->prefix;
                    if (own >= 0 && (first + m >= g->keys || !seen[own])) value[m] = -INFINITY;
                }
            }
            *(F *)(room->scores + n * wide + first) = value;
        }
    }
}

/* Softmax in place; `count` is a multiple of 16. */
INLINE void softmax(float *score, long count) {
    F most = all(-INFINITY), total = {};
    for (long n = 0; n < count; n += LANES) most = larger(most, *(F *)(score + n));
    float largest = most[0];
    for (int n = 1; n < LANES; n++) largest = fmaxf(largest, most[n]);
    for (long n = 0; n < count; n += LANES) {
        F value = exponential(*(F *)(score + n) - largest);
        *(F *)(score + n) = value;
        total += value;
    }
    F share = all(1 / sum_of(total));
    for (long n = 0; n < count; n += LANES) *(F *)(score + n) *= share;
}

/* Sums of values, weighted by the scores. */
INLINE void weigh(const struct attention *a, const struct group *g, const struct room *room, int half) {
    long wide = (g->keys + LANES - 1) / LANES * LANES;
    memset(room->sums, 0, g->count * g->padded * sizeof(float));
    for (long first = 0; first < g->keys; first += LANES) {
        read_block(a, g, first, 1, room->block, half);
        for (long n = 0; n < g->count; n += 4) { /* of the last four, some may be no queries: their sums are not read */
            const float *weight = room->scores + n * wide + first;
            for (long d = 0; d < g->padded; d += LANES) {
                float *sums = room->sums + n * g->padded + d;
                F sum[4];
                UNROLL for (int q = 0; q < 4; q++) sum[q] = *(F *)(sums + q * g->padded);
                UNROLL for (int m = 0; m < LANES; m++) {
                    F value = *(F *)(room->block + m * g->padded + d);
                    UNROLL for (int q = 0; q < 4; q++) sum[q] += weight[q * wide + m] * value;
                }
                UNROLL for (int q = 0; q < 4; q++) *(F *)(sums + q * g->padded) = sum[q];
            }
        }
    }
}

INLINE void attend(const struct attention *a, struct group g, const struct room *room, int half) {
    long share = share_of(a), wide;
    float scale = 1 / sqrtf(a->size);
    g.prefix = a->prefix_len[g.sequence];
    if (g.prefix > a->table_len * a->page_len) g.prefix = a->table_len * a->page_len; /* a slot that is not in use */
    long own = 0;
    for (long n = 0; n < g.count; n++) {
        long query = (g.first + n) / share, token = g.sequence * a->per_sequence + query, head = g.head * share + (g.first + n) % share;
        for (long key = a->per_sequence; key > own; key--)
            if (a->visible[query * a->per_sequence + key - 1]) own = key;
        for (long d = 0; d < g.padded; d += LANES)
            *(F *)(room->queries + n * g.padded + d) = run(a->q, token * a->q_stride + head * a->size, d, a->size, half) * scale;
    }
    g.keys = g.prefix + own;
    wide = (g.keys + LANES - 1) / LANES * LANES;
    score(a, &g, room, half);
    for (long n = 0; n < g.count; n++) softmax(room->scores + n * wide, wide);
    weigh(a, &g, room, half);
    for (long n = 0; n < g.count; n++) {
        long token = g.sequence * a->per_sequence + (g.first + n) / share, head = g.head * share + (g.first + n) % share;
        for (long d = 0; d < a->size; d += LANES)
            put_run(a->out, (token * a->heads + head) * a->size, d, a->size, half, *(F *)(room->sums + n * g.padded + d));
    }
}

/* Strides are those of a token, in entries; k and v have the same. */
void paged_attention(const void *q, const void *k, const void *v, long q_stride, long kv_stride, const void *pages,
                     long page_len, const int64_t *table, long table_stride, long table_len, const int64_t *prefix_len,
                     const uint8_t *visible, long sequences, long per_sequence, long heads, long kv_heads, long size,
                     int half, void *out) {
    struct attention a = {q, k, v, pages, table, prefix_len, visible, out, q_stride, kv_stride, table_stride, table_len,
                          page_len, per_sequence, heads, kv_heads, size};
    long padded = (size + LANES - 1) / LANES * LANES, queries = per_sequence * share_of(&a);
    long groups = (queries + QUERIES - 1) / QUERIES, wide = table_len * page_len + per_sequence + LANES;
#pragma omp parallel
    {
        float *all = malloc((2 * QUERIES * padded + LANES * padded + QUERIES * wide) * sizeof(float));
        struct room room = {all, all + QUERIES * padded, all + 2 * QUERIES * padded, all + (2 * QUERIES + LANES) * padded};
#pragma omp for schedule(static)
        for (long n = 0; n < sequences * kv_heads * groups; n++) {
            long first = n % groups * QUERIES, count = queries - first < QUERIES ? queries - first : QUERIES;
            struct group g = {n / groups / kv_heads, n / groups % kv_heads, first, count, 0, 0, padded};
            if (half) attend(&a, g, &room, 1);
            else attend(&a, g, &room, 0);
        }
        free(all);
    }
}
