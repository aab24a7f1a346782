/* Products of a few tokens with a weight that lies in memory in the order of use.
 *
 * A token's results do not depend, bit for bit, on how many tokens a call has: its sums have one order.
 *
 * A weight lies in panels of 32 output channels: first all of panel 0, then panel 1. Within a panel the inputs follow
 * each other, and a word of 32 bits for each channel holds one or more of them:
 *
 *   fp32  a word holds one input
 *   bf16  two inputs, the first in the low half
 *   int8  four inputs, the first in the lowest byte; each is counted from 128 steps below 0
 *   int4  eight inputs, the first in the lowest bits. Before each 32 inputs stands one word for each channel, with the
 *         step of the group in its high half and the value of step 0 in its low half, both in bf16
 *
 * Channels are filled up to a multiple of 32 with zeros, and words of a channel to a multiple of `words_together`. A
 * width of int4 is a multiple of 32 and is not filled up. `linear.py` and `quantised_linear.py` lay weights out. A bias
 * is in fp32, or null. Sums are in fp32; those of 64 inputs of int8, and of a group of int4, in int32. A token with a
 * value that is not finite has results that are not finite. Threads are those of torch: the library finds torch's
 * OpenMP when it is loaded.
 */
#include "kernels.h"
#include "numbers.h"
#include "tiles.h"
#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>
#endif

int omp_get_max_threads(void);

#define GROUP 32
#define GROUP_WORDS (GROUP / 8 + 1)
#define PART 64
#define AHEAD(tokens) ((tokens) == 1 ? 4096 : 8192) /* bytes that are requested before their use */
#define SEVERAL 6
#define BLOCK 80 /* words of a channel for which a thread lays out tokens at a time; 16 and 5 divide it */
#ifdef __AVX512F__
#define MOST 12 /* tokens of a tile: they are computed together, as many as registers hold */
#else
#define MOST 2
#endif

/* Call `of` with the constant that `count` is, from 1 to MOST. */
#define CASE(n, of)                                                                                                \
    case n:                                                                                                        \
        if (n <= MOST) of(n);                                                                                      \
        break;
#define CONSTANT(count, of)                                                                                        \
    switch (count) {                                                                                               \
        CASE(1, of) CASE(2, of) CASE(3, of) CASE(4, of) CASE(5, of) CASE(6, of)                                    \
        CASE(7, of) CASE(8, of) CASE(9, of) CASE(10, of) CASE(11, of) CASE(12, of)                                 \
    }

int matrices = 0;
/* Words of a channel are filled up to a multiple of this. */
#ifdef __AMX_TILE__
const int words_together = 16;
#else
const int words_together = 1;
#endif

/* Prepare the processor. Returns whether matrix instructions are used. */
int start(void) {
#ifdef __AMX_TILE__
    matrices = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#endif
    return matrices;
}

/* How weights lie, and what multiplies them: PAIRS are two inputs of BF16 that one instruction takes. */
enum form { FP32, BF16, PAIRS, INT8, INT4 };

/* A step along the inputs: these are its inputs, the words that a channel has for them, and the bytes that they take of
 * a token once it is laid out. */
INLINE int inputs_of(enum form form) { return form == FP32 ? 1 : form == INT8 ? PART : form == INT4 ? GROUP : 2; }
INLINE int words_of(enum form form) { return form == INT8 ? PART / 4 : form == INT4 ? GROUP_WORDS : 1; }
INLINE int bytes_of(enum form form) { return form >= INT8 ? inputs_of(form) + 8 : form == BF16 ? 8 : 4; }

/* Words of a channel, with those that fill it up. */
INLINE long words_of_channel(enum form form, long width) {
    const long inputs = words_together * (form == INT8 ? 4 : inputs_of(form));
    if (form == INT4) return width / GROUP * GROUP_WORDS;
    return (width + inputs - 1) / inputs * words_together;
}

/* Tokens in tiles, about equally many in each: the first `larger` ones have one token more than `least`. */
struct tiles { long count, least, larger; };

static struct tiles tiles_of(long tokens, long count) {
    const long fewest = (tokens + MOST - 1) / MOST;
    if (count < fewest) count = fewest;
    return (struct tiles){count, tokens / count, tokens % count};
}

