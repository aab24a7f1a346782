/* How the weights and the tokens of a product lie in memory, for each form of weights.
 *
 * `products.c` has the words of a panel.
 */
#include "kernels.h"
#include "numbers.h"

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

/* Words of a channel are filled up to a multiple of this. */
extern const int words_together;

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

/* A product: see `products.c`. Token n is row n of `x` and of `y`, or the row that `from` or `to` gives it.
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
