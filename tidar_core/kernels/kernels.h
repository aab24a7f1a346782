/* Functions that one file defines and another calls; each is described where it is defined. */
#include <stdint.h>

void product_fp32(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half);
void product_bf16(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half);
void product_int8(const void *weight, const float *scale, const float *bias, long out, long width, const void *x,
                  long tokens, void *y, int half);
void product_int4(const void *weight, const float *bias, long out, long width, const void *x, long tokens, void *y,
                  int half);
void low_rank_fp32(const void *down, const void *up, long out, long width, long rank, const void *x, void *y,
                   long batch, long rows, long masks);
void low_rank_bf16(const void *down, const void *up, long out, long width, long rank, const void *x, void *y,
                   long batch, long rows, long masks);
void add_rms_norm(const void *x, const void *residual, const void *weight, int half_weight, float eps, long tokens,
                  long width, int half, void *normed, void *total);
void rotate_and_store(void *qkv, const void *norm, const void *cosine, const void *sine, void *pages,
                      const int64_t *slot, long tokens, long per_sequence, long clean, long heads, long kv_heads,
                      long size, float eps, int half);
void silu_mul(const void *gate_up, long tokens, long width, int half, void *y);
void paged_attention(const void *q, const void *k, const void *v, long q_stride, long kv_stride, const void *pages,
                     long page_len, const int64_t *table, long table_stride, long table_len, const int64_t *prefix_len,
                     const uint8_t *visible, long sequences, long per_sequence, long heads, long kv_heads, long size,
                     int half, void *out);
