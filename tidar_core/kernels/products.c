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


#define GROUP 32
#define PART 64
#define AHEAD 8192
#define SEVERAL 6
#ifdef __AVX512F__
#define MOST 12 /* tokens that are computed together, as many as registers hold */
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

enum form { FP32, BF16 };

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

INLINE int inputs_of_word(enum form form) { return form == FP32 ? 1 : 2; }

/* Request the next `bytes` that a stream of weights needs from memory, AHEAD of their use. Products of one token wait
 * for memory alone; those of SEVERAL compute longer, and their first cache has no room. Between, requests cost what
 * they save. */
INLINE void fetch(int tokens, const void *weight, int bytes) {
    UNROLL for (int n = 0; n < bytes; n += 64) {
        if (tokens == 1) __builtin_prefetch((const char *)weight + AHEAD + n);
        if (tokens >= SEVERAL) __builtin_prefetch((const char *)weight + AHEAD + n, 0, 2);
    }
}

/* Values of 16 channels for input `j` of a word. */
INLINE F weights_of(enum form form, U word, int j) {
    return form == FP32 ? (F)word : (F)(j ? word >> 16 << 16 : word << 16);
}

/* Where the results of tokens are added: the last `count` of every `of` rows are theirs. */
struct rows { long count, of; };

INLINE long row_of(const struct rows *added, long token) {
    return added ? token / added->count * added->of + added->of - added->count + token % added->count : token;
}

/* Write the results of one token for the 32 channels of a panel, or add them to what is there. */
INLINE void put(void *y, long out, long token, long channel, int half, const float *bias, const F *sum,
                const struct rows *added) {
    long row = row_of(added, token);
    UNROLL for (int p = 0; p < 2; p++, channel += LANES) {
        long left = out - channel, place = row * out + channel;
        F value = sum[p];
        if (left >= LANES) {
            if (bias) value += load(bias, channel, 0);
            if (added) value += load(y, place, half);
            store(y, place, half, value);
        } else if (left > 0) {
            if (bias) value += load_some(bias, channel, 0, left, 0);
            if (added) value += load_some(y, place, half, left, 0);
            store_some(y, place, half, left, value);
        }
    }
}

