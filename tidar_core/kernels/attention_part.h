/* Attention of some queries of one key head over one part of the keys of their sequence.
 *
 * Keys of the part are turned, so that 16 of them lie in the lanes of a vector. A query's words meet them one by one. A
 * word of 32 bits is a number in fp32, or two in bf16. Sums are in fp32. Results in bf16 are rounded once, and so are
 * weights that meet values in pairs.
 */
#include "kernels.h"
#include "numbers.h"
#include "tiles.h"

#define PART 128 /* keys */
#define QUERIES 64 /* of one key head that share what is read of keys and values */
#define FEW (NATIVE == LANES ? 4 : 2) /* queries, and vectors of keys or values, whose sums stay in registers */
#define REGISTERS (LANES / NATIVE) /* of a vector */
#define EVEN (2 * LANES) /* keys, and numbers of a value, are filled up to a multiple of this */
#define LOG2_E 1.44269504f /* scores are powers of 2 */

/* Words of keys: numbers in fp32; numbers in bf16 that are widened; pairs in bf16; pairs for matrix instructions. */
enum form { SINGLE, WIDENED, PAIRS, MATRICES };

struct attention {
    const void *q, *k, *v, *pages;
    const int64_t *table, *prefix_len;
    void *out;
    long q_stride, kv_stride, table_stride, table_len, page_len, per_sequence, heads, kv_heads, size;
    enum form form;
    long padded, words; /* numbers of a value, and words of a key, as a room holds them */
    long queries, groups, most; /* queries of a key head in one sequence, their groups, and the most in one */
    uint8_t *seen; /* [per_sequence, seen_width]: what a token sees of LANES of the prefix, own keys and PART after */
    long *own; /* [groups]: own keys up to the last that a group sees */
};

/* A thread's room: queries [QUERIES, words], keys [words, PART], values [rows, padded], scores [QUERIES, PART], zeros
 * in place of a key, results, and where each key and value of a part begins. */
struct room {
    float *queries, *scores, *results;
    U *keys, *values;
    const char *zeros, *key[PART], *value[PART];
};

/* Queries of one key head: `count` from `first` on, counted token by token. They see some of the first `keys` keys. */
struct group { long sequence, head, first, count, keys; };

/* A part of a sequence's keys, from number `first` on; or none, where `sequence` is -1. */
struct part { long sequence, first; };

INLINE long multiple(long n, long of) { return (n + of - 1) / of * of; }
INLINE long share_of(const struct attention *a) { return a->heads / a->kv_heads; }
INLINE long seen_width(const struct attention *a) { return LANES + a->per_sequence + PART; }
INLINE int paired(enum form form) { return form >= PAIRS; }
INLINE int halved(enum form form) { return form != SINGLE; }
INLINE long size_of(enum form form) { return halved(form) ? 2 : 4; }

INLINE long prefix_of(const struct attention *a, long sequence) {
    long prefix = a->prefix_len[sequence], most = a->table_len * a->page_len;
    return prefix < most ? prefix : most; /* a slot that is not in use may have any */
}

/* Results of a group for one part or several: the largest score and the sum of weights of each query, and sums of
 * weighted values [count, padded]. */
struct results { float *most, *total, *sums; };

INLINE long results_len(const struct attention *a) {
    return 2 * multiple(a->most, LANES) + multiple(a->most, a->form == MATRICES ? LANES : FEW) * a->padded;
}

INLINE struct results results_at(const struct attention *a, float *place) {
    const long wide = multiple(a->most, LANES);
    return (struct results){place, place + wide, place + 2 * wide};
}

/* Walks over the keys of a sequence's prefix. */
struct walk { const int64_t *page; long place; };

INLINE struct walk walk_from(const struct attention *a, long sequence, long key) {
    return (struct walk){a->table + sequence * a->table_stride + key / a->page_len, key % a->page_len};
}

/* Where the next key begins, for all heads; the values lie behind all keys. */
INLINE const char *step(const struct attention *a, struct walk *walk, enum form form) {
    if (walk->place == a->page_len) walk->page++, walk->place = 0;
    const long token = *walk->page * a->page_len + walk->place++;
    return (const char *)a->pages + token * 2 * a->kv_heads * a->size * size_of(form);
}