INLINE long all_of(const struct tiles *tiles) { return tiles->count * tiles->least + tiles->larger; }

INLINE long first_of(const struct tiles *tiles, long tile) {
    return tile * tiles->least + (tile < tiles->larger ? tile : tiles->larger);
}

INLINE long tokens_of(const struct tiles *tiles, long tile) { return tiles->least + (tile < tiles->larger); }

/* A product: see the top of the file. Token n is row n of `x` and of `y`, or the row that `from` or `to` gives it.
 * `laid` holds the tokens as `lay_block` leaves them, tile by tile; each has `steps` steps along the inputs. Results are
 * added to what is there if `adds` is 1. */
struct product {
    const U *weight;
    const float *scale, *bias;
    long out, width, words, steps;
    struct tiles tiles;
    const void *x;
    char *laid;
    void *y;
    const long *from, *to;
    int half, adds;
};

INLINE long row_of(const long *rows, long token) { return rows ? rows[token] : token; }

/* Write the results of one token for the 32 channels of a panel, or add them to what is there. */
INLINE void put(void *y, long out, long row, long channel, int half, const float *bias, const F *sum, int adds) {
    UNROLL for (int p = 0; p < 2; p++, channel += LANES) {
        long left = out - channel, place = row * out + channel;
        F value = sum[p];
        if (left >= LANES) {
            if (bias) value += load(bias, channel, 0);
            if (adds) value += load(y, place, half);
            store(y, place, half, value);
        } else if (left > 0) {
            if (bias) value += load_some(bias, channel, 0, left, 0);
            if (adds) value += load_some(y, place, half, left, 0);
            store_some(y, place, half, left, value);
        }
    }
}

/* Request what a stream of weights needs next for `halves` of a panel. It goes to the second cache: lines on their way
 * to the first would hold up those that are read. */
INLINE void fetch(int tokens, int halves, const U *word) {
    UNROLL for (int n = 0; n < halves; n++) __builtin_prefetch((const char *)(word + n) + AHEAD(tokens), 0, 2);
}

/* Values of 16 channels for input `j` of a word. */
INLINE F weights_of(enum form form, U word, int j) {
    return form == FP32 ? (F)word : (F)(j ? word >> 16 << 16 : word << 16);
}

/* Sums, to which the products of two weights with two inputs of a token are added, all in bf16. */
INLINE F dot_pairs(F sum, U word, uint32_t pair) {
#ifdef __AVX512BF16__
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)word);
#else
    return (void)word, (void)pair, sum; /* there is no such form then */
#endif
}

/* Sums, to which the products of four levels of weights, which are not negative, with four of a token are added. */
INLINE I dot_levels(I sum, U word, const int8_t *levels) {
    int32_t x;
    memcpy(&x, levels, 4);
#ifdef __AVX512VNNI__
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)word, _mm512_set1_epi32(x));
#else
    UNROLL for (int n = 0; n < 4; n++) sum += (I)(word >> (8 * n) & 255) * (int32_t)(int8_t)(x >> (8 * n));
    return sum;
#endif
}

/* Sums [tokens, 2] of a panel with the `tokens` tokens of a tile, a constant. `words` are those of a channel. */
INLINE void sums_of_numbers(enum form form, int tokens, const U *word, long words, const void *laid, F sums[][2]) {
    const float *x = laid;
    const uint32_t *pair = laid;
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (long k = 0; k < words; k++, word += 2, pair += tokens) {
        fetch(tokens, 2, word);
        if (form == PAIRS)
            UNROLL for (int t = 0; t < tokens; t++)
                UNROLL for (int p = 0; p < 2; p++) sum[t][p] = dot_pairs(sum[t][p], word[p], pair[t]);
        else
            UNROLL for (int j = 0; j < inputs_of(form); j++, x += tokens) {
                const F first = weights_of(form, word[0], j), second = weights_of(form, word[1], j);
                UNROLL for (int t = 0; t < tokens; t++) sum[t][0] += first * x[t], sum[t][1] += second * x[t];
            }
    }
    UNROLL for (int t = 0; t < tokens; t++) sums[t][0] = sum[t][0], sums[t][1] = sum[t][1];
}