/* Sums [tokens, 2] of a panel with `tokens` tokens, a constant. x is [padded, tokens]. */
INLINE void tile(enum form form, int tokens, const U *word, long padded, const float *x, F sums[][2]) {
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (long i = 0; i < padded; i += inputs_of_word(form), word += 2) {
        fetch(tokens, word, 128);
        UNROLL for (int j = 0; j < inputs_of_word(form); j++, x += tokens) {
            F first = weights_of(form, word[0], j), second = weights_of(form, word[1], j);
            UNROLL for (int t = 0; t < tokens; t++) {
                sum[t][0] += first * x[t];
                sum[t][1] += second * x[t];
            }
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) sums[t][0] = sum[t][0], sums[t][1] = sum[t][1];
}

/* Number of tokens that are computed together, when `left` are left: about equally many each time. */
INLINE long together(long left) {
    const long times = (left + MOST - 1) / MOST;
    return (left + times - 1) / times;
}

/* Products of panel `n` with all tokens. */
INLINE void panel(enum form form, const U *weight, long padded, const float *x, void *y, long out, long tokens, long n,
                  int half, const float *bias, const struct rows *added) {
    const U *word = weight + n * 2 * padded / inputs_of_word(form);
    for (long t = 0, count; t < tokens; t += count, x += count * padded) {
        F sums[MOST][2];
        count = together(tokens - t);
#define TILE(count) tile(form, count, word, padded, x, sums)
        CONSTANT(count, TILE)
        for (long r = 0; r < count; r++) put(y, out, t + r, n * 32, half, bias, sums[r], added);
    }
}

/* Inputs of a channel with those that fill it up, where a word holds `together`. */
static long padded_of(long width, int together) {
    const long divisor = words_together * together;
    return (width + divisor - 1) / divisor * divisor;
}

/* Whether a weight is worth more than one thread: to start them takes as long as to read so many inputs. */
static int large(long out, long padded) { return out > 32 && out * padded > 32768; }

/* Lay inputs of `count` tokens, a constant, next to each other in fp32. */
INLINE void line_up(int count, const void *x, long token, long width, long padded, int half, float *block) {
    for (long i = 0; i < width; i++)
        UNROLL for (int n = 0; n < count; n++) block[i * count + n] = load_one(x, (token + n) * width + i, half);
    memset(block + width * count, 0, (padded - width) * count * sizeof(float));
}

/* Tokens in fp32, filled up with zeros, those that are computed together next to each other. Free them. */
static float *arranged(const void *x, long tokens, long width, long padded, int half) {
    float *rows = aligned_alloc(64, (tokens * padded * 4 + 63) / 64 * 64);
    for (long t = 0, count; t < tokens; t += count) {
        count = together(tokens - t);
#define LINE_UP(count) line_up(count, x, t, width, padded, half, rows + t * padded)
        CONSTANT(count, LINE_UP)
    }
    return rows;
}

#define PRODUCT(name, form)                                                                                        \
    static void name(const void *weight, const float *bias, long out, long width, const void *x, long tokens,      \
                     void *y, int half, const struct rows *added) {                                                \
        long padded = padded_of(width, inputs_of_word(form));                                                      \
        float *rows = half || padded != width || tokens > 1 ? arranged(x, tokens, width, padded, half) : 0;        \
        _Pragma("omp parallel for schedule(static) if (large(out, padded))")                                       \
        for (long n = 0; n < (out + 31) / 32; n++)                                                                 \
            panel(form, weight, padded, rows ? rows : x, y, out, tokens, n, half, bias, added);                    \
        free(rows);                                                                                                \
    }
PRODUCT(of_fp32, FP32)
PRODUCT(of_bf16_by_vectors, BF16)

#ifdef __AMX_TILE__
/* Tiles 0 and 1 hold sums, 2 holds tokens, 3 and 4 hold weights. */
/* Sums [2, 16, 16] of a panel with the tokens of a tile, whose lines lie `stride` bytes apart. */
INLINE void tile_sums(const U *word, long lines, const char *x, long stride, void *sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (long k = 0; k < lines; k += 16, word += 32, x += 64) {
        fetch(1, word, 2048);
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
                             void *y, int half, const struct rows *added) {
#pragma omp parallel if (large(out, padded))
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
                    put(y, out, t + r, n * 32, half, bias, (F[]){sums[0][r], sums[1][r]}, added);
            }
        if (configured) _tile_release();
    }
}
#endif

#ifdef __AVX512BF16__
/* Sums [tokens, 2] of a panel with `tokens` tokens, a constant, two inputs at a time. x is [padded / 2, tokens]. */
INLINE void tile_of_pairs(int tokens, const U *word, long padded, const uint32_t *x, F sums[][2]) {
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (long k = 0; k < padded / 2; k++, word += 2, x += tokens) {
        fetch(tokens, word, 128);
        UNROLL for (int t = 0; t < tokens; t++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[t]);
            UNROLL for (int p = 0; p < 2; p++)
                sum[t][p] = (F)_mm512_dpbf16_ps((__m512)sum[t][p], pair, (__m512bh)word[p]);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) sums[t][0] = sum[t][0], sums[t][1] = sum[t][1];
}

/* Lay pairs of inputs of `count` tokens, a constant, next to each other. */
INLINE void pair_up(int count, const uint16_t *x, long width, long padded, uint32_t *block) {
    for (long k = 0; k < width / 2; k++)
        UNROLL for (int n = 0; n < count; n++) memcpy(block + k * count + n, x + n * width + 2 * k, 4);
    memset(block + width / 2 * count, 0, (padded / 2 - width / 2) * count * 4);
    if (width % 2)
        for (int n = 0; n < count; n++) block[width / 2 * count + n] = x[(n + 1) * width - 1];
}

