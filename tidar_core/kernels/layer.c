/* Norms, rotation, gate and attention of a decode step, for fp32 and bf16.
 *
 * `reference.py` defines what each function computes. A token's results do not depend, bit for bit, on how many tokens
 * a call has, nor on keys that the token does not see. Tensors are contiguous unless a stride is given. Sums are in
 * fp32; results in bf16 are rounded once.
 */
#include "numbers.h"

/* Root mean square norm of one token, scaled; `square` is the sum of its squares. */
INLINE float inverse_norm(float square, long width, float eps) { return 1 / sqrtf(square / width + eps); }

INLINE float square_sum(const void *x, long first, long width, int half) {
    F sum = {};
    long i = 0;
    for (; i + LANES <= width; i += LANES) sum += load(x, first + i, half) * load(x, first + i, half);
    F rest = load_some(x, first + i, half, width - i, 0);
    return sum_of(sum + rest * rest);
}

INLINE void norm_of_token(const void *x, const void *residual, const void *weight, int half_weight, float eps,
                          long first, long width, int half, void *normed, void *total) {
    if (residual)
        for (long i = 0; i < width; i++)
            store_one(total, first + i, half, load_one(x, first + i, half) + load_one(residual, first + i, half));
    const void *sum = residual ? total : x;
    float scale = inverse_norm(square_sum(sum, first, width, half), width, eps);
    for (long i = 0; i < width; i++)
        store_one(normed, first + i, half, load_one(sum, first + i, half) * scale * load_one(weight, i, half_weight));
}

void add_rms_norm(const void *x, const void *residual, const void *weight, int half_weight, float eps, long tokens,
                  long width, int half, void *normed, void *total) {
#pragma omp parallel for schedule(static) if (tokens >= 32)
    for (long t = 0; t < tokens; t++)
        if (half) norm_of_token(x, residual, weight, half_weight, eps, t * width, width, 1, normed, total);
        else norm_of_token(x, residual, weight, half_weight, eps, t * width, width, 0, normed, total);
}

INLINE void rotate_head(void *x, long first, const void *norm, const void *cosine, const void *sine, long angle, long size,
                        float eps, int half) {
    float values[size], scale = norm ? inverse_norm(square_sum(x, first, size, half), size, eps) : 1;
    for (long d = 0; d < size; d++) values[d] = load_one(x, first + d, half) * scale;
    if (norm) for (long d = 0; d < size; d++) values[d] *= load_one(norm, d, half);
    long middle = size / 2;
    for (long d = 0; d < middle; d++) {
        float low = values[d], high = values[d + middle];
        store_one(x, first + d, half, low * load_one(cosine, angle + d, half) - high * load_one(sine, angle + d, half));
        store_one(x, first + d + middle, half, high * load_one(cosine, angle + d + middle, half)
                                                   + low * load_one(sine, angle + d + middle, half));
    }
}

/* `clean` leading ones of each `per_sequence` tokens are stored; `norm` is [heads + kv_heads, size] or null. */
void rotate_and_store(void *qkv, const void *norm, const void *cosine, const void *sine, void *pages, const int64_t *slot,
                      long tokens, long per_sequence, long clean, long heads, long kv_heads, long size, float eps, int half) {
    long bytes = half ? 2 : 4, width = (heads + 2 * kv_heads) * size, kept = 2 * kv_heads * size;
#pragma omp parallel for schedule(static) if (tokens >= 32)
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

/* silu(gate) * up [tokens, width] of gate, then up. */
void silu_mul(const void *gate_up, long tokens, long width, int half, void *y) {
#pragma omp parallel for schedule(static) if (tokens >= 32)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += LANES) {
            long left = width - i < LANES ? width - i : LANES, from = 2 * t * width + i;
            F gate = left == LANES ? load(gate_up, from, half) : load_some(gate_up, from, half, left, 0);
            F up = left == LANES ? load(gate_up, from + width, half) : load_some(gate_up, from + width, half, left, 0);
            F value = gate / (exponential(smaller(-gate, all(88.f))) + 1.f) * up;
            if (left == LANES) store(y, t * width + i, half, value);
            else store_some(y, t * width + i, half, left, value);
        }
}

/* Keys or values of one head at equal distances: those of a page, or those of the query tokens. */
struct run { const void *of_keys, *of_values; long first_key, first_value, stride, count; };

struct attention {
    const void *q, *k, *v, *pages;
    const int64_t *table, *prefix_len;
    const uint8_t *visible;
    void *out;
    long q_stride, kv_stride, table_stride, table_len, page_len, per_sequence, heads, kv_heads, size;
};

/* Length of the prefix; of a slot that is not in use, whatever its table holds. */
INLINE long prefix_of(const struct attention *a, long sequence) {
    long held = a->table_len * a->page_len;
    return a->prefix_len[sequence] < held ? a->prefix_len[sequence] : held;
}

