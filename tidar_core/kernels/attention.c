/* Attention of query tokens over keys and values that lie in pages, and over those of the forward itself.
 *
 * A query's results do not depend, bit for bit, on other queries, nor on keys that it does not see: sums have one order,
 * and what is hidden adds 0. `reference.py` defines the result. Tensors are contiguous unless a stride is given. Sums are in
 * fp32; results in bf16 are rounded once, and so are weights that matrix instructions multiply.
 */
#include "kernels.h"
#include "numbers.h"
#include "tiles.h"

#define QUERIES 32 /* of one key head that share what is read of keys and values */
#define COLUMNS 16 /* of them in a matrix product */
#define BLOCK 32 /* keys of a matrix product over keys */


struct attention {
    const void *q, *k, *v, *pages;
    const int64_t *table, *prefix_len;
    const uint8_t *visible;
    void *out;
    long q_stride, kv_stride, table_stride, table_len, page_len, per_sequence, heads, kv_heads, size;
};

/* A thread's room: queries and sums [QUERIES, padded], keys or values of a block [16, padded], scores, and for each token
 * from the block of its first own key on, -1 for keys that it does not see and 0 for others. */
struct room { float *queries, *sums, *block, *scores; int32_t *hidden; };

/* Queries of one key head: `count` from `first` on, counted token by token. They see at most `keys` keys. The sequence and
 * head of the next group are `after`, or -1 where it reads the same keys. */
struct group { long sequence, head, first, count, prefix, keys, padded, after[2]; };

INLINE long share_of(const struct attention *a) { return a->heads / a->kv_heads; }

INLINE long prefix_of(const struct attention *a, long sequence) {
    long prefix = a->prefix_len[sequence], most = a->table_len * a->page_len;
    return prefix < most ? prefix : most; /* a slot that is not in use may have any */
}

/* Request up to `count` keys (`values` 0) or values (1) of a prefix from memory, from number `first` on. */
INLINE void request_some(const struct attention *a, long sequence, long head, long first, long count, int values, long bytes) {
    long kept = a->kv_heads * a->size, page = first / a->page_len, place = first % a->page_len;
    long last = prefix_of(a, sequence);
    const int64_t *table = a->table + sequence * a->table_stride;
    if (last > first + count) last = first + count;
    for (long key = first; key < last; key++, place++) {
        if (place == a->page_len) page++, place = 0;
        const char *row = (const char *)a->pages;
        row += (((table[page] * a->page_len + place) * 2 + values) * kept + head * a->size) * bytes;
        for (long d = 0; d < a->size * bytes; d += 64) __builtin_prefetch(row + d, 0, 2);
    }
}

/* Request what is used after the `count` keys from number `first` on: the next ones, and as many of the next group. */
INLINE void request(const struct attention *a, const struct group *g, long first, long count, int values, long bytes) {
    request_some(a, g->sequence, g->head, first + count, count, values, bytes);
    if (g->after[0] >= 0) request_some(a, g->after[0], g->after[1], first, count, values, bytes);
}

/* Copy up to 16 keys (`values` 0) or values (1) from number `first` on to the block, filled up with zeros. */
INLINE void read_block(const struct attention *a, const struct group *g, long first, int values, float *block, int half) {
    long kept = a->kv_heads * a->size, page = first / a->page_len, place = first % a->page_len;
    const int64_t *table = a->table + g->sequence * a->table_stride;
    request(a, g, first, LANES, values, half ? 2 : 4);
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

/* Keys in `hidden` of a token. */
INLINE long own_width(const struct attention *a) { return a->per_sequence + LANES + BLOCK; }

/* Find the keys that the tokens of a group do not see. */
INLINE void find_hidden(const struct attention *a, const struct group *g, int32_t *hidden) {
    long last = (g->first + g->count - 1) / share_of(a), before = g->prefix % LANES, own = g->keys - g->prefix;
    for (long token = g->first / share_of(a); token <= last; token++, hidden += own_width(a)) {
        const uint8_t *seen = a->visible + token * a->per_sequence;
        memset(hidden, 0, before * sizeof(int32_t));
        for (long key = 0; key < own; key++) hidden[before + key] = (int32_t)seen[key] - 1;
        memset(hidden + before + own, -1, (own_width(a) - before - own) * sizeof(int32_t));
    }
}

/* Hide own keys from number `first` on from query `n`, in a vector of its scores. */
INLINE F hide(const struct attention *a, const struct group *g, const int32_t *hidden, long n, long first, F value) {
    if (first + LANES <= g->prefix) return value;
    long token = (g->first + n) / share_of(a) - g->first / share_of(a);
    I out = *(const I *)(hidden + token * own_width(a) + first - g->prefix / LANES * LANES);
    return (F)(((I)value & ~out) | ((I)all(-INFINITY) & out));
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
            *(F *)(room->scores + n * wide + first) = hide(a, g, room->hidden, n, first, value);
        }
    }
}

