/* Attention of mask tokens in training, and its gradients where clean keys and values need none.
 *
 * A mask sees a run of clean keys and some masks of its own block. Scores are not kept: the backward pass computes them
 * again from the logarithm of their sum. Everything is computed in fp32; results in bf16 are rounded once.
 */
#include "numbers.h"

struct call {
    const void *q, *k, *v, *clean_k, *clean_v;
    long q_stride, k_stride, v_stride, clean_k_stride, clean_v_stride; /* entries from token to token */
    const int32_t *seen;  /* [rows, masks, 4]: the first clean key and their number, the first mask and their number */
    const int32_t *parts; /* [.., 3]: row, first mask and number of masks that see the same clean keys */
    long masks, tokens, heads, kv_heads, size;
};

/* Queries of one key head in a part, and its keys: masks, then clean ones, filled up with zeros to `keys`. */
struct part { long row, first, count, head, share, queries, rows, own, clean, from, keys; };

/* A thread's room: [rows, size] and [rows, keys] of queries, [keys, size] of keys and their transpose. */
struct room { float *queries, *given, *results, *scores, *slopes, *keys, *turned; };

/* c [rows, width] = a [rows, inner] b [inner, width]; rows are a multiple of 4, the width of 16. */
INLINE void columns(float *c, const float *a, const float *b, long inner, long width, long runs) {
    F sum[4][4];
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int n = 0; n < runs; n++) sum[r][n] = (F){};
    for (long i = 0; i < inner; i++) {
        F value[4];
        UNROLL for (int n = 0; n < runs; n++) value[n] = *(const F *)(b + i * width + n * LANES);
        UNROLL for (int r = 0; r < 4; r++) UNROLL for (int n = 0; n < runs; n++) sum[r][n] += a[r * inner + i] * value[n];
    }
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int n = 0; n < runs; n++) *(F *)(c + r * width + n * LANES) = sum[r][n];
}

static void multiply(float *c, const float *a, const float *b, long rows, long inner, long width) {
    for (long x = 0; x < width; x += x + 4 * LANES <= width ? 4 * LANES : LANES)
        for (long r = 0; r < rows; r += 4) {
            if (x + 4 * LANES <= width) columns(c + r * width + x, a + r * inner, b + x, inner, width, 4);
            else columns(c + r * width + x, a + r * inner, b + x, inner, width, 1);
        }
}

static struct part part_of(const struct call *c, long number) {
    const int32_t *given = c->parts + number / c->kv_heads * 3;
    struct part p = {given[0], given[1], given[2], number % c->kv_heads, c->heads / c->kv_heads};
    const int32_t *seen = c->seen + (p.row * c->masks + p.first) * 4;
    p.queries = p.count * p.share, p.rows = (p.queries + 3) / 4 * 4;
    p.own = p.count, p.from = seen[0], p.clean = seen[1], p.keys = (p.own + p.clean + LANES - 1) / LANES * LANES;
    return p;
}

/* Entry of query `n` of a part, mask by mask, in a tensor of masks and heads. */
INLINE long query_at(const struct call *c, const struct part *p, long n, long stride) {
    return (p->row * c->masks + p->first + n / p->share) * stride + (p->head * p->share + n % p->share) * c->size;
}

INLINE long key_at(const struct call *c, const struct part *p, long mask, long stride) {
    return (p->row * c->masks + p->first + mask) * stride + p->head * c->size;
}

/* Queries of a tensor in fp32, times a factor; zeros behind the last. */
INLINE void take_queries(const struct call *c, const struct part *p, const void *x, long stride, float factor, int half, float *to) {
    memset(to + p->queries * c->size, 0, (p->rows - p->queries) * c->size * sizeof(float));
    for (long n = 0; n < p->queries; n++)
        for (long d = 0; d < c->size; d += LANES)
            *(F *)(to + n * c->size + d) = load(x, query_at(c, p, n, stride) + d, half) * factor;
}