/* The same for weights in int8. A part of the tokens has PART levels of each token, then each token's step, then 128
 * times the sum of its levels: that is the weights' zero. Products of a part are integers. */
INLINE void sums_of_parts(int tokens, const U *word, long words, const int8_t *level, F sums[][2]) {
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (; words > 0; words -= PART / 4, level += bytes_of(INT8) * tokens) {
        const float *step = (const float *)(level + PART * tokens);
        const int32_t *middle = (const int32_t *)(step + tokens);
        I dot[MOST][2];
        UNROLL for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = (I){} - middle[t];
        for (long k = 0; k < PART / 4 && k < words; k++, word += 2) {
            fetch(tokens, 2, word);
            UNROLL for (int t = 0; t < tokens; t++)
                UNROLL for (int p = 0; p < 2; p++) dot[t][p] = dot_levels(dot[t][p], word[p], level + PART * t + 4 * k);
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int p = 0; p < 2; p++) sum[t][p] += __builtin_convertvector(dot[t][p], F) * step[t];
    }
    UNROLL for (int t = 0; t < tokens; t++) sums[t][0] = sum[t][0], sums[t][1] = sum[t][1];
}

/* The same for weights in int4 and `halves` of a panel, 1 or 2, from number `first` on. A group of the tokens has GROUP
 * levels of each token in the order of those in the halves of words: of each eight inputs first those with an even
 * index, then the others. Then come each token's step, and its step times the sum of its levels. Products of a group
 * are integers. */
INLINE void sums_of_groups(int tokens, int first, int halves, const U *word, long words, const int8_t *level,
                           F sums[][2]) {
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (word += first; words > 0; words -= GROUP_WORDS, word += 2 * GROUP_WORDS, level += bytes_of(INT4) * tokens) {
        const float *step = (const float *)(level + GROUP * tokens), *total = step + tokens;
        I dot[MOST][2] = {};
        UNROLL for (int k = 0; k < GROUP_WORDS; k++) fetch(tokens, halves, word + 2 * k);
        UNROLL for (int k = 0; k < GROUP / 8; k++)
            UNROLL for (int p = 0; p < halves; p++) {
                const U both = word[2 * k + 2 + p], even = both & 0x0f0f0f0f, odd = both >> 4 & 0x0f0f0f0f;
                UNROLL for (int t = 0; t < tokens; t++) {
                    const int8_t *x = level + GROUP * t + 8 * k;
                    dot[t][p] = dot_levels(dot_levels(dot[t][p], even, x), odd, x + 4);
                }
            }
        UNROLL for (int p = 0; p < halves; p++) {
            const F size = (F)(word[p] >> 16 << 16), least = (F)(word[p] << 16);
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t][p] += __builtin_convertvector(dot[t][p], F) * (size * step[t]) + least * total[t];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int p = 0; p < halves; p++) sums[t][first + p] = sum[t][p];
}

/* The sums of SEVERAL tokens with weights in int4 leave too few registers for both halves of a panel at a time. */
INLINE void sums_of_tile(enum form form, int tokens, const U *word, long words, const void *laid, F sums[][2]) {
    if (form == INT8) sums_of_parts(tokens, word, words, laid, sums);
    else if (form != INT4) sums_of_numbers(form, tokens, word, words, laid, sums);
    else if (tokens < SEVERAL) sums_of_groups(tokens, 0, 2, word, words, laid, sums);
    else
        UNROLL for (int p = 0; p < 2; p++) sums_of_groups(tokens, p, 1, word, words, laid, sums);
}

/* Products of panel `n` with the tokens of a tile. */
INLINE void panel(enum form form, const struct product *of, long n, long tile) {
    const U *word = of->weight + n * 2 * of->words;
    const long token = first_of(&of->tiles, tile), count = tokens_of(&of->tiles, tile);
    const char *laid = of->laid + token * of->steps * bytes_of(form);
    F sums[MOST][2];
#define TILE(count) sums_of_tile(form, count, word, of->words, laid, sums)
    CONSTANT(count, TILE)
    for (long t = 0; t < count; t++) {
        if (form == INT8) UNROLL for (int p = 0; p < 2; p++) sums[t][p] *= load(of->scale, n * 32 + p * LANES, 0);
        put(of->y, of->out, row_of(of->to, token + t), n * 32, of->half, of->bias, sums[t], of->adds);
    }
}

