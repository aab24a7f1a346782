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
#include "product_form.h"
#include "product_inputs.h"
#include "product_sums.h"
#include "tiles.h"
#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>
#endif

int omp_get_max_threads(void);

int matrices = 0;
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

INLINE long panels_of(const struct product *of) { return (of->out + 31) / 32; }

/* Whether a weight is worth more than one thread: to start them takes as long as to read so many words. */
INLINE int large(const struct product *of) { return of->out > 32 && of->out * of->words > 32768; }

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

/* Add what an adapter adds, where the product of its map does not. */
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
        const int few = tokens * width < (form < INT8 ? 8 * MANY : MANY);                                          \
        if (few && (tiles < 2 || added->count * width * added->rank < 8 * MANY)) /* a region takes time too */     \
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