/* Request a share of the next part from memory, for all heads: number `n` of `shares`. */
INLINE void request(const struct attention *a, struct part next, long n, long shares, enum form form) {
    if (next.sequence < 0) return;
    const long bytes = 2 * a->kv_heads * a->size * size_of(form), left = prefix_of(a, next.sequence) - next.first;
    const long keys = left < PART ? left : PART, last = keys * (n + 1) / shares;
    long key = keys * n / shares;
    if (key >= last) return;
    for (struct walk walk = walk_from(a, next.sequence, next.first + key); key < last; key++) {
        const char *row = step(a, &walk, form);
        for (long d = 0; d < bytes; d += 64) __builtin_prefetch(row + d, 0, 2);
    }
}

/* Find where the first `count` keys and values of a part begin, for all heads. Those after the first `keys` keys of the
 * sequence are zeros. */
INLINE void find_rows(const struct attention *a, struct part part, long count, long keys, struct room *room,
                      enum form form) {
    const long bytes = size_of(form), kept = a->kv_heads * a->size * bytes;
    const long sequence = part.sequence, first = part.first, prefix = prefix_of(a, sequence);
    struct walk walk = walk_from(a, sequence, first);
    for (long n = 0; n < count; n++) {
        const long own = first + n - prefix, token = sequence * a->per_sequence + own;
        if (own < 0) {
            room->key[n] = step(a, &walk, form);
            room->value[n] = room->key[n] + kept;
        } else if (first + n < keys) {
            room->key[n] = (const char *)a->k + token * a->kv_stride * bytes;
            room->value[n] = (const char *)a->v + token * a->kv_stride * bytes;
        } else room->key[n] = room->value[n] = room->zeros;
    }
}

/* 16 words of a key from word `w` on. */
INLINE U words_of(const void *row, long w, long size, enum form form) {
    return paired(form) ? ((const U *)row)[w / LANES] : (U)run(row, 0, w, size, halved(form));
}

#define IN_TURN(n, s) (n) + (s), (n) + (s) + 32

/* 32 numbers of two rows in words, those of the first in the low halves. */
INLINE void pair_rows(const void *first, const void *second, U *low) {
    const W one = *(const W *)first, other = *(const W *)second;
    const W left = {SIXTEEN(IN_TURN, 0)}, right = {SIXTEEN(IN_TURN, 16)};
    low[0] = (U)__builtin_shuffle(one, other, left);
    low[1] = (U)__builtin_shuffle(one, other, right);
}

/* Index of the token and head of query `n` of a group, among all tokens and heads. */
INLINE long token_of(const struct attention *a, const struct group *g, long n) {
    return g->sequence * a->per_sequence + (g->first + n) / share_of(a);
}
INLINE long head_of(const struct attention *a, const struct group *g, long n) {
    return g->head * share_of(a) + (g->first + n) % share_of(a);
}

INLINE void read_queries(const struct attention *a, const struct group *g, const struct room *room, enum form form) {
    const F scale = all(paired(form) ? 1 : LOG2_E / sqrtf(a->size));
    for (long n = 0; n < multiple(g->count, form == MATRICES ? LANES : FEW); n++)
        for (long w = 0; w < a->words; w += LANES) {
            U word = {};
            if (n < g->count) {
                const long from = token_of(a, g, n) * a->q_stride + head_of(a, g, n) * a->size;
                word = words_of((const char *)a->q + from * size_of(form), w, a->size, form);
                if (!paired(form)) word = (U)((F)word * scale);
            }
            *(U *)(room->queries + n * a->words + w) = word;
        }
}

