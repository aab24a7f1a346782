/* What attention of some queries over one part of the keys of their sequence reads, and where. */
#include "kernels.h"
#include "numbers.h"
#include "tiles.h"

#define PART 128 /* keys */
#define BLOCK 32 /* keys that are read at a time: they stay in the first cache */
#define QUERIES 64 /* of one key head that share what is read of keys and values */
#define FEW (NATIVE == LANES ? 4 : 2) /* queries whose sums with two vectors stay in registers */
#define EVEN (2 * LANES) /* numbers of a value are filled up to a multiple of this */
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

/* A part of a sequence's keys, from number `first` on. */
struct part { long sequence, first; };

/* Where the keys and values of a part begin, for all heads. The first `kept` of them lie in pages; where the part has
 * ended, there are zeros. */
struct rows { const char *key[PART], *value[PART]; long kept; };

/* A thread's room: queries [QUERIES, words], keys [words, BLOCK], values [rows, padded], scores [QUERIES,
 * PART], results, zeros in place of a key, where a part lies, and where the one lies that is read next. */
struct room {
    float *queries, *scores, *results;
    U *keys, *values;
    const char *zeros;
    struct rows now, next;
};

/* Queries of one key head: `count` from `first` on, counted token by token. They see some of the first `keys` keys. */
struct group { long sequence, head, first, count, keys; };

/* Results of a group for one part or several: the largest score and the sum of weights of each query, and sums of
 * weighted values [count, padded]. */
struct results { float *most, *total, *sums; };

INLINE long multiple(long n, long of) { return (n + of - 1) / of * of; }
INLINE long share_of(const struct attention *a) { return a->heads / a->kv_heads; }
INLINE long seen_width(const struct attention *a) { return LANES + a->per_sequence + PART; }
INLINE int paired(enum form form) { return form >= PAIRS; }
INLINE int halved(enum form form) { return form != SINGLE; }
INLINE long size_of(enum form form) { return halved(form) ? 2 : 4; }
INLINE long rows_of(enum form form, long values) { return paired(form) ? values / 2 : values; }
INLINE long lines_of(enum form form) { return form == MATRICES ? LANES : FEW; } /* queries that are computed together */

INLINE long prefix_of(const struct attention *a, long sequence) {
    long prefix = a->prefix_len[sequence], most = a->table_len * a->page_len;
    return prefix < most ? prefix : most; /* a slot that is not in use may have any */
}

INLINE long results_len(const struct attention *a) {
    return 2 * multiple(a->most, LANES) + multiple(a->most, lines_of(a->form)) * a->padded;
}

INLINE struct results results_at(const struct attention *a, float *place) {
    const long wide = multiple(a->most, LANES);
    return (struct results){place, place + wide, place + 2 * wide};
}

/* Index of the token and head of query `n` of a group, among all tokens and heads. */
INLINE long token_of(const struct attention *a, const struct group *g, long n) {
    return g->sequence * a->per_sequence + (g->first + n) / share_of(a);
}
INLINE long head_of(const struct attention *a, const struct group *g, long n) {
    return g->head * share_of(a) + (g->first + n) % share_of(a);
}

/* Find where the keys and values of a part begin. Those after the first `keys` keys of the sequence are zeros. In a
 * page the values of a token lie behind its keys. */
static void find_rows(const struct attention *a, struct part part, long keys, const char *zeros, struct rows *rows) {
    const long bytes = size_of(a->form), wide = a->kv_heads * a->size * bytes, prefix = prefix_of(a, part.sequence);
    const long left = keys - part.first, count = left < PART ? left : PART;
    const long kept = prefix - part.first < count ? prefix - part.first : count;
    const int64_t *page = a->table + part.sequence * a->table_stride + part.first / a->page_len;
    long n = 0;
    for (long place = part.first % a->page_len; n < kept; page++, place = 0) {
        const char *row = (const char *)a->pages + (*page * a->page_len + place) * 2 * wide;
        const long end = n + a->page_len - place < kept ? n + a->page_len - place : kept;
        for (; n < end; n++, row += 2 * wide) rows->key[n] = row, rows->value[n] = row + wide;
    }
    rows->kept = n;
    for (; n < count; n++) {
        const long from = (part.sequence * a->per_sequence + part.first + n - prefix) * a->kv_stride * bytes;
        rows->key[n] = (const char *)a->k + from;
        rows->value[n] = (const char *)a->v + from;
    }
    for (; n < PART; n++) rows->key[n] = rows->value[n] = zeros;
}

/* Request from memory what lies in pages of the next part, from row `first` on. */
static void request_rest(const struct attention *a, const struct rows *next, long first) {
    const long bytes = 2 * a->kv_heads * a->size * size_of(a->form);
    for (; first < next->kept; first++)
        for (long d = 0; d < bytes; d += 64) __builtin_prefetch(next->key[first] + d, 0, 2);
}

/* A vector of scores of query `n` for the 16 keys from number `first` on; -inf where they are hidden. */
INLINE F shown(const struct attention *a, const struct group *g, long n, long first, F value) {
    const long own = first - prefix_of(a, g->sequence);
    if (own <= -LANES) return value;
    const long token = (g->first + n) / share_of(a);
    const I hidden = __builtin_convertvector(*(const B *)(a->seen + token * seen_width(a) + LANES + own), I) == 0;
    return (F)(((I)value & ~hidden) | ((I)all(-INFINITY) & hidden));
}
