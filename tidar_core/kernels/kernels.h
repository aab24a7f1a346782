/* Functions that one file defines and another calls; each is described where it is defined. */
#include <stdint.h>

/* What an adapter adds to the results of `count` tokens, whose numbers are given: the product of two maps, of width
 * `rank` between them. */
struct added { const void *down, *up; long rank; const long *token; long count; };

void product_fp32(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half, const struct added *added);
void product_bf16(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half, const struct added *added);
void product_int8(const void *weight, const float *scale, const float *bias, long out, long width, const void *x,
                  long tokens, void *y, int half, const struct added *added);
void product_int4(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half, const struct added *added);
void add_product(const void *weight, long out, long width, const void *x, long tokens, void *y, long apart, int half);
void add_rms_norm(const void *x, const void *residual, const void *weight, int half_weight, float eps, long tokens,
                  long width, int half, void *normed, void *total);
void rotate_and_store(void *qkv, const void *norm, const void *cosine, const void *sine, void *pages,
                      const int64_t *slot, long tokens, long per_sequence, long clean, long heads, long kv_heads,
                      long size, float eps, int half);
void silu_mul(const void *gate_up, long tokens, long width, int half, void *y);
void likeliest(const void *x, long outer, long inner, long apart, long width, int half, int64_t *token);
void paged_attention(const void *q, const void *k, const void *v, long q_stride, long kv_stride, const void *pages,
                     long page_len, const int64_t *table, long table_stride, long table_len, const int64_t *prefix_len,
                     const uint8_t *visible, long sequences, long per_sequence, long heads, long kv_heads, long size,
                     int half, void *out);