/* Read the first `count` keys and values of a part and head, and request those of the next part. */
INLINE void read_part(const struct attention *a, struct room *room, long head, long count, struct part next,
                      enum form form) {
    const long from = head * a->size * size_of(form);
    for (long n = 0; n < count; n += LANES) {
        request(a, next, (2 * head * count + n) / LANES, 2 * a->kv_heads * count / LANES, form);
        for (long w = 0; w < a->words; w += LANES) {
            U word[LANES];
            UNROLL for (int m = 0; m < LANES; m++) word[m] = words_of(room->key[n + m] + from, w, a->size, form);
            transpose(word);
            UNROLL for (int m = 0; m < LANES; m++) room->keys[((w + m) * PART + n) / LANES] = word[m];
        }
    }
    for (long n = 0; n < count; n += LANES) {
        request(a, next, ((2 * head + 1) * count + n) / LANES, 2 * a->kv_heads * count / LANES, form);
        for (long m = n; m < n + LANES; m += paired(form) ? 2 : 1) {
            U *line = room->values + m / (paired(form) ? 2 : 1) * a->padded / LANES;
            const char *row = room->value[m] + from, *second = paired(form) ? room->value[m + 1] + from : row;
            for (long d = 0; d < a->padded; d += paired(form) ? 2 * LANES : LANES)
                if (paired(form)) pair_rows(row + 2 * d, second + 2 * d, line + d / LANES);
                else line[d / LANES] = (U)run(row, 0, d, a->size, halved(form));
        }
    }
}

/* Sums [FEW, count] of `rows` words of FEW lines with as many rows of `count` vectors, a constant. */
INLINE void sum_up(const float *line, long line_stride, const U *row, long row_stride, long rows, int count,
                   F sum[FEW][FEW], enum form form) {
    N found[FEW][FEW * REGISTERS] = {};
    for (long w = 0; w < rows; w++, row += row_stride / LANES)
        UNROLL for (int m = 0; m < FEW; m++)
            UNROLL for (int n = 0; n < count * REGISTERS; n++) {
                const float one = line[m * line_stride + w];
#ifdef __AVX512BF16__
                if (paired(form))
                    found[m][n] = (F)_mm512_dpbf16_ps((__m512)found[m][n], (__m512bh)_mm512_set1_ps(one),
                                                      (__m512bh)row[n]);
                else
#endif
                found[m][n] += one * *((const N *)row + n);
            }
    (void)form;
    UNROLL for (int m = 0; m < FEW; m++)
        UNROLL for (int n = 0; n < count * REGISTERS; n++) *((N *)sum[m] + n) = found[m][n];
}

#ifdef __AMX_TILE__
/* The same for 16 lines, by matrix instructions; `rows` is a multiple of 16. The sums go to memory. */
INLINE void sum_up_by_matrices(const float *line, long line_stride, const U *row, long row_stride, long rows,
                               int count, float *sum, long sum_stride) {
    __asm__ volatile("" ::: "memory"); /* tiles are loaded behind the compiler's back */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long w = 0; w < rows; w += LANES) {
        const U *first = row + w * row_stride / LANES;
        _tile_loadd(4, line + w, line_stride * 4);
        _tile_loadd(5, first, row_stride * 4);
        _tile_loadd(6, first + 1, row_stride * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
        if (count == 2) continue;
        _tile_loadd(5, first + 2, row_stride * 4);
        _tile_loadd(6, first + 3, row_stride * 4);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, sum, sum_stride * 4);
    _tile_stored(1, sum + LANES, sum_stride * 4);
    if (count == 2) return;
    _tile_stored(2, sum + 2 * LANES, sum_stride * 4);
    _tile_stored(3, sum + 3 * LANES, sum_stride * 4);
}
#endif

/* A vector of scores of query `n` for the 16 keys from number `first` on; -inf where they are hidden. */
INLINE F shown(const struct attention *a, const struct group *g, long n, long first, F value) {
    const long own = first - prefix_of(a, g->sequence);
    if (own <= -LANES) return value;
    const long token = (g->first + n) / share_of(a);
    const I hidden = __builtin_convertvector(*(const B *)(a->seen + token * seen_width(a) + LANES + own), I) == 0;
    return (F)(((I)value & ~hidden) | ((I)all(-INFINITY) & hidden));
}