/* Pairs of inputs of all tokens, filled up with zeros, those of a tile next to each other. Free them. */
static uint32_t *paired(const uint16_t *x, long tokens, long width, long padded) {
    uint32_t *rows = aligned_alloc(64, (tokens * padded * 2 + 63) / 64 * 64);
    for (long t = 0, count; t < tokens; t += count) {
        count = together(tokens - t);
#define PAIR_UP(count) pair_up(count, x + t * width, width, padded, rows + t * padded / 2)
        CONSTANT(count, PAIR_UP)
    }
    return rows;
}

static void of_bf16_by_pairs(const void *weight, const float *bias, long out, long width, const void *x, long tokens,
                             void *y, int half, const struct rows *added) {
    long padded = padded_of(width, 2);
    uint32_t *rows = paired(x, tokens, width, padded);
#pragma omp parallel for schedule(static) if (large(out, padded))
    for (long n = 0; n < (out + 31) / 32; n++) {
        const U *word = (const U *)weight + n * padded;
        const uint32_t *tile = rows;
        for (long t = 0, count; t < tokens; t += count, tile += count * padded / 2) {
            F sums[MOST][2];
            count = together(tokens - t);
#define TILE_OF_PAIRS(count) tile_of_pairs(count, word, padded, tile, sums)
            CONSTANT(count, TILE_OF_PAIRS)
            for (long r = 0; r < count; r++) put(y, out, t + r, n * 32, half, bias, sums[r], added);
        }
    }
    free(rows);
}
#endif

/* Weights in bf16; x in bf16. */
static void of_bf16(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                    int half, const struct rows *added) {
#ifdef __AMX_TILE__
    if (matrices) {
        long padded = padded_of(width, 2);
        uint16_t *filled = padded == width ? 0 : calloc(tokens * padded, 2);
        for (long t = 0; filled && t < tokens; t++)
            memcpy(filled + t * padded, (const uint16_t *)x + t * width, width * 2);
        product_of_tiles(weight, bias, out, padded, filled ? filled : x, tokens, y, half, added);
        free(filled);
        return;
    }
#endif
#ifdef __AVX512BF16__
    of_bf16_by_pairs(weight, bias, out, width, x, tokens, y, half, added);
#else
    of_bf16_by_vectors(weight, bias, out, width, x, tokens, y, half, added);
#endif
}

#define EXPORTED(name, of)                                                                                         \
    void name(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,    \
              int half) {                                                                                          \
        of(weight, bias, out, width, x, tokens, y, half, 0);                                                       \
    }
EXPORTED(product_fp32, of_fp32)
EXPORTED(product_bf16, of_bf16)

/* Add the product of two maps, of width `rank` between them, to the last `masks` of the `rows` tokens of each sequence.
 * x [batch, rows, width] and y [batch, rows, out] have the dtype of the maps. */
#define LOW_RANK(name, of, half)                                                                                   \
    void name(const void *down, const void *up, long out, long width, long rank, const void *x, void *y,           \
              long batch, long rows, long masks) {                                                                 \
        const long size = half ? 2 : 4, tokens = batch * masks, line = width * size;                               \
        const char *first = (const char *)x + (rows - masks) * line;                                               \
        char *thin = malloc(tokens * rank * size), *close = batch > 1 ? malloc(tokens * line) : 0;                 \
        for (long b = 0; close && b < batch; b++)                                                                  \
            memcpy(close + b * masks * line, first + b * rows * line, masks * line);                               \
        of(down, 0, rank, width, close ? close : first, tokens, thin, half, 0);                                    \
        of(up, 0, out, rank, thin, tokens, y, half, &(struct rows){masks, rows});                                  \
        free(close);                                                                                               \
        free(thin);                                                                                                \
    }
LOW_RANK(low_rank_fp32, of_fp32, 0)
LOW_RANK(low_rank_bf16, of_bf16, 1)

/* Sums, to which the products of four levels of weights, which are not negative, with four of a token are added. */
INLINE I dot_levels(I sum, U word, int32_t x) {
#ifdef __AVX512VNNI__
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)word, _mm512_set1_epi32(x));
#else
    UNROLL for (int n = 0; n < 4; n++) sum += (I)(word >> (8 * n) & 255) * (int32_t)(int8_t)(x >> (8 * n));
    return sum;
