/* Attention of some queries of one key head over one part of the keys of their sequence, for one FORM of words.
 *
 * Keys are turned, so that 16 of them lie in the lanes of a vector. A query's words meet them one by one. A word of 32
 * bits is a number in fp32, or two in bf16. Sums are in fp32. Results in bf16 are rounded once, and so are weights that
 * meet values in pairs.
 *
 * The first FEW queries meet keys and values while these are read; for others a block is kept in the room. A query's
 * sums have one order in both cases, so their bits are the same. Functions that are not inlined have all registers.
 */
#define NAME_OF(name, form) name##_##form
#define NAMED(name, form) NAME_OF(name, form)
#define NAME(name) NAMED(name, FORM)
#define APART static __attribute__((noinline))
#define AT_ONCE (NATIVE == LANES && FORM != MATRICES) /* whether queries meet what is read in registers */

/* 16 words of a key from word `w` on. */
INLINE U NAME(words_of)(const void *row, long w, long size) {
    return paired(FORM) ? ((const U *)row)[w / LANES] : (U)run(row, 0, w, size, halved(FORM));
}

INLINE F NAME(dot)(F sum, float one, U row) {
#ifdef __AVX512BF16__
    if (paired(FORM)) return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(one), (__m512bh)row);
#endif
    return sum + one * (F)row;
}

APART void NAME(read_queries)(const struct attention *a, const struct group *g, const struct room *room) {
    const F scale = all(paired(FORM) ? 1 : LOG2_E / sqrtf(a->size));
    float *to = room->queries;
    long token = token_of(a, g, 0), head = g->first % share_of(a);
    for (long n = 0; n < multiple(g->count, lines_of(FORM)); n++, to += a->words) {
        const long from = token * a->q_stride + (g->head * share_of(a) + head) * a->size;
        for (long w = 0; w < a->words; w += LANES) {
            U word = {};
            if (n < g->count) word = NAME(words_of)((const char *)a->q + from * size_of(FORM), w, a->size);
            if (!paired(FORM)) word = (U)((F)word * scale);
            *(U *)(to + w) = word;
        }
        if (++head == share_of(a)) head = 0, token++;
    }
}

/* Add to sums: `rows` words of FEW lines with as many rows of two vectors. */
INLINE void NAME(sum_up)(const float *line, long line_stride, const U *row, long row_stride, long rows, F sum[FEW][2]) {
    N found[FEW][EVEN / NATIVE];
    UNROLL for (int m = 0; m < FEW; m++)
        UNROLL for (int n = 0; n < EVEN / NATIVE; n++) found[m][n] = *((N *)sum[m] + n);
    for (long w = 0; w < rows; w++, row += row_stride / LANES)
        UNROLL for (int m = 0; m < FEW; m++) {
            const float one = line[m * line_stride + w];
#if NATIVE == LANES
            UNROLL for (int n = 0; n < 2; n++) found[m][n] = NAME(dot)(found[m][n], one, row[n]);
#else
            UNROLL for (int n = 0; n < EVEN / NATIVE; n++) found[m][n] += one * *((const N *)row + n);
#endif
        }
    UNROLL for (int m = 0; m < FEW; m++)
        UNROLL for (int n = 0; n < EVEN / NATIVE; n++) *((N *)sum[m] + n) = found[m][n];
}

/* Read the block of keys from number `first` of the part on, request as many of the next part, and keep them in the
 * room if `keep` is 1. `sum` has the products with the first FEW queries, where they are computed AT_ONCE. */
APART void NAME(read_keys)(const struct attention *a, const struct room *room, long head, long first, int keep,
                           F sum[FEW][2]) {
    const long from = head * a->size * size_of(FORM);
    for (long n = 0; n < BLOCK; n += LANES) {
        const char *const *row = room->now.key + first + n, *const *next = room->next.key + first + n;
        F found[FEW] = {};
        for (long w = 0; w < a->words; w += LANES) {
            U word[LANES];
            UNROLL for (int m = 0; m < LANES; m++) {
                __builtin_prefetch(next[m] + from + w * (FORM == WIDENED ? 2 : 4), 0, 2);
                word[m] = NAME(words_of)(row[m] + from, w, a->size);
            }
            transpose(word);
            if (keep)
                UNROLL for (int m = 0; m < LANES; m++) room->keys[((w + m) * BLOCK + n) / LANES] = word[m];
            if (AT_ONCE)
                UNROLL for (int m = 0; m < LANES; m++)
                    UNROLL for (int q = 0; q < FEW; q++)
                        found[q] = NAME(dot)(found[q], room->queries[q * a->words + w + m], word[m]);
        }
        UNROLL for (int q = 0; q < FEW; q++) sum[q][n / LANES] = found[q];
    }
}