/* Softmax in place, in bf16 if `half` is 1; `count` is a multiple of 16. */
INLINE void softmax(float *score, long count, int half) {
    F most = all(-INFINITY), total = {};
    for (long n = 0; n < count; n += LANES) most = larger(most, *(F *)(score + n));
    const float largest = largest_of(most);
    for (long n = 0; n < count; n += LANES) {
        F value = exponential(*(F *)(score + n) - largest);
        *(F *)(score + n) = value;
        total += value;
    }
    F share = all(1 / sum_of(total));
    for (long n = 0; n < count; n += LANES) store(score, n, half, *(F *)(score + n) * share); /* never before what is read */
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

#if defined __AMX_TILE__ || defined __AVX512BF16__
/* Where BLOCK keys (`values` 0) or values (1) lie from number `first` on, in bf16; those past the last are `zeros`. */
static void find_rows(const struct attention *a, const struct group *g, long first, int values, const uint16_t *zeros,
                      const uint16_t *row[BLOCK]) {
    long kept = a->kv_heads * a->size, page = first / a->page_len, place = first % a->page_len, own = first - g->prefix;
    const int64_t *table = a->table + g->sequence * a->table_stride;
    const uint16_t *pages = (const uint16_t *)a->pages + g->head * a->size + values * kept;
    const uint16_t *given = (const uint16_t *)(values ? a->v : a->k) + g->head * a->size +
                            g->sequence * a->per_sequence * a->kv_stride;
    for (long n = 0; n < BLOCK; n++, place++, own++) {
        if (place == a->page_len) page++, place = 0;
        if (first + n >= g->keys) row[n] = zeros;
        else row[n] = own < 0 ? pages + (table[page] * a->page_len + place) * 2 * kept : given + own * a->kv_stride;
    }
    request(a, g, first, BLOCK, values, 2);
}

/* Two vectors of bf16 in words, the first in the low halves. */
INLINE U paired(U first, U second) { return first | second << 16; }

#define IN_TURN(n, s) (n) + (s), (n) + (s) + 32

/* 32 numbers of two rows in words, those of the first in the low halves. */
INLINE void pair_rows(const uint16_t *first, const uint16_t *second, U *low, U *high) {
    const W one = *(const W *)first, other = *(const W *)second;
    const W left = {SIXTEEN(IN_TURN, 0)}, right = {SIXTEEN(IN_TURN, 16)};
    *low = (U)__builtin_shuffle(one, other, left);
    *high = (U)__builtin_shuffle(one, other, right);
}

INLINE U rounded(F value) {
    U bits = (U)value;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#endif

#ifdef __AMX_TILE__
/* Scores [keys, 16 queries]: products of keys with queries, scaled; -inf for keys that are hidden. */
static void tile_scores(const struct attention *a, const struct group *g, long wide, const U *queries, uint16_t *rows,
                        const uint16_t *zeros, F *scores) {
    F scale = all(1 / sqrtf(a->size));
    const uint16_t *row[BLOCK];
    for (long first = 0; first < wide; first += BLOCK) {
        find_rows(a, g, first, 0, zeros, row);
        for (long half = 0; half < BLOCK; half += LANES) {
            F *found = scores + first + half;
            const uint16_t *keys = row[half];
            long stride = row[half + 1] - keys;
            for (long n = 1; n < LANES; n++)
                if (row[half + n] - row[half + n - 1] != stride) {
                    for (long m = 0; m < LANES; m++) memcpy(rows + m * a->size, row[half + m], a->size * 2);
                    keys = rows, stride = a->size;
                    break;
                }
            _tile_zero(6);
            for (long d = 0; d < a->size; d += 32) {
                _tile_loadd(4, keys + d, stride * 2);
                _tile_loadd(5, queries + d / 2, 64);
                _tile_dpbf16ps(6, 4, 5);
            }
            _tile_stored(6, found, 64);
            for (long m = 0; m < LANES; m++) found[m] *= scale;
        }
        if (first + BLOCK <= g->prefix) continue;
        for (long m = 0; m < BLOCK; m++) {
            long key = first + m, own = key - g->prefix;
            for (long n = 0; own >= 0 && n < COLUMNS; n++) {
                long query = (g->first + (n < g->count ? n : 0)) / share_of(a);
                if (key >= g->keys || !a->visible[query * a->per_sequence + own]) scores[key][n] = -INFINITY;
            }
        }
    }
}

/* Sums of values [16 queries, size], weighted by exp(score - largest); returns the sums of the weights. */
static F tile_sums(const struct attention *a, const struct group *g, long wide, F *scores, const uint16_t *zeros,
                   float *sums) {
    F most = all(-INFINITY), total = {};
    const uint16_t *row[BLOCK];
    U weights[16], values[16][4];
    for (long key = 0; key < wide; key++) most = larger(most, scores[key]);
    for (long key = 0; key < wide; key++) {
        scores[key] = exponential(scores[key] - most);
        total += scores[key];
    }
    for (long from = 0; from < a->size; from += 64) {
        long columns = a->size - from < 64 ? 32 : 64;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long first = 0; first < wide; first += BLOCK) {
            find_rows(a, g, first, 1, zeros, row);
            for (long p = 0; p < 16; p++) {
                weights[p] = paired(rounded(scores[first + 2 * p]), rounded(scores[first + 2 * p + 1]));
                for (long d = 0; d < columns; d += 32)
                    pair_rows(row[2 * p] + from + d, row[2 * p + 1] + from + d, &values[p][d / LANES],
                              &values[p][d / LANES + 1]);
            }
            transpose(weights);
            _tile_loadd(4, weights, 64);
            _tile_loadd(5, &values[0][0], 256);
            _tile_loadd(6, &values[0][1], 256);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            if (columns == 32) continue;
            _tile_loadd(5, &values[0][2], 256);
            _tile_loadd(6, &values[0][3], 256);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, sums + from, g->padded * 4);
        _tile_stored(1, sums + from + 16, g->padded * 4);
        if (columns == 32) continue;
        _tile_stored(2, sums + from + 32, g->padded * 4);
        _tile_stored(3, sums + from + 48, g->padded * 4);
    }
    return total;
}

/* As `attend`, in bf16 by matrix instructions; the size of a head is a multiple of 32. */
static void attend_by_tiles(const struct attention *a, const struct group *g, const struct room *room) {
    long share = share_of(a), wide = (g->keys + BLOCK - 1) / BLOCK * BLOCK;
    U *queries = (U *)room->queries;
    for (long d = 0; d < a->size; d += 2)
        for (long n = 0; n < COLUMNS; n++) {
            long token = g->sequence * a->per_sequence + (g->first + n) / share, head = g->head * share + (g->first + n) % share;
            uint32_t word = 0;
            if (n < g->count) memcpy(&word, (const uint16_t *)a->q + token * a->q_stride + head * a->size + d, 4);
            queries[d / 2][n] = word;
        }
    uint16_t *rows = (uint16_t *)room->block, *zeros = rows + LANES * a->size;
    memset(zeros, 0, a->size * 2);
    tile_scores(a, g, wide, queries, rows, zeros, (F *)room->scores);
    F total = tile_sums(a, g, wide, (F *)room->scores, zeros, room->sums);
    for (long n = 0; n < g->count; n++)
        for (long d = 0; d < a->size; d += LANES) *(F *)(room->sums + n * g->padded + d) /= total[n];
}
#endif

#ifdef __AVX512BF16__
INLINE F pair_products(F sum, uint32_t pair, U pairs) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)pairs);
}