#endif
}

/* The largest absolute value, at least 1e-30; not finite if one of them is not. */
INLINE float largest_size(const F *value, int count) {
    I most = (I)all(1e-30f);
    UNROLL for (int n = 0; n < count; n++) most = larger_bits(most, (I)value[n] & 0x7fffffff);
    const I largest = (I){} + largest_bits_of(most);
    return ((F)largest)[0];
}

/* A factor that brings numbers whose largest absolute value is `largest` to 127 steps on each side of 0. */
INLINE F steps_of(float largest) { return all(127 / largest); }

INLINE I level_of(F value, F steps) {
    const F whole = all(12582912.f); /* 1.5 * 2^23 rounds to the nearest */
    return (I)(value * steps + whole) - (I)whole;
}

/* A run of inputs of one token in steps. `middle` is 128 times the sum of the levels: that is the weights' zero. */
struct part { int8_t level[PART]; float step; int32_t middle; };

INLINE void round_part(const void *x, long first, long width, int half, struct part *part) {
    F value[PART / LANES];
    U sum = {};
    UNROLL for (int n = 0; n < PART / LANES; n++)
        value[n] = n * LANES < width ? run(x, first, n * LANES, width, half) : all(0);
    const float largest = largest_size(value, PART / LANES);
    UNROLL for (int n = 0; n < PART / LANES; n++) {
        const I level = level_of(value[n], steps_of(largest));
        const B bytes = __builtin_convertvector(level, B);
        memcpy(part->level + n * LANES, &bytes, LANES);
        sum += (U)level;
    }
    part->step = largest / 127;
    part->middle = 128 * (int32_t)sum_of(__builtin_convertvector((I)sum, F));
}

/* Tokens in parts. Free them. */
static struct part *in_parts(const void *x, long tokens, long width, int half) {
    const long parts = (width + PART - 1) / PART;
    struct part *found = malloc(tokens * parts * sizeof *found);
#pragma omp parallel for schedule(static) if (tokens * width >= MANY)
    for (long t = 0; t < tokens; t++)
        for (long n = 0; n < parts; n++) {
            const long first = t * width + n * PART, left = width - n * PART < PART ? width - n * PART : PART;
            if (half) round_part(x, first, left, 1, found + t * parts + n);
            else round_part(x, first, left, 0, found + t * parts + n);
        }
    return found;
}

/* Products of a panel with `tokens` tokens, a constant. Those of a part are integers. */
INLINE void sums_of_parts(int tokens, const U *word, long words, const struct part *x, F sum[][2]) {
    const long of_part = PART / 4, parts = (words + of_part - 1) / of_part;
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (long n = 0; n < parts; n++, x++, words -= of_part) {
        I dot[MOST][2] = {};
        for (long k = 0; k < of_part && k < words; k++, word += 2) {
            fetch(tokens, word, 128);
            UNROLL for (int t = 0; t < tokens; t++) {
                int32_t level;
                memcpy(&level, x[t * parts].level + 4 * k, 4);
                UNROLL for (int p = 0; p < 2; p++) dot[t][p] = dot_levels(dot[t][p], word[p], level);
            }
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int p = 0; p < 2; p++)
                sum[t][p] += __builtin_convertvector(dot[t][p] - x[t * parts].middle, F) * x[t * parts].step;
    }
}

/* Weights in int8; `scale` is the size of a channel's step. */
void product_int8(const void *weight, const float *scale, const float *bias, long out, long width, const void *x,
                  long tokens, void *y, int half) {
    const long padded = padded_of(width, 4), parts = (width + PART - 1) / PART, words = (width + 3) / 4;
    struct part *rounded = in_parts(x, tokens, width, half);
#pragma omp parallel for schedule(static)
    for (long n = 0; n < (out + 31) / 32; n++) {
        const U *word = (const U *)weight + n * padded / 2;
        const F *of_channel = (const F *)(scale + n * 32);
        F sum[MOST][2];
        for (long t = 0, count; t < tokens; t += count) {
            count = together(tokens - t);
#define SUMS_OF_PARTS(count) sums_of_parts(count, word, words, rounded + t * parts, sum)
            CONSTANT(count, SUMS_OF_PARTS)
            for (long r = 0; r < count; r++)
                put(y, out, t + r, n * 32, half, bias, (F[]){sum[r][0] * of_channel[0], sum[r][1] * of_channel[1]}, 0);
        }
    }
    free(rounded);
}