/* Keys or values of a part in fp32. */
INLINE void take_keys(const struct call *c, const struct part *p, const void *own, long own_stride, const void *clean,
                      long clean_stride, int half, float *to) {
    long after = p->own + p->clean;
    memset(to + after * c->size, 0, (p->keys - after) * c->size * sizeof(float));
    for (long n = 0; n < after; n++) {
        long at = n < p->own ? key_at(c, p, n, own_stride)
                             : (p->row * c->tokens + p->from + n - p->own) * clean_stride + p->head * c->size;
        const void *x = n < p->own ? own : clean;
        for (long d = 0; d < c->size; d += LANES) *(F *)(to + n * c->size + d) = load(x, at + d, half);
    }
}

/* Rows [keys, size] as columns. */
static void turn(const float *x, long keys, long size, float *to) {
    for (long n = 0; n < keys; n += LANES)
        for (long d = 0; d < size; d += LANES) {
            U word[16];
            UNROLL for (int m = 0; m < LANES; m++) word[m] = *(const U *)(x + (n + m) * size + d);
            transpose(word);
            UNROLL for (int m = 0; m < LANES; m++) *(U *)(to + (d + m) * keys + n) = word[m];
        }
}

/* Scores of all keys; what a query does not see is -inf. Takes queries and keys. */
INLINE void score(const struct call *c, const struct part *p, const struct room *room, int half) {
    take_queries(c, p, c->q, c->q_stride, 1 / sqrtf(c->size), half, room->queries);
    take_keys(c, p, c->k, c->k_stride, c->clean_k, c->clean_k_stride, half, room->keys);
    turn(room->keys, p->keys, c->size, room->turned);
    multiply(room->scores, room->queries, room->turned, p->rows, c->size, p->keys);
    for (long n = 0; n < p->queries; n++) {
        const int32_t *seen = c->seen + (p->row * c->masks + p->first + n / p->share) * 4;
        float *scores = room->scores + n * p->keys;
        for (long m = 0; m < p->own; m++) {
            long mask = p->first + m - seen[2];
            if (mask < 0 || mask >= seen[3]) scores[m] = -INFINITY;
        }
        for (long m = p->own + p->clean; m < p->keys; m++) scores[m] = -INFINITY;
    }
}

INLINE void forward(const struct call *c, struct part p, const struct room *room, int half, void *out, float *logs) {
    score(c, &p, room, half);
    for (long n = 0; n < p.queries; n++) {
        float *scores = room->scores + n * p.keys;
        F most = all(-INFINITY), total = {};
        for (long m = 0; m < p.keys; m += LANES) most = larger(most, *(F *)(scores + m));
        const float largest = largest_of(most);
        for (long m = 0; m < p.keys; m += LANES) {
            F weight = exponential(*(F *)(scores + m) - largest);
            *(F *)(scores + m) = weight;
            total += weight;
        }
        float sum = sum_of(total);
        for (long m = 0; m < p.keys; m += LANES) *(F *)(scores + m) /= sum;
        logs[(p.row * c->masks + p.first + n / p.share) * c->heads + p.head * p.share + n % p.share] = largest + logf(sum);
    }
    take_keys(c, &p, c->v, c->v_stride, c->clean_v, c->clean_v_stride, half, room->keys);
    multiply(room->results, room->scores, room->keys, p.rows, p.keys, c->size);
    for (long n = 0; n < p.queries; n++)
        for (long d = 0; d < c->size; d += LANES)
            store(out, query_at(c, &p, n, c->heads * c->size) + d, half, *(F *)(room->results + n * c->size + d));
}

/* Sums over queries of a number of each, times its row of `rows`: the gradient of the keys or values of masks. */
INLINE void gather(const struct call *c, const struct part *p, const float *numbers, const float *rows, int half, void *out) {
    for (long m = 0; m < p->own; m++)
        for (long d = 0; d < c->size; d += LANES) {
            F sum = {};
            for (long n = 0; n < p->queries; n++) sum += numbers[n * p->keys + m] * *(const F *)(rows + n * c->size + d);
            store(out, key_at(c, p, m, c->kv_heads * c->size) + d, half, sum);
        }
}

