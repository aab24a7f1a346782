/* Attention of query tokens over keys and values that lie in pages, and over those of the forward itself.
 *
 * Keys are read in parts, counted from the first key of a sequence. A part has a softmax of its own, and parts are
 * folded in their order. So a query's results do not depend, bit for bit, on other queries, on threads, nor on keys
 * that it does not see: what is hidden adds 0, if it is finite. `reference.py` defines the result. Tensors are
 * contiguous unless a stride is given.
 */
#include "attention_rows.h"

#define FORM SINGLE
#include "attention_part.h"
#define FORM WIDENED
#include "attention_part.h"
#ifdef __AVX512BF16__
#define FORM PAIRS
#include "attention_part.h"
#endif
#ifdef __AMX_TILE__
#define FORM MATRICES
#include "attention_part.h"
#endif

#define MOST_RESULTS (1L << 22) /* numbers, 16 MiB, that results of parts may take */

int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* Add the results of the next part. Not inlined: its bits must be the same wherever it is called. */
static void __attribute__((noinline)) fold(struct results to, struct results part, long count, long padded) {
    for (long n = 0; n < count; n += NATIVE) {
        const N before = *(N *)(to.most + n), now = *(N *)(part.most + n), most = larger_each(now, before);
        const NI none = before == now; /* both may be -inf, where neither saw a key */
        const N kept = power_of_two((N)((NI)(before - most) & ~none));
        const N added = power_of_two((N)((NI)(now - most) & ~none));
        *(N *)(to.most + n) = most;
        *(N *)(to.total + n) = *(N *)(to.total + n) * kept + *(N *)(part.total + n) * added;
        for (long m = 0; m < NATIVE && n + m < count; m++) {
            N *sum = (N *)(to.sums + (n + m) * padded);
            const N *other = (const N *)(part.sums + (n + m) * padded);
            for (long d = 0; d < padded / NATIVE; d++) sum[d] = sum[d] * kept[m] + other[d] * added[m];
        }
    }
}

/* Results of a group for `count` keys of the part that begins with key `first`. */
static void attend(const struct attention *a, const struct group *g, const struct room *room, long first, long count,
                   struct results to) {
    switch (a->form) {
    case SINGLE: attend_SINGLE(a, g, room, first, count, to); break;
    case WIDENED: attend_WIDENED(a, g, room, first, count, to); break;
#ifdef __AVX512BF16__
    case PAIRS: attend_PAIRS(a, g, room, first, count, to); break;
#endif
#ifdef __AMX_TILE__
    case MATRICES: attend_MATRICES(a, g, room, first, count, to); break;
#endif
    default: break;
    }
}

static void write_results(const struct attention *a, const struct group *g, struct results from) {
    for (long n = 0; n < g->count; n++) {
        const long to = (token_of(a, g, n) * a->heads + head_of(a, g, n)) * a->size;
        for (long d = 0; d < a->size; d += LANES)
            put_run(a->out, to, d, a->size, halved(a->form), *(F *)(from.sums + n * a->padded + d) / from.total[n]);
    }
}

INLINE struct group group_of(const struct attention *a, long sequence, long head, long n) {
    const long first = n * a->most, left = a->queries - first;
    return (struct group){sequence, head, first, left < a->most ? left : a->most, prefix_of(a, sequence) + a->own[n]};
}

/* Keys to be read of a part, zeros included, where `left` are left. */
INLINE long width_of(long left) { return left < PART ? multiple(left, BLOCK) : PART; }

static void forget_next(const struct attention *a, struct room *room) {
    find_rows(a, (struct part){0, 0}, 0, room->zeros, &room->next);
}

/* Room for a thread. Free it by `leave`. */
static struct room enter(const struct attention *a) {
    const long keys = a->words * BLOCK, values = a->padded * rows_of(a->form, PART);
    const long queries = QUERIES * a->words, scores = QUERIES * PART, zeros = multiple(a->kv_heads * a->size, LANES);
    float *place = aligned_alloc(64, multiple(4 * (keys + values + queries + scores + zeros + 2 * results_len(a)), 64));
    struct room room = {.keys = (U *)place};
    room.values = (U *)(place += keys);
    room.queries = place += values;
    room.scores = place += queries;
    room.zeros = memset(place += scores, 0, zeros * 4);
    room.results = place + zeros;
    forget_next(a, &room);
#ifdef __AMX_TILE__
    if (a->form == MATRICES) configure_tiles(LANES);
#endif
    return room;
}