INLINE long panels_of(const struct product *of) { return (of->out + 31) / 32; }

/* Whether a weight is worth more than one thread: to start them takes as long as to read so many words. */
INLINE int large(const struct product *of) { return of->out > 32 && of->out * of->words > 32768; }

/* The largest absolute value of a step of one token, at least 1e-30; not finite if one of them is not. */
INLINE float largest_size(const void *x, long first, long left, int inputs, int half) {
    I most = (I)all(1e-30f);
    UNROLL for (int n = 0; n < inputs; n += LANES)
        if (n < left) most = larger_bits(most, (I)run(x, first, n, left, half) & 0x7fffffff);
    const I largest = (I){} + largest_bits_of(most);
    return ((F)largest)[0];
}

INLINE I level_of(F value, F steps) {
    const F whole = all(12582912.f); /* 1.5 * 2^23 rounds to the nearest */
    return (I)(value * steps + whole) - (I)whole;
}

/* Levels of a step of one token, 127 on each side of 0. Returns their sum. */
INLINE float levels_of(enum form form, const void *x, long first, long left, int half, float largest, char *level) {
    U sum = {};
    UNROLL for (int n = 0; n < inputs_of(form); n += LANES) {
        const B place = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
        const I found = n < left ? level_of(run(x, first, n, left, half), all(127 / largest)) : (I){};
        const B bytes = __builtin_convertvector(found, B);
        *(B *)(level + n) = form == INT4 ? __builtin_shuffle(bytes, place) : bytes;
        sum += (U)found;
    }
    return sum_of(__builtin_convertvector((I)sum, F));
}

/* Lay inputs of `count` tokens, a constant, next to each other: those of the steps from `first` to before `last`. The
 * inputs of token `t` begin at number `line[t]` of x. */
INLINE void lay_numbers(enum form form, int count, const struct product *of, const long *line, long first, long last,
                        float *laid) {
    const long end = last * inputs_of(form), whole = end < of->width ? end : of->width;
    long i = first * inputs_of(form);
    for (; i < whole; i++, laid += count)
        UNROLL for (int t = 0; t < count; t++) laid[t] = load_one(of->x, line[t] + i, of->half);
    memset(laid, 0, (end - i) * count * sizeof *laid);
}

INLINE void lay_pairs(int count, const struct product *of, const long *line, long first, long last, uint32_t *laid) {
    const uint16_t *x = of->x;
    const long whole = last < of->width / 2 ? last : of->width / 2;
    for (; first < whole; first++, laid += count)
        UNROLL for (int t = 0; t < count; t++) memcpy(laid + t, x + line[t] + 2 * first, 4);
    memset(laid, 0, (last - first) * count * sizeof *laid);
    for (int t = 0; first < last && 2 * first < of->width && t < count; t++) laid[t] = x[line[t] + of->width - 1];
}

/* Write one step of a token, which is token `t` of `count`, in levels; `left` inputs of the token are left. */
INLINE void lay_step(enum form form, const void *x, long i, long left, int half, float largest, long t, long count,
                     char *laid) {
    const int inputs = inputs_of(form);
    const float step = largest / 127, sum = levels_of(form, x, i, left, half, largest, laid + t * inputs);
    float *rest = (float *)(laid + count * inputs);
    rest[t] = step;
    if (form == INT4) rest[count + t] = step * sum;
    else ((int32_t *)rest)[count + t] = 128 * (int32_t)sum;
}

/* The same as `lay_numbers` in levels. All largest values are found before the first level, so the steps of each loop
 * overlap. */