#define IN_TURN(n, s) (n) + (s), (n) + (s) + 32

/* Write sums of FEW queries. */
INLINE void NAME(put_sums)(const struct attention *a, float *to, F sum[FEW][2]) {
    UNROLL for (int m = 0; m < FEW; m++)
        UNROLL for (int b = 0; b < 2; b++) *(F *)(to + m * a->padded + b * LANES) = sum[m][b];
}

/* Read row `n` of values, 32 numbers from number `d` on, and request those of the next part. Where rows are paired,
 * these are rows 2n and 2n + 1 in words, the first in the low halves. */
INLINE void NAME(read_row)(const struct attention *a, const struct room *room, long n, long from, long d, U row[2]) {
    const long first = paired(FORM) ? 2 * n : n, at = from + d * size_of(FORM);
    const char *const *value = room->now.value + first, *const *next = room->next.value + first;
    __builtin_prefetch(next[0] + at, 0, 2);
    __builtin_prefetch(paired(FORM) ? next[1] + at : next[0] + at + 64, 0, 2);
    if (paired(FORM)) {
        const W one = *(const W *)(value[0] + at), other = *(const W *)(value[1] + at);
        const W left = {SIXTEEN(IN_TURN, 0)}, right = {SIXTEEN(IN_TURN, 16)};
        row[0] = (U)__builtin_shuffle(one, other, left);
        row[1] = (U)__builtin_shuffle(one, other, right);
    } else
        UNROLL for (int b = 0; b < 2; b++) row[b] = (U)run(value[0] + from, 0, d + b * LANES, a->size, halved(FORM));
}

/* The same as `read_keys` for the first `count` values of the part; products go to the sums of the first FEW queries. */
APART void NAME(read_values)(const struct attention *a, const struct room *room, long head, long count, int keep,
                             float *sums) {
    const long from = head * a->size * size_of(FORM);
    for (long d = 0; d < a->padded; d += EVEN) {
        F sum[FEW][2] = {};
        for (long n = 0; n < rows_of(FORM, count); n++) {
            U row[2];
            NAME(read_row)(a, room, n, from, d, row);
            if (keep)
                UNROLL for (int b = 0; b < 2; b++) room->values[(n * a->padded + d) / LANES + b] = row[b];
            if (AT_ONCE)
                UNROLL for (int m = 0; m < FEW; m++)
                    UNROLL for (int b = 0; b < 2; b++)
                        sum[m][b] = NAME(dot)(sum[m][b], room->scores[m * PART + n], row[b]);
        }
        if (AT_ONCE) NAME(put_sums)(a, sums + d, sum);
    }
}

/* Write scores of some queries from `n` on with the block of keys from number `key` of the part on. */
INLINE void NAME(put_scores)(const struct attention *a, const struct group *g, const struct room *room, long first,
                             long n, long key, F sum[FEW][2]) {
    const F scale = all(paired(FORM) ? LOG2_E / sqrtf(a->size) : 1);
    F *found = (F *)(room->scores + n * PART + key);
    UNROLL for (int m = 0; m < FEW; m++, found += PART / LANES)
        UNROLL for (int b = 0; b < 2; b++)
            found[b] = shown(a, g, m < g->count - n ? n + m : n, first + key + b * LANES, sum[m][b] * scale);
}