static void leave(const struct attention *a, struct room *room) {
#ifdef __AMX_TILE__
    if (a->form == MATRICES) _tile_release();
#endif
    (void)a;
    free(room->keys);
}

/* All parts of one group. */
static void attend_group(const struct attention *a, struct group g, struct room *room) {
    const struct results all = results_at(a, room->results), one = results_at(a, room->results + results_len(a));
    for (long first = 0; first < g.keys; first += PART) {
        find_rows(a, (struct part){g.sequence, first}, g.keys, room->zeros, &room->now);
        attend(a, &g, room, first, width_of(g.keys - first), first ? one : all);
        if (first) fold(all, one, g.count, a->padded);
    }
    write_results(a, &g, all);
}

/* Attention of heads that have several groups. Threads share groups out, the last ones first: they see most keys. */
static void attend_to_groups(const struct attention *a, long sequences) {
    const long heads = sequences * a->kv_heads;
#pragma omp parallel
    {
        struct room room = enter(a);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < heads * a->groups; n++) {
            const long head = n % heads, group = a->groups - 1 - n / heads;
            attend_group(a, group_of(a, head / a->kv_heads, head % a->kv_heads, group), &room);
        }
        leave(a, &room);
    }
}

/* The parts of all sequences, where a head has one group. `number` [sequences] has that of each one's first part, and
 * `middle` [count] where the middle of each part lies among all keys, from 0 to 1. */
struct parts { long count, *number; struct part *part; double *middle; };

INLINE long keys_of(const struct attention *a, long sequence) { return prefix_of(a, sequence) + a->own[0]; }
INLINE long parts_of(long keys) { return (keys + PART - 1) / PART; }

/* Free them by `forget`. */
static struct parts find_parts(const struct attention *a, long sequences) {
    long count = 0, total = 0, before = 0, n = 0;
    for (long s = 0; s < sequences; s++) count += parts_of(keys_of(a, s)), total += keys_of(a, s);
    struct parts found = {count, malloc(sequences * sizeof(long)), malloc(count * sizeof(struct part)),
                          malloc(count * sizeof(double))};
    for (long s = 0; s < sequences; before += keys_of(a, s++)) {
        found.number[s] = n;
        for (long first = 0; first < keys_of(a, s); first += PART, n++) {
            const long left = keys_of(a, s) - first;
            found.part[n] = (struct part){s, first};
            found.middle[n] = (before + first + 0.5 * (left < PART ? left : PART)) / total;
        }
    }
    return found;
}

static void forget(struct parts parts) {
    free(parts.number);
    free(parts.part);
    free(parts.middle);
}

/* One part, for all heads. The results of a head follow those of the head before. Returns how many rows were read. */
static long attend_part(const struct attention *a, struct part part, const struct room *room, float *results) {
    const long count = width_of(keys_of(a, part.sequence) - part.first);
    for (long head = 0; head < a->kv_heads; head++, results += results_len(a)) {
        const struct group g = group_of(a, part.sequence, head, 0);
        attend(a, &g, room, part.first, count, results_at(a, results));
    }
    return count;
}

/* Find the rows of the next part from number `n` on that has keys in pages. Returns its number. */
static long expect(const struct attention *a, const struct parts *parts, long n, long last, struct room *room) {
    while (n < last && parts->part[n].first >= prefix_of(a, parts->part[n].sequence)) n++;
    if (n == last) forget_next(a, room);
    else find_rows(a, parts->part[n], keys_of(a, parts->part[n].sequence), room->zeros, &room->next);
    return n;
}

/* This thread's share of all parts: those whose middle lies in its share of all keys. A part with keys in pages is
 * requested from memory while the parts before are attended to, row by row; of a longer one the rest follows. */
static void attend_share(const struct attention *a, const struct parts *parts, struct room *room, float *results) {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads(), apart = a->kv_heads * results_len(a);
    long first = 0, last, read = 0;
    while (first < parts->count && parts->middle[first] * threads < thread) first++;
    for (last = first; last < parts->count && parts->middle[last] * threads < thread + 1;) last++;
    long next = expect(a, parts, first, last, room);
    for (long n = first; n < last; n++) {
        const struct part part = parts->part[n];
        if (n == next) {
            request_rest(a, &room->next, read);
            room->now = room->next;
            next = expect(a, parts, n + 1, last, room);
        } else find_rows(a, part, keys_of(a, part.sequence), room->zeros, &room->now);
        read = attend_part(a, part, room, results + n * apart);
    }
}