/* Run `n` of a sequence: pages first, the query tokens last. */
INLINE struct run run_of(const struct attention *a, long sequence, long head, long n, long pages) {
    if (n == pages) {
        long first = sequence * a->per_sequence * a->kv_stride + head * a->size;
        return (struct run){a->k, a->v, first, first, a->kv_stride, a->per_sequence};
    }
    long kept = a->kv_heads * a->size, left = prefix_of(a, sequence) - n * a->page_len;
    long first = a->table[sequence * a->table_stride + n] * a->page_len * 2 * kept + head * a->size;
    return (struct run){a->pages, a->pages, first, first + kept, 2 * kept, left < a->page_len ? left : a->page_len};
}

/* Values of `16 * blocks` dimensions from `d`, weighted; `blocks` is a constant, and 0 stands for the last ones. */
INLINE void weighted(int blocks, const struct attention *a, long sequence, long head, long pages, const float *weight,
                     long d, long out, int half) {
    F sum[4] = {};
    long left = a->size - d;
    for (long n = 0; n <= pages; n++) {
        struct run run = run_of(a, sequence, head, n, pages);
        for (long key = 0; key < run.count; key++, weight++) {
            long at = run.first_value + key * run.stride + d;
            UNROLL for (int b = 0; b < blocks; b++) sum[b] += *weight * load(run.of_values, at + b * LANES, half);
            if (!blocks) sum[0] += *weight * load_some(run.of_values, at, half, left, 0);
        }
    }
    UNROLL for (int b = 0; b < blocks; b++) store(a->out, out + d + b * LANES, half, sum[b]);
    if (!blocks) store_some(a->out, out + d, half, left, sum[0]);
}

/* Scores of all keys, -inf for those that are hidden. Returns their number. */
INLINE long scores_of(const struct attention *a, long sequence, long query, long head, long pages, const float *q,
                      float *score, int half) {
    long size = a->size, count = 0;
    for (long n = 0; n <= pages; n++) {
        struct run run = run_of(a, sequence, head, n, pages);
        for (long key = 0; key < run.count; key++) {
            if (n == pages && !a->visible[query * a->per_sequence + key]) {
                score[count++] = -INFINITY;
                continue;
            }
            long at = run.first_key + key * run.stride, d = 0;
            F sum = {};
            for (; d + LANES <= size; d += LANES) sum += load(q, d, 0) * load(run.of_keys, at + d, half);
            if (d < size) sum += load_some(q, d, 0, size - d, 0) * load_some(run.of_keys, at + d, half, size - d, 0);
            score[count++] = sum_of(sum);
        }
    }
    return count;
}

/* Softmax in place; there is room for 16 more scores. */
INLINE void softmax(float *score, long count) {
    for (long n = 0; n < LANES; n++) score[count + n] = -INFINITY;
    F most = all(-INFINITY), total = {};
    for (long n = 0; n < count; n += LANES) most = larger(most, load(score, n, 0));
    float largest = most[0];
    for (int n = 1; n < LANES; n++) largest = fmaxf(largest, most[n]);
    for (long n = 0; n < count; n += LANES) {
        F value = exponential(load(score, n, 0) - largest);
        store(score, n, 0, value);
        total += value;
    }
    F share = all(1 / sum_of(total));
    for (long n = 0; n < count; n += LANES) store(score, n, 0, load(score, n, 0) * share);
}

INLINE void attend(const struct attention *a, long token, long head, float *room, int half) {
    long size = a->size, sequence = token / a->per_sequence, kv_head = head / (a->heads / a->kv_heads), d = 0;
    long pages = (prefix_of(a, sequence) + a->page_len - 1) / a->page_len, out = (token * a->heads + head) * size;
    float q[size + LANES], scale = 1 / sqrtf(size);
    for (long i = 0; i < size; i++) q[i] = load_one(a->q, token * a->q_stride + head * size + i, half) * scale;
    softmax(room, scores_of(a, sequence, token % a->per_sequence, kv_head, pages, q, room, half));
    for (; d + 4 * LANES <= size; d += 4 * LANES) weighted(4, a, sequence, kv_head, pages, room, d, out, half);
    for (; d + LANES <= size; d += LANES) weighted(1, a, sequence, kv_head, pages, room, d, out, half);
    if (d < size) weighted(0, a, sequence, kv_head, pages, room, d, out, half);
}

/* Strides are those of a token, in entries; k and v have the same. */
void paged_attention(const void *q, const void *k, const void *v, long q_stride, long kv_stride, const void *pages,
                     long page_len, const int64_t *table, long table_stride, long table_len, const int64_t *prefix_len,
                     const uint8_t *visible, long sequences, long per_sequence, long heads, long kv_heads, long size,
                     int half, void *out) {
    struct attention a = {q, k, v, pages, table, prefix_len, visible, out, q_stride, kv_stride, table_stride, table_len, page_len,
                          per_sequence, heads, kv_heads, size};
#pragma omp parallel
    {
        float *room = malloc((table_len * page_len + per_sequence + LANES) * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < sequences * per_sequence * heads; n++)
            if (half) attend(&a, n / heads, n % heads, room, 1);
            else attend(&a, n / heads, n % heads, room, 0);
        free(room);
    }
}