INLINE void lay_levels(enum form form, long count, const struct product *of, const long *line, int half, long first,
                       long last, char *laid) {
    const int inputs = inputs_of(form);
    float largest[BLOCK / GROUP_WORDS][MOST];
    for (long n = first; n < last; n++)
        for (long t = 0; t < count; t++) {
            const long i = line[t] + n * inputs, left = of->width - n * inputs;
            largest[n - first][t] = left < inputs ? largest_size(of->x, i, left, inputs, half)
                                                  : largest_size(of->x, i, inputs, inputs, half);
        }
    for (long n = first; n < last; n++, laid += count * bytes_of(form))
        for (long t = 0; t < count; t++) {
            const long i = line[t] + n * inputs, left = of->width - n * inputs;
            if (left < inputs) lay_step(form, of->x, i, left, half, largest[n - first][t], t, count, laid);
            else lay_step(form, of->x, i, inputs, half, largest[n - first][t], t, count, laid);
        }
}

INLINE long blocks_of_tile(enum form form, const struct product *of) {
    const long run = BLOCK / words_of(form);
    return (of->steps + run - 1) / run;
}

/* Lay out block `n` of the tokens: the inputs of a tile for BLOCK words of a channel. */
INLINE void lay_block(enum form form, const struct product *of, long n) {
    const long blocks = blocks_of_tile(form, of), tile = n / blocks, run = BLOCK / words_of(form);
    const long first = n % blocks * run, last = first + run < of->steps ? first + run : of->steps;
    const long token = first_of(&of->tiles, tile), count = tokens_of(&of->tiles, tile);
    void *laid = of->laid + (token * of->steps + count * first) * bytes_of(form);
    long line[MOST];
    for (long t = 0; t < count; t++) line[t] = row_of(of->from, token + t) * of->width;
#define LAY_PAIRS(count) lay_pairs(count, of, line, first, last, laid)
#define LAY_NUMBERS(count) lay_numbers(form, count, of, line, first, last, laid)
    if (form == PAIRS) {
        CONSTANT(count, LAY_PAIRS)
    } else if (form < INT8) {
        CONSTANT(count, LAY_NUMBERS)
    } else if (of->half) lay_levels(form, count, of, line, 1, first, last, laid);
    else lay_levels(form, count, of, line, 0, first, last, laid);
}

/* A product that writes. Free it by `end`. One token in fp32 may lie as it is. */
INLINE struct product begin(enum form form, const void *weight, const float *scale, const float *bias, long out,
                            long width, struct tiles tiles, const void *x, const long *from, void *y, int half) {
    const long words = words_of_channel(form, width), steps = (words + words_of(form) - 1) / words_of(form);
    const long tokens = all_of(&tiles), bytes = (tokens * steps * bytes_of(form) + 63) / 64 * 64;
    const int lies = form == FP32 && !half && tokens == 1 && words == width && !from;
    char *laid = lies ? (char *)x : aligned_alloc(64, bytes);
    return (struct product){weight, scale, bias, out, width, words, steps, tiles, x, laid, y, from, .half = half};
}

INLINE void end(struct product *of) {
    if (of->laid != of->x) free(of->laid);
}

/* What an adapter adds to results: the product of two maps. It passes through `thin`. */
struct low_rank { struct product down, up; void *thin; };

#ifdef __AVX512BF16__
#define HALVES PAIRS
#else
#define HALVES BF16
#endif

#define FEW 4 /* tokens that a thread takes through the first map */

/* Free it by `end_low_rank`. */
static struct low_rank begin_low_rank(const struct added *added, long out, long width, const void *x, void *y,
                                      int half) {
    const long shares = (added->count + FEW - 1) / FEW, threads = omp_get_max_threads();
    const struct tiles tiles = tiles_of(added->count, shares < threads ? shares : threads);
    void *thin = malloc(added->count * added->rank * 4);
    struct low_rank of = {
        half ? begin(HALVES, added->down, 0, 0, added->rank, width, tiles, x, added->token, thin, 1)
             : begin(FP32, added->down, 0, 0, added->rank, width, tiles, x, added->token, thin, 0),
        half ? begin(HALVES, added->up, 0, 0, out, added->rank, tiles, thin, 0, y, 1)
             : begin(FP32, added->up, 0, 0, out, added->rank, tiles, thin, 0, y, 0),
        thin,
    };
    of.up.to = added->token;
    of.up.adds = 1;
    return of;
}