/* Fold the results of the parts of one head of a sequence, and write them. */
static void finish(const struct attention *a, long sequence, long head, float *results) {
    const struct group g = group_of(a, sequence, head, 0);
    const struct results all = results_at(a, results);
    for (long part = 1; part < parts_of(g.keys); part++) {
        results += a->kv_heads * results_len(a);
        fold(all, results_at(a, results), g.count, a->padded);
    }
    write_results(a, &g, all);
}

/* Attention of heads that have one group. Threads share parts out, each with all heads: so memory is read in order. */
static void attend_to_parts(const struct attention *a, long sequences) {
    const struct parts parts = find_parts(a, sequences);
    const long apart = a->kv_heads * results_len(a);
    float *results = aligned_alloc(64, multiple(parts.count * apart * 4, 64));
#pragma omp parallel
    {
        struct room room = enter(a);
        attend_share(a, &parts, &room, results);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long n = 0; n < sequences * a->kv_heads; n++) {
            const long sequence = n / a->kv_heads, head = n % a->kv_heads;
            finish(a, sequence, head, results + parts.number[sequence] * apart + head * results_len(a));
        }
        leave(a, &room);
    }
    free(results);
    forget(parts);
}

/* Both ways have the same bits. Results of parts have a place each, so many parts of many queries are no way. */
static void attention_of(const struct attention *a, long sequences) {
    long parts = 0;
    for (long s = 0; s < sequences; s++) parts += parts_of(keys_of(a, s));
    if (a->groups > 1 || parts * a->kv_heads * results_len(a) > MOST_RESULTS) attend_to_groups(a, sequences);
    else attend_to_parts(a, sequences);
}

/* What tokens see, with what lies before and after; and how many own keys each group sees. */
static void find_seen(struct attention *a, const uint8_t *visible) {
    const long width = seen_width(a), own = a->per_sequence;
    for (long token = 0; token < own; token++) {
        uint8_t *row = a->seen + token * width;
        memset(row, 1, LANES);
        memcpy(row + LANES, visible + token * own, own);
        memset(row + LANES + own, 0, PART);
    }
    for (long n = 0; n < a->groups; n++) {
        const struct group g = {.first = n * a->most};
        const long left = a->queries - g.first, count = left < a->most ? left : a->most;
        a->own[n] = 1;
        for (long token = g.first / share_of(a); token <= (g.first + count - 1) / share_of(a); token++)
            for (long key = own; key > a->own[n]; key--)
                if (visible[token * own + key - 1]) a->own[n] = key;
    }
}

static enum form form_of(long size, int half) {
#ifdef __AVX512BF16__
    if (half && size % 32 == 0) return matrices ? MATRICES : PAIRS;
#endif
    (void)size;
    return half ? WIDENED : SINGLE;
}

/* Strides are those of a token, in entries; k and v have the same. */
void paged_attention(const void *q, const void *k, const void *v, long q_stride, long kv_stride, const void *pages,
                     long page_len, const int64_t *table, long table_stride, long table_len, const int64_t *prefix_len,
                     const uint8_t *visible, long sequences, long per_sequence, long heads, long kv_heads, long size,
                     int half, void *out) {
    const enum form form = form_of(size, half);
    const long padded = multiple(size, EVEN), queries = per_sequence * heads / kv_heads;
    const long groups = (queries + QUERIES - 1) / QUERIES, most = (queries + groups - 1) / groups;
    struct attention a = {q, k, v, pages, table, prefix_len, out, q_stride, kv_stride, table_stride, table_len,
                          page_len, per_sequence, heads, kv_heads, size, form, padded, paired(form) ? size / 2 : padded,
                          queries, groups, most, 0, 0};
    a.seen = malloc(per_sequence * seen_width(&a));
    a.own = malloc(groups * sizeof(long));
    find_seen(&a, visible);
    attention_of(&a, sequences);
    free(a.own);
    free(a.seen);
}