/* Scores of some queries from `n` on with `count` vectors of keys, a constant, from number `key` of the part on. */
INLINE void score_some(const struct attention *a, const struct group *g, const struct room *room, long first, long n,
                       long key, int count, enum form form) {
    const F scale = all(paired(form) ? LOG2_E / sqrtf(a->size) : 1);
    const float *line = room->queries + n * a->words;
    const U *row = room->keys + key / LANES;
    const long left = g->count - n;
    F *found = (F *)(room->scores + n * PART + key);
#ifdef __AMX_TILE__
    if (form == MATRICES) {
        sum_up_by_matrices(line, a->words, row, PART, a->words, count, (float *)found, PART);
        for (long m = 0; m < LANES && m < left; m++, found += PART / LANES)
            UNROLL for (int b = 0; b < count; b++)
                found[b] = shown(a, g, n + m, first + key + b * LANES, found[b] * scale);
        return;
    }
#endif
    F sum[FEW][FEW];
    sum_up(line, a->words, row, PART, a->words, count, sum, form);
    UNROLL for (int m = 0; m < FEW; m++, found += PART / LANES)
        UNROLL for (int b = 0; b < count; b++)
            found[b] = shown(a, g, m < left ? n + m : n, first + key + b * LANES, sum[m][b] * scale);
}

/* Scores of a part's first `count` keys. */
INLINE void score(const struct attention *a, const struct group *g, const struct room *room, long first, long count,
                  enum form form) {
    for (long n = 0; n < g->count; n += form == MATRICES ? LANES : FEW) {
        long key = 0;
        for (; key + FEW * LANES <= count; key += FEW * LANES) score_some(a, g, room, first, n, key, FEW, form);
        if (key < count) score_some(a, g, room, first, n, key, 2, form);
    }
}

/* Turn scores of a query into weights, in bf16 if words are pairs. The largest has weight 1 if any key is seen. */
INLINE void weigh(float *score, long count, float *largest, float *total, enum form form) {
    N most = (N){} - INFINITY, sum = {};
    for (long n = 0; n < count; n += NATIVE) {
        const N value = *(N *)(score + n);
        const NI less = most < value;
        most = (N)(((NI)value & less) | ((NI)most & ~less));
    }
    *largest = largest_in(most);
    const float base = *largest == -INFINITY ? 0 : *largest;
    for (long n = 0; n < count; n += NATIVE) {
        const N weight = power_of_two(*(N *)(score + n) - base);
        sum += weight;
#ifdef __AVX512F__
        store(score, n, paired(form), weight); /* never before what is read */
#else
        *(N *)(score + n) = weight;
#endif
    }
    (void)form;
    *total = sum_in(sum);
}

/* Sums of `count` vectors, a constant, of weighted values from number `d` on, for some queries from `n` on. */
INLINE void sum_some(const struct attention *a, const struct room *room, float *sums, long n, long d, long rows,
                     int count, enum form form) {
    const float *line = room->scores + n * PART;
    const U *row = room->values + d / LANES;
    sums += n * a->padded + d;
#ifdef __AMX_TILE__
    if (form == MATRICES) {
        sum_up_by_matrices(line, PART, row, a->padded, rows, count, sums, a->padded);
        return;
    }
#endif
    F sum[FEW][FEW];
    sum_up(line, PART, row, a->padded, rows, count, sum, form);
    UNROLL for (int m = 0; m < FEW; m++)
        UNROLL for (int b = 0; b < count; b++) *(F *)(sums + m * a->padded + b * LANES) = sum[m][b];
}

/* Results of a group for the first `count` keys of a part that were read. */
INLINE void attend(const struct attention *a, const struct group *g, struct room *room, long first, long count,
                   struct results to, enum form form) {
    const long rows = paired(form) ? count / 2 : count;
    score(a, g, room, first, count, form);
    for (long n = 0; n < multiple(g->count, LANES); n++)
        if (n < g->count) weigh(room->scores + n * PART, count, to.most + n, to.total + n, form);
        else to.most[n] = -INFINITY, to.total[n] = 0;
    for (long n = 0; n < g->count; n += form == MATRICES ? LANES : FEW) {
        long d = 0;
        for (; d + FEW * LANES <= a->padded; d += FEW * LANES) sum_some(a, room, to.sums, n, d, rows, FEW, form);
        if (d < a->padded) sum_some(a, room, to.sums, n, d, rows, 2, form);
    }
}