static void end_low_rank(struct low_rank *of) {
    end(&of->down);
    end(&of->up);
    free(of->thin);
}

/* Take a tile of tokens through the first map, and lay them out for the second. */
INLINE void narrow(enum form form, const struct low_rank *of, long tile) {
    const long blocks = blocks_of_tile(form, &of->down), after = blocks_of_tile(form, &of->up);
    for (long n = 0; n < blocks; n++) lay_block(form, &of->down, tile * blocks + n);
    for (long n = 0; n < panels_of(&of->down); n++) panel(form, &of->down, n, tile);
    for (long n = 0; n < after; n++) lay_block(form, &of->up, tile * after + n);
}

static void narrow_tile(const struct low_rank *of, long tile) {
    if (of->up.half) narrow(HALVES, of, tile);
    else narrow(FP32, of, tile);
}

/* Add panel `n` of the second map to the results of all tokens. */
INLINE void widen(enum form form, const struct low_rank *of, long n) {
    for (long tile = 0; tile < of->up.tiles.count; tile++) panel(form, &of->up, n, tile);
}

static void widen_panel(const struct low_rank *of, long n) {
    if (of->up.half) widen(HALVES, of, n);
    else widen(FP32, of, n);
}

static void add_low_rank(const struct added *added, long out, long width, const void *x, void *y, int half) {
    if (added->count == 0) return;
    struct low_rank of = begin_low_rank(added, out, width, x, y, half);
#pragma omp parallel for schedule(static) if (of.up.tiles.count > 1)
    for (long n = 0; n < of.up.tiles.count; n++) narrow_tile(&of, n);
#pragma omp parallel for schedule(static) if (large(&of.up))
    for (long n = 0; n < panels_of(&of.up); n++) widen_panel(&of, n);
    end_low_rank(&of);
}

/* `added` may be null. Where rows are given by `to`, results are added to them. */
#define PRODUCT(name, form)                                                                                        \
    static void name##_first(const struct product *of, const struct low_rank *more, long n) {                      \
        if (n < more->up.tiles.count) narrow_tile(more, n);                                                        \
        else lay_block(form, of, n - more->up.tiles.count);                                                        \
    }                                                                                                              \
    static void name(const void *weight, const float *scale, const float *bias, long out, long width,              \
                     const void *x, long tokens, void *y, const long *to, int half, const struct added *added) {   \
        if (tokens == 0) return;                                                                                   \
        struct product of = begin(form, weight, scale, bias, out, width, tiles_of(tokens, 1), x, 0, y, half);      \
        of.to = to, of.adds = to != 0;                                                                             \
        struct low_rank more = {};                                                                                 \
        if (added && added->count) more = begin_low_rank(added, out, width, x, y, half);                           \
        const long blocks = of.laid == x ? 0 : of.tiles.count * blocks_of_tile(form, &of);                         \
        const long tiles = more.up.tiles.count, all = blocks + tiles;                                              \
        if (tokens * width < (form < INT8 ? 8 * MANY : MANY) && tiles < 2) /* a region takes time too */           \
            for (long n = 0; n < all; n++) name##_first(&of, &more, n);                                            \
        else                                                                                                       \
            _Pragma("omp parallel for schedule(static, 1)")                                                        \
            for (long n = 0; n < all; n++) name##_first(&of, &more, n);                                            \
        _Pragma("omp parallel for schedule(static) if (large(&of))")                                               \
        for (long n = 0; n < panels_of(&of); n++) {                                                                \
            for (long tile = 0; tile < of.tiles.count; tile++) panel(form, &of, n, tile);                          \
            if (tiles) widen_panel(&more, n);                                                                      \
        }                                                                                                          \
        if (tiles) end_low_rank(&more);                                                                            \
        end(&of);                                                                                                  \
    }
PRODUCT(of_fp32, FP32)
PRODUCT(of_bf16_by_vectors, HALVES)
PRODUCT(of_int8, INT8)
PRODUCT(of_int4, INT4)