/* With weights w, results o = w v and their gradient g: the slope of a score is w (g v - g o). */
INLINE void backward(const struct call *c, struct part p, const struct room *room, int half, const void *out, const float *logs,
                     const void *grad, void *grad_q, void *grad_k, void *grad_v) {
    long line = c->heads * c->size;
    score(c, &p, room, half);
    take_queries(c, &p, grad, line, 1, half, room->given);
    for (long n = 0; n < p.queries; n++) {
        float log = logs[(p.row * c->masks + p.first + n / p.share) * c->heads + p.head * p.share + n % p.share];
        for (long m = 0; m < p.keys; m += LANES) {
            F *score = (F *)(room->scores + n * p.keys + m);
            *score = exponential(*score - log);
        }
    }
    gather(c, &p, room->scores, room->given, half, grad_v);
    take_keys(c, &p, c->v, c->v_stride, c->clean_v, c->clean_v_stride, half, room->keys);
    turn(room->keys, p.keys, c->size, room->turned);
    multiply(room->slopes, room->given, room->turned, p.rows, c->size, p.keys);
    for (long n = 0; n < p.queries; n++) {
        F products = {};
        for (long d = 0; d < c->size; d += LANES)
            products += *(F *)(room->given + n * c->size + d) * load(out, query_at(c, &p, n, line) + d, half);
        float mean = sum_of(products);
        for (long m = 0; m < p.keys; m += LANES) {
            F *slope = (F *)(room->slopes + n * p.keys + m);
            *slope = (*slope - mean) * *(F *)(room->scores + n * p.keys + m);
        }
    }
    gather(c, &p, room->slopes, room->queries, half, grad_k);
    take_keys(c, &p, c->k, c->k_stride, c->clean_k, c->clean_k_stride, half, room->keys);
    multiply(room->results, room->slopes, room->keys, p.rows, p.keys, c->size);
    float scale = 1 / sqrtf(c->size);
    for (long n = 0; n < p.queries; n++)
        for (long d = 0; d < c->size; d += LANES)
            store(grad_q, query_at(c, &p, n, line) + d, half, *(F *)(room->results + n * c->size + d) * scale);
}

static struct room room_of(const struct call *c, long parts) {
    long rows = 0, keys = 0;
    for (long n = 0; n < parts; n++) {
        struct part p = part_of(c, n * c->kv_heads);
        if (p.rows > rows) rows = p.rows;
        if (p.keys > keys) keys = p.keys;
    }
    float *all = malloc((3 * rows * c->size + 2 * rows * keys + 2 * keys * c->size) * sizeof(float));
    memset(all, 0, (3 * rows * c->size + 2 * rows * keys) * sizeof(float));
    float *results = all + 2 * rows * c->size, *scores = results + rows * c->size, *keys_at = scores + 2 * rows * keys;
    return (struct room){all, all + rows * c->size, results, scores, scores + rows * keys, keys_at, keys_at + keys * c->size};
}

#define ARGUMENTS                                                                                                       \
    const void *q, const void *k, const void *v, const void *clean_k, const void *clean_v, long q_stride, long k_stride, \
        long v_stride, long clean_k_stride, long clean_v_stride, const int32_t *seen, const int32_t *parts, long count,  \
        long masks, long tokens, long heads, long kv_heads, long size, int half
#define CALL                                                                                                            \
    struct call c = {q, k, v, clean_k, clean_v, q_stride, k_stride, v_stride, clean_k_stride, clean_v_stride, seen, parts, \
                     masks, tokens, heads, kv_heads, size}
#define EACH_PART(work)                                                                                                 \
    _Pragma("omp parallel") {                                                                                           \
        struct room room = room_of(&c, count);                                                                          \
        _Pragma("omp for schedule(dynamic)") for (long n = 0; n < count * kv_heads; n++) work;                          \
        free(room.queries);                                                                                             \
    }

/* Results [rows, masks, heads, size], and the logarithm of the sum of each query's exponentials. */
void mask_attention(ARGUMENTS, void *out, float *logs) {
    CALL;
    EACH_PART(if (half) forward(&c, part_of(&c, n), &room, 1, out, logs); else forward(&c, part_of(&c, n), &room, 0, out, logs))
}

void mask_attention_gradient(ARGUMENTS, const void *out, const float *logs, const void *grad, void *grad_q, void *grad_k,
                             void *grad_v) {
    CALL;
    EACH_PART(if (half) backward(&c, part_of(&c, n), &room, 1, out, logs, grad, grad_q, grad_k, grad_v);
              else backward(&c, part_of(&c, n), &room, 0, out, logs, grad, grad_q, grad_k, grad_v))
}