/* A group of inputs of one token in 127 steps on each side of 0. The bytes are in the order in which levels of weights
 * lie in the halves of words: of each eight inputs first those with an even index, then the others. */
struct group { int8_t level[GROUP]; float step, sum; };

/* Tokens in groups. Free them. */
static struct group *in_groups(const void *x, long tokens, long width, int half) {
    const long groups = width / GROUP;
    struct group *found = malloc(tokens * groups * sizeof *found);
#pragma omp parallel for schedule(static) if (tokens * width >= MANY)
    for (long t = 0; t < tokens; t++)
        for (long g = 0; g < groups; g++) {
            struct group *group = found + t * groups + g;
            F value[2] = {load(x, t * width + g * GROUP, half), load(x, t * width + g * GROUP + LANES, half)};
            const float largest = largest_size(value, 2);
            U sum = {};
            UNROLL for (int p = 0; p < 2; p++) {
                const I level = level_of(value[p], steps_of(largest));
                const I place = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
                const B bytes = __builtin_convertvector(__builtin_shuffle(level, place), B);
                memcpy(group->level + p * LANES, &bytes, LANES);
                sum += (U)level;
            }
            group->step = largest / 127;
            group->sum = group->step * sum_of(__builtin_convertvector((I)sum, F));
        }
    return found;
}

/* Products of a panel with `tokens` tokens, a constant. Those of a group are integers. */
INLINE void sums_of_groups(int tokens, const U *word, long groups, const struct group *x, F sum[][2]) {
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (long g = 0; g < groups; g++, word += 8) {
        const U of_group[2] = {word[0], word[1]};
        I dot[MOST][2] = {};
        fetch(tokens, word, 128);
        word += 2;
        UNROLL for (int k = 0; k < 4; k++) {
            fetch(tokens, word + 2 * k, 128);
            UNROLL for (int p = 0; p < 2; p++) {
                const U even = word[2 * k + p] & 0x0f0f0f0f, odd = word[2 * k + p] >> 4 & 0x0f0f0f0f;
                UNROLL for (int t = 0; t < tokens; t++) {
                    int32_t level[2];
                    memcpy(level, x[t * groups + g].level + 8 * k, 8);
                    dot[t][p] = dot_levels(dot_levels(dot[t][p], even, level[0]), odd, level[1]);
                }
            }
        }
        UNROLL for (int p = 0; p < 2; p++) {
            const F step = (F)(of_group[p] >> 16 << 16), least = (F)(of_group[p] << 16);
            UNROLL for (int t = 0; t < tokens; t++) {
                const struct group *of = x + t * groups + g;
                sum[t][p] += __builtin_convertvector(dot[t][p], F) * (step * of->step) + least * of->sum;
            }
        }
    }
}

/* Weights in int4. */
void product_int4(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half) {
    const long groups = width / GROUP;
    struct group *rounded = in_groups(x, tokens, width, half);
#pragma omp parallel for schedule(static)
    for (long n = 0; n < (out + 31) / 32; n++) {
        const U *word = (const U *)weight + n * 10 * groups;
        F sum[MOST][2];
        for (long t = 0, count; t < tokens; t += count) {
            count = together(tokens - t);
#define SUMS_OF_GROUPS(count) sums_of_groups(count, word, groups, rounded + t * groups, sum)
            CONSTANT(count, SUMS_OF_GROUPS)
            for (long r = 0; r < count; r++) put(y, out, t + r, n * 32, half, bias, sum[r], 0);
        }
    }
    free(rounded);
}
