/* Sums of one panel of weights with the tokens of a tile, which are laid out. Included after `product_form.h`. */

/* Write the results of one token for the 32 channels of a panel, or add them to what is there. */
INLINE void put(void *y, long out, long row, long channel, int half, const float *bias, const F *sum, int adds) {
    UNROLL for (int p = 0; p < 2; p++, channel += LANES) {
        long left = out - channel, place = row * out + channel;
        F value = sum[p];
        if (left >= LANES) {
            if (bias) value += load(bias, channel, 0);
            if (adds) value += load(y, place, half);
            store(y, place, half, value);
        } else if (left > 0) {
            if (bias) value += load_some(bias, channel, 0, left, 0);
            if (adds) value += load_some(y, place, half, left, 0);
            store_some(y, place, half, left, value);
        }
    }
}

/* Request what a stream of weights needs next for `halves` of a panel. It goes to the second cache: lines on their way
 * to the first would hold up those that are read. */
INLINE void fetch(int tokens, int halves, const U *word) {
    UNROLL for (int n = 0; n < halves; n++) __builtin_prefetch((const char *)(word + n) + AHEAD(tokens), 0, 2);
}

/* Values of 16 channels for input `j` of a word. */
INLINE F weights_of(enum form form, U word, int j) {
    return form == FP32 ? (F)word : (F)(j ? word >> 16 << 16 : word << 16);
}

/* Sums, to which the products of two weights with two inputs of a token are added, all in bf16. */
INLINE F dot_pairs(F sum, U word, uint32_t pair) {
#ifdef __AVX512BF16__
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)word);
#else
    return (void)word, (void)pair, sum; /* there is no such form then */
#endif
}

/* Sums, to which the products of four levels of weights, which are not negative, with four of a token are added. */
INLINE I dot_levels(I sum, U word, const int8_t *levels) {
    int32_t x;
    memcpy(&x, levels, 4);
#ifdef __AVX512VNNI__
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)word, _mm512_set1_epi32(x));
#else
    UNROLL for (int n = 0; n < 4; n++) sum += (I)(word >> (8 * n) & 255) * (int32_t)(int8_t)(x >> (8 * n));
    return sum;
#endif
}

/* Sums [tokens, 2] of a panel with the `tokens` tokens of a tile, a constant. `words` are those of a channel. */
INLINE void sums_of_numbers(enum form form, int tokens, const U *word, long words, const void *laid, F sums[][2]) {
    const float *x = laid;
    const uint32_t *pair = laid;
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (long k = 0; k < words; k++, word += 2, pair += tokens) {
        fetch(tokens, 2, word);
        if (form == PAIRS)
            UNROLL for (int t = 0; t < tokens; t++)
                UNROLL for (int p = 0; p < 2; p++) sum[t][p] = dot_pairs(sum[t][p], word[p], pair[t]);
        else
            UNROLL for (int j = 0; j < inputs_of(form); j++, x += tokens) {
                const F first = weights_of(form, word[0], j), second = weights_of(form, word[1], j);
                UNROLL for (int t = 0; t < tokens; t++) sum[t][0] += first * x[t], sum[t][1] += second * x[t];
            }
    }
    UNROLL for (int t = 0; t < tokens; t++) sums[t][0] = sum[t][0], sums[t][1] = sum[t][1];
}

/* The same for weights in int8. A part of the tokens has PART levels of each token, then each token's step, then 128
 * times the sum of its levels: that is the weights' zero. Products of a part are integers. */
INLINE void sums_of_parts(int tokens, const U *word, long words, const int8_t *level, F sums[][2]) {
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (; words > 0; words -= PART / 4, level += bytes_of(INT8) * tokens) {
        const float *step = (const float *)(level + PART * tokens);
        const int32_t *middle = (const int32_t *)(step + tokens);
        I dot[MOST][2];
        UNROLL for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = (I){} - middle[t];
        for (long k = 0; k < PART / 4 && k < words; k++, word += 2) {
            fetch(tokens, 2, word);
            UNROLL for (int t = 0; t < tokens; t++)
                UNROLL for (int p = 0; p < 2; p++) dot[t][p] = dot_levels(dot[t][p], word[p], level + PART * t + 4 * k);
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int p = 0; p < 2; p++) sum[t][p] += __builtin_convertvector(dot[t][p], F) * step[t];
    }
    UNROLL for (int t = 0; t < tokens; t++) sums[t][0] = sum[t][0], sums[t][1] = sum[t][1];
}

/* The same for weights in int4 and `halves` of a panel, 1 or 2, from number `first` on. A group of the tokens has GROUP
 * levels of each token in the order of those in the halves of words: of each eight inputs first those with an even
 * index, then the others. Then come each token's step, and its step times the sum of its levels. Products of a group
 * are integers. */
INLINE void sums_of_groups(int tokens, int first, int halves, const U *word, long words, const int8_t *level,
                           F sums[][2]) {
    F sum[MOST][2];
    UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = (F){};
    for (word += first; words > 0; words -= GROUP_WORDS, word += 2 * GROUP_WORDS, level += bytes_of(INT4) * tokens) {
        const float *step = (const float *)(level + GROUP * tokens), *total = step + tokens;
        I dot[MOST][2] = {};
        UNROLL for (int k = 0; k < GROUP_WORDS; k++) fetch(tokens, halves, word + 2 * k);
        UNROLL for (int k = 0; k < GROUP / 8; k++)
            UNROLL for (int p = 0; p < halves; p++) {
                const U both = word[2 * k + 2 + p], even = both & 0x0f0f0f0f, odd = both >> 4 & 0x0f0f0f0f;
                UNROLL for (int t = 0; t < tokens; t++) {
                    const int8_t *x = level + GROUP * t + 8 * k;
                    dot[t][p] = dot_levels(dot_levels(dot[t][p], even, x), odd, x + 4);
                }
            }
        UNROLL for (int p = 0; p < halves; p++) {
            const F size = (F)(word[p] >> 16 << 16), least = (F)(word[p] << 16);
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t][p] += __builtin_convertvector(dot[t][p], F) * (size * step[t]) + least * total[t];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int p = 0; p < halves; p++) sums[t][first + p] = sum[t][p];
}

/* The sums of SEVERAL tokens with weights in int4 leave too few registers for both halves of a panel at a time. */
INLINE void sums_of_tile(enum form form, int tokens, const U *word, long words, const void *laid, F sums[][2]) {
    if (form == INT8) sums_of_parts(tokens, word, words, laid, sums);
    else if (form != INT4) sums_of_numbers(form, tokens, word, words, laid, sums);
    else if (tokens < SEVERAL) sums_of_groups(tokens, 0, 2, word, words, laid, sums);
    else
        UNROLL for (int p = 0; p < 2; p++) sums_of_groups(tokens, p, 1, word, words, laid, sums);
}

/* Products of panel `n` with the tokens of a tile. */
INLINE void panel(enum form form, const struct product *of, long n, long tile) {
    const U *word = of->weight + n * 2 * of->words;
    const long token = first_of(&of->tiles, tile), count = tokens_of(&of->tiles, tile);
    const char *laid = of->laid + token * of->steps * bytes_of(form);
    F sums[MOST][2];
#define TILE(count) sums_of_tile(form, count, word, of->words, laid, sums)
    CONSTANT(count, TILE)
    for (long t = 0; t < count; t++) {
        if (form == INT8) UNROLL for (int p = 0; p < 2; p++) sums[t][p] *= load(of->scale, n * 32 + p * LANES, 0);
        put(of->y, of->out, row_of(of->to, token + t), n * 32, of->half, of->bias, sums[t], of->adds);
    }
}
