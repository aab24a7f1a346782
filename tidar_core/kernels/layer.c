/* Norms, rotation and gate of a decode step, and the likeliest tokens, for fp32 and bf16.
 *
 * `reference.py` defines what each function computes. A token's results do not depend, bit for bit, on how many tokens
 * a call has. Tensors are contiguous, but for logits. Sums are in fp32; results in bf16 are rounded once.
 */
#include "kernels.h"
#include "numbers.h"

#define RUN 512 /* logits whose largest is found together */

/* The inverse of the root mean square of one token or head. */
INLINE float inverse_norm(const void *x, long first, long width, float eps, int half) {
    F sum = {};
    for (long i = 0; i < width; i += LANES) sum += run(x, first, i, width, half) * run(x, first, i, width, half);
    return 1 / sqrtf(sum_of(sum) / width + eps);
}

INLINE void norm_of_token(const void *x, const void *residual, const void *weight, int half_weight, float eps,
                          long first, long width, int half, void *normed, void *total) {
    for (long i = 0; residual && i < width; i += LANES)
        put_run(total, first, i, width, half, run(x, first, i, width, half) + run(residual, first, i, width, half));
    const void *sum = residual ? total : x;
    float scale = inverse_norm(sum, first, width, eps, half);
    for (long i = 0; i < width; i += LANES)
        put_run(normed, first, i, width, half, run(sum, first, i, width, half) * scale * run(weight, 0, i, width, half_weight));
}

void add_rms_norm(const void *x, const void *residual, const void *weight, int half_weight, float eps, long tokens,
                  long width, int half, void *normed, void *total) {
#pragma omp parallel for schedule(static) if (tokens * width >= MANY)
    for (long t = 0; t < tokens; t++)
        if (half) norm_of_token(x, residual, weight, half_weight, eps, t * width, width, 1, normed, total);
        else norm_of_token(x, residual, weight, half_weight, eps, t * width, width, 0, normed, total);
}

INLINE void rotate_head(void *x, long first, const void *norm, const void *cosine, const void *sine, long angle, long size,
                        float eps, int half) {
    float scale = norm ? inverse_norm(x, first, size, eps, half) : 1;
    long middle = size / 2;
    for (long d = 0; d < middle; d += LANES) {
        F low = run(x, first, d, middle, half) * scale, high = run(x, first + middle, d, middle, half) * scale;
        if (norm) low *= run(norm, 0, d, middle, half), high *= run(norm, middle, d, middle, half);
        F turned = low * run(cosine, angle, d, middle, half) - high * run(sine, angle, d, middle, half);
        put_run(x, first + middle, d, middle, half,
                high * run(cosine, angle + middle, d, middle, half) + low * run(sine, angle + middle, d, middle, half));
        put_run(x, first, d, middle, half, turned);
    }
}

/* `clean` leading ones of each `per_sequence` tokens are stored; `norm` is [heads + kv_heads, size] or null. */
void rotate_and_store(void *qkv, const void *norm, const void *cosine, const void *sine, void *pages, const int64_t *slot,
                      long tokens, long per_sequence, long clean, long heads, long kv_heads, long size, float eps, int half) {
    long bytes = half ? 2 : 4, width = (heads + 2 * kv_heads) * size, kept = 2 * kv_heads * size;
#pragma omp parallel for schedule(static) if (tokens * width >= MANY)
    for (long t = 0; t < tokens; t++) {
        for (long h = 0; h < heads + kv_heads; h++) {
            const char *scale = norm ? (const char *)norm + h * size * bytes : 0;
            if (half) rotate_head(qkv, t * width + h * size, scale, cosine, sine, t * size, size, eps, 1);
            else rotate_head(qkv, t * width + h * size, scale, cosine, sine, t * size, size, eps, 0);
        }
        long index = t % per_sequence;
        if (index < clean)
            memcpy((char *)pages + slot[t / per_sequence * clean + index] * kept * bytes,
                   (char *)qkv + (t * width + heads * size) * bytes, kept * bytes);
    }
}

INLINE void gate(const void *gate_up, long token, long width, int half, void *y) {
    for (long i = 0; i < width; i += LANES) {
        F gate = run(gate_up, 2 * token * width, i, width, half);
        F up = run(gate_up, (2 * token + 1) * width, i, width, half);
        put_run(y, token * width, i, width, half, gate / (exponential(smaller(-gate, all(88.f))) + 1.f) * up);
    }
}

/* silu(gate) * up [tokens, width] of gate, then up. */
void silu_mul(const void *gate_up, long tokens, long width, int half, void *y) {
#pragma omp parallel for schedule(static) if (tokens * width >= MANY)
    for (long t = 0; t < tokens; t++)
        if (half) gate(gate_up, t, width, 1, y);
        else gate(gate_up, t, width, 0, y);
}

/* Index of the largest of `width` numbers, of the first if several are equal; of the first that is no number, if any
 * is none. */
INLINE int64_t largest_at(const void *x, long first, long width, int half) {
    float most = -INFINITY;
    long at = 0;
    I none = {};
    for (long i = 0; i < width; i += RUN) {
        const long end = i + RUN < width ? i + RUN : width;
        F found = all(-INFINITY);
        for (long n = i; n < end; n += LANES) {
            const long left = end - n;
            const F x_n = left < LANES ? load_some(x, first + n, half, left, -INFINITY) : load(x, first + n, half);
            found = larger(x_n, found);
            none |= x_n != x_n;
        }
        const float of_run = largest_of(found);
        if (of_run > most) most = of_run, at = i;
    }
    if (largest_bits_of(none & 1)) {
        for (at = 0; !isnan(load_one(x, first + at, half));) at++;
        return at;
    }
    while (load_one(x, first + at, half) != most) at++;
    return at;
}

/* The likeliest tokens [outer, inner] of logits [outer, inner, width], whose outer rows lie `apart` numbers apart. */
void likeliest(const void *x, long outer, long inner, long apart, long width, int half, int64_t *token) {
#pragma omp parallel for schedule(static) if (outer * inner * width >= 16 * MANY)
    for (long n = 0; n < outer * inner; n++) {
        const long first = n / inner * apart + n % inner * width;
        token[n] = half ? largest_at(x, first, width, 1) : largest_at(x, first, width, 0);
    }
}