/* Scores of all keys, as `score`. Keys lie in lanes; queries hold pairs of inputs [QUERIES, size / 2]. */
static void pair_scores(const struct attention *a, const struct group *g, long wide, const uint32_t *queries,
                        const uint16_t *zeros, U *block, const int32_t *hidden, float *scores) {
    float scale = 1 / sqrtf(a->size);
    const uint16_t *row[BLOCK];
    for (long first = 0; first < wide; first += BLOCK) {
        find_rows(a, g, first, 0, zeros, row);
        for (long half = 0; half < BLOCK; half += LANES) {
            for (long d = 0; d < a->size; d += 32) {
                U word[16];
                UNROLL for (int m = 0; m < LANES; m++) word[m] = *(const U *)(row[half + m] + d);
                transpose(word);
                UNROLL for (int m = 0; m < LANES; m++) block[d / 2 + m] = word[m];
            }
            for (long n = 0; n < g->count; n += 4) { /* of the last four, some may be no queries: they are not read */
                F sum[4][2] = {};
                for (long p = 0; p < a->size / 2; p += 2)
                    UNROLL for (int m = 0; m < 4; m++) {
                        const uint32_t *query = queries + (n + m) * (a->size / 2) + p;
                        sum[m][0] = pair_products(sum[m][0], query[0], block[p]);
                        sum[m][1] = pair_products(sum[m][1], query[1], block[p + 1]);
                    }
                for (long m = 0; m < 4; m++)
                    *(F *)(scores + (n + m) * wide + first + half) =
                        hide(a, g, hidden, n + m < g->count ? n + m : n, first + half, (sum[m][0] + sum[m][1]) * scale);
            }
        }
    }
}