#ifdef __AMX_TILE__
/* Tiles 0 and 1 hold sums, 2 holds tokens, 3 and 4 hold weights. */
/* Sums [2, 16, 16] of a panel with the tokens of a tile, whose lines lie `stride` bytes apart. */
INLINE void tile_sums(const U *word, long lines, const char *x, long stride, void *sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (long k = 0; k < lines; k += 16, word += 32, x += 64) {
        for (int n = 0; n < 32; n += 2) fetch(1, 2, word + n);
        _tile_loadd(2, x, stride);
        _tile_loadd(3, word, 128);
        _tile_loadd(4, word + 1, 128);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, (char *)sums + 1024, 64);
}

static void product_of_tiles(const U *weight, const float *bias, long out, long padded, const uint16_t *x, long tokens,
                             void *y, int half) {
#pragma omp parallel if (out > 32 && out * padded > 65536)
    {
        F sums[2][16];
        int configured = 0;
#pragma omp for schedule(static)
        for (long n = 0; n < (out + 31) / 32; n++)
            for (long t = 0; t < tokens; t += 16) {
                int count = tokens - t < 16 ? tokens - t : 16;
                if (count != configured) configure_tiles(configured = count);
                tile_sums(weight + n * padded, padded / 2, (const char *)(x + t * padded), padded * 2, sums);
                for (int r = 0; r < count; r++)
                    put(y, out, t + r, n * 32, half, bias, (F[]){sums[0][r], sums[1][r]}, 0);
            }
        if (configured) _tile_release();
    }
}
#endif

/* Weights in bf16; x in bf16. */
static void of_bf16(const void *weight, const float *scale, const float *bias, long out, long width, const void *x,
                    long tokens, void *y, const long *to, int half, const struct added *added) {
#ifdef __AMX_TILE__
    if (matrices && !to) {
        long padded = 2 * words_of_channel(BF16, width);
        uint16_t *filled = padded == width ? 0 : calloc(tokens * padded, 2);
        for (long t = 0; filled && t < tokens; t++)
            memcpy(filled + t * padded, (const uint16_t *)x + t * width, width * 2);
        product_of_tiles(weight, bias, out, padded, filled ? filled : x, tokens, y, half);
        free(filled);
        if (added) add_low_rank(added, out, width, x, y, half);
        return;
    }
#endif
    of_bf16_by_vectors(weight, scale, bias, out, width, x, tokens, y, to, half, added);
}

void product_fp32(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half, const struct added *added) {
    of_fp32(weight, 0, bias, out, width, x, tokens, y, 0, half, added);
}

void product_bf16(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half, const struct added *added) {
    of_bf16(weight, 0, bias, out, width, x, tokens, y, 0, half, added);
}

/* `scale` is the size of a channel's step. */
void product_int8(const void *weight, const float *scale, const float *bias, long out, long width, const void *x,
                  long tokens, void *y, int half, const struct added *added) {
    of_int8(weight, scale, bias, out, width, x, tokens, y, 0, half, added);
}

void product_int4(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half, const struct added *added) {
    of_int4(weight, 0, bias, out, width, x, tokens, y, 0, half, added);
}

/* Add the product of token n to row n * `apart` of y; all have the dtype of the map. */
void add_product(const void *weight, long out, long width, const void *x, long tokens, void *y, long apart, int half) {
    long *to = malloc(tokens * sizeof(long));
    for (long n = 0; n < tokens; n++) to[n] = n * apart;
    (half ? of_bf16 : of_fp32)(weight, 0, 0, out, width, x, tokens, y, to, half, 0);
    free(to);
}

/* Add the product of two maps, of width `rank` between them, to the last `masks` of the `rows` tokens of each sequence.
 * x [batch, rows, width] and y [batch, rows, out] have the dtype of the maps. */
void low_rank(const void *down, const void *up, long out, long width, long rank, const void *x, void *y, long batch,
              long rows, long masks, int half) {
    long *token = malloc(batch * masks * sizeof(long));
    for (long n = 0; n < batch * masks; n++) token[n] = n / masks * rows + rows - masks + n % masks;
    add_low_rank(&(struct added){down, up, rank, token, batch * masks}, out, width, x, y, half);
    free(token);
}
