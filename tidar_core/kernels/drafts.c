/* Drafts of a block, each linked to the draft before it (`held_link.py`). */
#include "kernels.h"
#include "numbers.h"

/* y += row, rounded once. */
static void add_row(void *y, long first, const void *row, long from, long width, int half) {
    for (long i = 0; i < width; i += LANES)
        put_run(y, first, i, width, half, run(y, first, i, width, half) + run(row, from, i, width, half));
}

/* What a link reads: the row of the token before, or that and the mask's state, gated by silu. */
static void mix(void *mixed, long first, const void *row, long from, const void *state, long of, long width, int half) {
    for (long i = 0; i < width; i += LANES) {
        F x = run(row, from, i, width, half);
        if (state) {
            x += run(state, of, i, width, half);
            x /= exponential(smaller(-x, all(88.f))) + 1.f;
        }
        put_run(mixed, first, i, width, half, x);
    }
}

/* The likeliest tokens `draft` [batch, masks] of logits [batch, masks, width], which the link corrects in place. The
 * first mask of a sequence follows the token `before` [batch], and each later one the draft before it.
 *
 * rows   of all tokens: [tokens, width], to be added, where `after` is null; else [tokens, rank]
 * state  [batch, masks, rank] or null
 * after  the link's map from rank to width, in panels */
void linked_drafts(void *logits, const int64_t *before, const void *rows, const void *state, const void *after,
                   long batch, long masks, long width, long rank, int half, int64_t *draft) {
    const long size = half ? 2 : 4;
    char *mixed = malloc(batch * rank * size);
    int64_t *found = malloc(batch * sizeof *found);
    memcpy(found, before, batch * sizeof *found);
    for (long k = 0; k < masks; k++) {
        char *y = (char *)logits + k * width * size;
        for (long b = 0; b < batch; b++)
            if (after) mix(mixed, b * rank, rows, found[b] * rank, state, (b * masks + k) * rank, rank, half);
            else add_row(y, b * masks * width, rows, found[b] * width, width, half);
        if (after) add_product(after, width, rank, mixed, batch, y, masks, half);
        likeliest(y, batch, 1, masks * width, width, half, found);
        for (long b = 0; b < batch; b++) draft[b * masks + k] = found[b];
    }
    free(found);
    free(mixed);
}