/* Sums of values [QUERIES, size], weighted by pairs of bf16 weights: the first half of each row [QUERIES, wide]. */
static void pair_sums(const struct attention *a, const struct group *g, long wide, const uint32_t *weights,
                      const uint16_t *zeros, U *block, float *sums) {
    long runs = a->size / LANES;
    const uint16_t *row[BLOCK];
    memset(sums, 0, QUERIES * a->size * sizeof(float));
    for (long first = 0; first < wide; first += BLOCK) {
        find_rows(a, g, first, 1, zeros, row);
        for (long p = 0; p < BLOCK / 2; p++)
            for (long r = 0; r < runs; r += 2)
                pair_rows(row[2 * p] + r * LANES, row[2 * p + 1] + r * LANES, block + r * (BLOCK / 2) + p,
                          block + (r + 1) * (BLOCK / 2) + p);
        for (long n = 0; n < g->count; n += 4)
            for (long r = 0; r < runs; r += 2) {
                F sum[4][2];
                UNROLL for (int m = 0; m < 8; m++)
                    sum[m / 2][m % 2] = *(F *)(sums + (n + m / 2) * a->size + (r + m % 2) * LANES);
                UNROLL for (int p = 0; p < BLOCK / 2; p++)
                    UNROLL for (int m = 0; m < 8; m++)
                        sum[m / 2][m % 2] = pair_products(sum[m / 2][m % 2], weights[(n + m / 2) * wide + first / 2 + p],
                                                          block[(r + m % 2) * (BLOCK / 2) + p]);
                UNROLL for (int m = 0; m < 8; m++)
                    *(F *)(sums + (n + m / 2) * a->size + (r + m % 2) * LANES) = sum[m / 2][m % 2];
            }
    }
}

