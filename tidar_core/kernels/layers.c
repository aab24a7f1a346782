/* All layers of a forward, one call for all of them.
 *
 * It computes what `decode_forward.py` computes, with the same bits; an adapter is part of its map's product here. A model of 30 layers
 * has 300 such calls in a decode step, and each costs microseconds in Python. `compiled_layers.py` has the structures.
 */
#include "kernels.h"
#include <stdlib.h>
#include <string.h>

enum form { FP32, BF16, INT8, INT4 };

/* A linear map, and what a draft adapter adds to it for masks; `rank` is 0 without an adapter. */
struct map {
    long form;
    const void *weight;
    const float *scale;
    const float *bias;
    long out, width;
    const void *down, *up;
    long rank;
};

struct layer {
    const void *attention_norm, *head_norm, *mlp_norm;
    struct map qkv, output, gate_up, down;
};

struct model {
    const struct layer *layers;
    long count, width, heads, kv_heads, size;
    const void *norm;
    float eps;
    int half, half_norm;
};

/* Sequences with the same pattern; their tokens lie together. `clean` leading tokens of each sequence are no masks. */
struct part {
    const void *cosine, *sine;
    const int64_t *slot, *table, *prefix_len;
    const uint8_t *visible;
    long sequences, per_sequence, clean, page_len, table_stride, table_len;
};

/* `masks` has the numbers of the `count` tokens to which an adapter adds. */
static void multiply(const struct map *map, const char *x, long tokens, char *y, const long *masks, long count,
                     int half) {
    const long out = map->out, width = map->width;
    const struct added added = {map->down, map->up, map->rank, masks, map->rank ? count : 0};
    switch (map->form) {
    case FP32: product_fp32(map->weight, map->bias, out, width, x, tokens, y, half, &added); break;
    case BF16: product_bf16(map->weight, map->bias, out, width, x, tokens, y, half, &added); break;
    case INT8: product_int8(map->weight, map->scale, map->bias, out, width, x, tokens, y, half, &added); break;
    case INT4: product_int4(map->weight, map->bias, out, width, x, tokens, y, half, &added); break;
    }
}

/* Numbers of the masks of all parts. */
static long find_masks(const struct part *parts, long count, long *masks) {
    long found = 0;
    for (long first = 0; count; first += parts->sequences * parts->per_sequence, parts++, count--)
        for (long n = 0; n < parts->sequences * parts->per_sequence; n++)
            if (n % parts->per_sequence >= parts->clean) masks[found++] = first + n;
    return found;
}

/* Keys and values of clean tokens go to the pages, then the tokens of all parts gather values. */
static void gather(const struct model *model, const struct layer *layer, char *qkv, void *pages,
                   const struct part *parts, long count, char *gathered) {
    const long size = model->half ? 2 : 4, wide = layer->qkv.out, thin = model->heads * model->size;
    for (; count; parts++, count--) {
        const long tokens = parts->sequences * parts->per_sequence;
        const char *k = qkv + thin * size, *v = k + model->kv_heads * model->size * size;
        rotate_and_store(qkv, layer->head_norm, parts->cosine, parts->sine, pages, parts->slot, tokens,
                         parts->per_sequence, parts->clean, model->heads, model->kv_heads, model->size, model->eps,
                         model->half);
        paged_attention(qkv, k, v, wide, wide, pages, parts->page_len, parts->table, parts->table_stride,
                        parts->table_len, parts->prefix_len, parts->visible, parts->sequences, parts->per_sequence,
                        model->heads, model->kv_heads, model->size, model->half, gathered);
        qkv += tokens * wide * size;
        gathered += tokens * thin * size;
    }
}

/* Takes the tokens of all parts through the layers first..after - 1. `added` [tokens, width] is what the layer before
 * added, at first the embeddings, and `total` the sum before that; both are overwritten. After the last layer, `hidden`
 * has the states after the last norm. `pages` are those of layer 0, and those of the next layer lie `apart` bytes
 * behind. */
void layers(const struct model *model, long first, long after, void *added, void *total, char *pages, long apart,
            const struct part *parts, long count, void *hidden) {
    const struct layer *layer = model->layers + first;
    const struct map *gate_up = &layer->gate_up;
    const long size = model->half ? 2 : 4, width = model->width;
    long tokens = 0;
    for (long n = 0; n < count; n++) tokens += parts[n].sequences * parts[n].per_sequence;
    const long line = tokens * size;
    char *qkv = malloc(line * (layer->qkv.out + layer->output.width + gate_up->out + gate_up->out / 2));
    char *gathered = qkv + line * layer->qkv.out, *wide = gathered + line * layer->output.width;
    char *gated = wide + line * gate_up->out;
    long *masks = malloc(tokens * sizeof(long)), masked = find_masks(parts, count, masks);
    pages += first * apart;
    if (first == 0) memcpy(total, added, line * width);
    for (long n = first; n < after; n++, layer++, pages += apart) {
        add_rms_norm(added, n ? total : 0, layer->attention_norm, model->half_norm, model->eps, tokens, width,
                     model->half, hidden, total);
        multiply(&layer->qkv, hidden, tokens, qkv, masks, masked, model->half);
        gather(model, layer, qkv, pages, parts, count, gathered);
        multiply(&layer->output, gathered, tokens, added, masks, masked, model->half);
        add_rms_norm(added, total, layer->mlp_norm, model->half_norm, model->eps, tokens, width, model->half, hidden,
                     total);
        multiply(&layer->gate_up, hidden, tokens, wide, masks, masked, model->half);
        silu_mul(wide, tokens, gate_up->out / 2, model->half, gated);
        multiply(&layer->down, gated, tokens, added, masks, masked, model->half);
    }
    if (after == model->count)
        add_rms_norm(added, total, model->norm, model->half_norm, model->eps, tokens, width, model->half, hidden, total);
    free(masks);
    free(qkv);
}