#ifdef __AMX_TILE__
/* Sums of 16 lines by matrix instructions, as `sum_up` has them, in memory; `rows` is a multiple of 16. */
INLINE void NAME(sum_up_by_matrices)(const float *line, long line_stride, const U *row, long row_stride, long rows,
                                     float *sum, long sum_stride) {
    __asm__ volatile("" ::: "memory"); /* tiles are loaded behind the compiler's back */
    _tile_zero(0);
    _tile_zero(1);
    for (long w = 0; w < rows; w += LANES) {
        const U *first = row + w * row_stride / LANES;
        _tile_loadd(4, line + w, line_stride * 4);
        _tile_loadd(5, first, row_stride * 4);
        _tile_loadd(6, first + 1, row_stride * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, sum, sum_stride * 4);
    _tile_stored(1, sum + LANES, sum_stride * 4);
}
#endif

/* Scores of some queries from `n` on with the block of keys that the room has. */
APART void NAME(score)(const struct attention *a, const struct group *g, const struct room *room, long first, long n,
                       long key) {
    const float *line = room->queries + n * a->words;
    F sum[FEW][2] = {};
#ifdef __AMX_TILE__
    if (FORM == MATRICES) {
        float *found = room->scores + n * PART + key;
        NAME(sum_up_by_matrices)(line, a->words, room->keys, BLOCK, a->words, found, PART);
        for (long m = n; m < n + LANES && m < g->count; m += FEW, found += FEW * PART) {
            UNROLL for (int q = 0; q < FEW; q++)
                UNROLL for (int b = 0; b < 2; b++) sum[q][b] = *(F *)(found + q * PART + b * LANES);
            NAME(put_scores)(a, g, room, first, m, key, sum);
        }
        return;
    }
#endif
    NAME(sum_up)(line, a->words, room->keys, BLOCK, a->words, sum);
    NAME(put_scores)(a, g, room, first, n, key, sum);
}

/* Turn scores of FEW queries into weights, in bf16 if words are pairs. The largest has weight 1 if any key is seen. */
APART void NAME(weigh)(float *score, long count, float *largest, float *total) {
    N most[FEW], sum[FEW] = {};
    float base[FEW];
    UNROLL for (int m = 0; m < FEW; m++) most[m] = (N){} - INFINITY;
    for (long n = 0; n < count; n += NATIVE)
        UNROLL for (int m = 0; m < FEW; m++) most[m] = larger_each(*(N *)(score + m * PART + n), most[m]);
    UNROLL for (int m = 0; m < FEW; m++) {
        largest[m] = largest_in(most[m]);
        base[m] = largest[m] == -INFINITY ? 0 : largest[m];
    }
    for (long n = 0; n < count; n += NATIVE)
        UNROLL for (int m = 0; m < FEW; m++) {
            const N weight = power_of_two(*(N *)(score + m * PART + n) - base[m]);
            sum[m] += weight;
#ifdef __AVX512F__
            store(score + m * PART, n, paired(FORM), weight); /* never before what is read */
#else
            *(N *)(score + m * PART + n) = weight;
#endif
        }
    UNROLL for (int m = 0; m < FEW; m++) total[m] = sum_in(sum[m]);
}

/* Sums of some queries from `n` on with the first `count` values of the part, which the room has. */
APART void NAME(sum)(const struct attention *a, const struct room *room, float *sums, long n, long count) {
    const float *line = room->scores + n * PART;
    const long rows = rows_of(FORM, count);
    sums += n * a->padded;
    for (long d = 0; d < a->padded; d += EVEN) {
        const U *row = room->values + d / LANES;
        F sum[FEW][2] = {};
#ifdef __AMX_TILE__
        if (FORM == MATRICES) {
            NAME(sum_up_by_matrices)(line, PART, row, a->padded, rows, sums + d, a->padded);
            continue;
        }
#endif
        NAME(sum_up)(line, PART, row, a->padded, rows, sum);
        NAME(put_sums)(a, sums + d, sum);
    }
}

/* Results of a group for the first `count` keys of the part that begins with key `first`; `count` is a multiple of
 * BLOCK. */
APART void NAME(attend)(const struct attention *a, const struct group *g, const struct room *room, long first,
                        long count, struct results to) {
    const long others = AT_ONCE ? FEW : 0;
    const int keep = g->count > others;
    NAME(read_queries)(a, g, room);
    for (long key = 0; key < count; key += BLOCK) {
        F sum[FEW][2];
        NAME(read_keys)(a, room, g->head, key, keep, sum);
        if (AT_ONCE) NAME(put_scores)(a, g, room, first, 0, key, sum);
        for (long n = others; n < g->count; n += lines_of(FORM)) NAME(score)(a, g, room, first, n, key);
    }
    for (long n = 0; n < g->count; n += FEW) NAME(weigh)(room->scores + n * PART, count, to.most + n, to.total + n);
    for (long n = g->count; n < multiple(g->count, LANES); n++) to.most[n] = -INFINITY, to.total[n] = 0;
    NAME(read_values)(a, room, g->head, count, keep, to.sums);
    for (long n = others; n < g->count; n += lines_of(FORM)) NAME(sum)(a, room, to.sums, n, count);
}

#undef IN_TURN
#undef AT_ONCE
#undef APART
#undef NAME
#undef NAMED
#undef NAME_OF
#undef FORM