/* As `attend`, in bf16, two numbers an instruction; the size of a head is a multiple of 32. */
static void attend_by_pairs(const struct attention *a, const struct group *g, const struct room *room) {
    long share = share_of(a), wide = (g->keys + BLOCK - 1) / BLOCK * BLOCK;
    uint16_t *queries = (uint16_t *)room->queries, *zeros = queries + QUERIES * a->size;
    memset(queries, 0, 2 * QUERIES * a->size * 2);
    for (long n = 0; n < g->count; n++) {
        long token = g->sequence * a->per_sequence + (g->first + n) / share, head = g->head * share + (g->first + n) % share;
        memcpy(queries + n * a->size, (const uint16_t *)a->q + token * a->q_stride + head * a->size, a->size * 2);
    }
    pair_scores(a, g, wide, (const uint32_t *)queries, zeros, (U *)room->block, room->hidden, room->scores);
    for (long n = 0; n < g->count; n++) softmax(room->scores + n * wide, wide, 1);
    pair_sums(a, g, wide, (const uint32_t *)room->scores, zeros, (U *)room->block, room->sums);
}
#endif

INLINE void attend_by_vectors(const struct attention *a, const struct group *g, const struct room *room, int half) {
    long share = share_of(a), wide = (g->keys + LANES - 1) / LANES * LANES;
    float scale = 1 / sqrtf(a->size);
    for (long n = 0; n < g->count; n++) {
        long token = g->sequence * a->per_sequence + (g->first + n) / share, head = g->head * share + (g->first + n) % share;
        for (long d = 0; d < g->padded; d += LANES)
            *(F *)(room->queries + n * g->padded + d) = run(a->q, token * a->q_stride + head * a->size, d, a->size, half) * scale;
    }
    score(a, g, room, half);
    for (long n = 0; n < g->count; n++) softmax(room->scores + n * wide, wide, 0);
    weigh(a, g, room, half);
}

INLINE void attend(const struct attention *a, struct group g, const struct room *room, int half, int tiles) {
    long share = share_of(a), own = 0;
    g.prefix = prefix_of(a, g.sequence);
    for (long n = 0; n < g.count; n++)
        for (long key = a->per_sequence, query = (g.first + n) / share; key > own; key--)
            if (a->visible[query * a->per_sequence + key - 1]) own = key;
    g.keys = g.prefix + own;
    if (!tiles) find_hidden(a, &g, room->hidden);
#ifdef __AMX_TILE__
    if (tiles) attend_by_tiles(a, &g, room);
    else
#endif
#ifdef __AVX512BF16__
    if (half && a->size % 32 == 0) attend_by_pairs(a, &g, room);
    else
#endif
    if (half) attend_by_vectors(a, &g, room, 1);
    else attend_by_vectors(a, &g, room, 0);
    (void)tiles;
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
    int tiles = matrices && half && size % 32 == 0;
    long most = tiles ? COLUMNS : QUERIES, groups = (queries + most - 1) / most;
    if (!tiles) most = (queries + groups - 1) / groups; /* about equally many in each */
    long wide = table_len * page_len + per_sequence + BLOCK;
#pragma omp parallel
    {
#ifdef __AMX_TILE__
        if (tiles) configure_tiles(16);
#endif
        long scores = (2 * QUERIES + LANES) * padded, hidden = scores + QUERIES * wide;
        float *all = malloc((hidden + QUERIES * own_width(&a)) * sizeof(float));
        struct room room = {all, all + QUERIES * padded, all + 2 * QUERIES * padded, all + scores, (int32_t *)(all + hidden)};
#pragma omp for schedule(static)
        for (long n = 0; n < sequences * kv_heads * groups; n++) {
            long first = n % groups * most, count = queries - first < most ? queries - first : most;
            long head = n / groups, next = (n + 1) / groups, others = next > head && next < sequences * kv_heads;
            struct group g = {head / kv_heads, head % kv_heads, first, count, 0, 0, padded,
                              {others ? next / kv_heads : -1, next % kv_heads}};
            attend(&a, g, &room, half, tiles);
        }
        free(all);
#ifdef __AMX_TILE__
        if (tiles) _tile_release();
#endif
    }
}
