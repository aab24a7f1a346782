/* Tokens of a product, laid out next to each other in the form of its weights. Included after `product_form.h`. */

/* The largest absolute value of a step of one token, at least 1e-30; not finite if one of them is not. */
INLINE float largest_size(const void *x, long first, long left, int inputs, int half) {
    I most = (I)all(1e-30f);
    UNROLL for (int n = 0; n < inputs; n += LANES)
        if (n < left) most = larger_bits(most, (I)run(x, first, n, left, half) & 0x7fffffff);
    const I largest = (I){} + largest_bits_of(most);
    return ((F)largest)[0];
}

INLINE I level_of(F value, F steps) {
    const F whole = all(12582912.f); /* 1.5 * 2^23 rounds to the nearest */
    return (I)(value * steps + whole) - (I)whole;
}

/* Levels of a step of one token, 127 on each side of 0. Returns their sum. */
INLINE float levels_of(enum form form, const void *x, long first, long left, int half, float largest, char *level) {
    U sum = {};
    UNROLL for (int n = 0; n < inputs_of(form); n += LANES) {
        const B place = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
        const I found = n < left ? level_of(run(x, first, n, left, half), all(127 / largest)) : (I){};
        const B bytes = __builtin_convertvector(found, B);
        *(B *)(level + n) = form == INT4 ? __builtin_shuffle(bytes, place) : bytes;
        sum += (U)found;
    }
    return sum_of(__builtin_convertvector((I)sum, F));
}

/* Lay inputs of `count` tokens, a constant, next to each other: those of the steps from `first` to before `last`. The
 * inputs of token `t` begin at number `line[t]` of x. */
INLINE void lay_numbers(enum form form, int count, const struct product *of, const long *line, long first, long last,
                        float *laid) {
    const long end = last * inputs_of(form), whole = end < of->width ? end : of->width;
    long i = first * inputs_of(form);
    for (; i < whole; i++, laid += count)
        UNROLL for (int t = 0; t < count; t++) laid[t] = load_one(of->x, line[t] + i, of->half);
    memset(laid, 0, (end - i) * count * sizeof *laid);
}

INLINE void lay_pairs(int count, const struct product *of, const long *line, long first, long last, uint32_t *laid) {
    const uint16_t *x = of->x;
    const long whole = last < of->width / 2 ? last : of->width / 2;
    for (; first < whole; first++, laid += count)
        UNROLL for (int t = 0; t < count; t++) memcpy(laid + t, x + line[t] + 2 * first, 4);
    memset(laid, 0, (last - first) * count * sizeof *laid);
    for (int t = 0; first < last && 2 * first < of->width && t < count; t++) laid[t] = x[line[t] + of->width - 1];
}

/* Write one step of a token, which is token `t` of `count`, in levels; `left` inputs of the token are left. */
INLINE void lay_step(enum form form, const void *x, long i, long left, int half, float largest, long t, long count,
                     char *laid) {
    const int inputs = inputs_of(form);
    const float step = largest / 127, sum = levels_of(form, x, i, left, half, largest, laid + t * inputs);
    float *rest = (float *)(laid + count * inputs);
    rest[t] = step;
    if (form == INT4) rest[count + t] = step * sum;
    else ((int32_t *)rest)[count + t] = 128 * (int32_t)sum;
}

/* The same as `lay_numbers` in levels. All largest values are found before the first level, so the steps of each loop
 * overlap. */
INLINE void lay_levels(enum form form, long count, const struct product *of, const long *line, int half, long first,
                       long last, char *laid) {
    const int inputs = inputs_of(form);
    float largest[BLOCK / GROUP_WORDS][MOST];
    for (long n = first; n < last; n++)
        for (long t = 0; t < count; t++) {
            const long i = line[t] + n * inputs, left = of->width - n * inputs;
            largest[n - first][t] = left < inputs ? largest_size(of->x, i, left, inputs, half)
                                                  : largest_size(of->x, i, inputs, inputs, half);
        }
    for (long n = first; n < last; n++, laid += count * bytes_of(form))
        for (long t = 0; t < count; t++) {
            const long i = line[t] + n * inputs, left = of->width - n * inputs;
            if (left < inputs) lay_step(form, of->x, i, left, half, largest[n - first][t], t, count, laid);
            else lay_step(form, of->x, i, inputs, half, largest[n - first][t], t, count, laid);
        }
}

INLINE long blocks_of_tile(enum form form, const struct product *of) {
    const long run = BLOCK / words_of(form);
    return (of->steps + run - 1) / run;
}

/* Lay out block `n` of the tokens: the inputs of a tile for BLOCK words of a channel. */
INLINE void lay_block(enum form form, const struct product *of, long n) {
    const long blocks = blocks_of_tile(form, of), tile = n / blocks, run = BLOCK / words_of(form);
    const long first = n % blocks * run, last = first + run < of->steps ? first + run : of->steps;
    const long token = first_of(&of->tiles, tile), count = tokens_of(&of->tiles, tile);
    void *laid = of->laid + (token * of->steps + count * first) * bytes_of(form);
    long line[MOST];
    for (long t = 0; t < count; t++) line[t] = row_of(of->from, token + t) * of->width;
#define LAY_PAIRS(count) lay_pairs(count, of, line, first, last, laid)
#define LAY_NUMBERS(count) lay_numbers(form, count, of, line, first, last, laid)
    if (form == PAIRS) {
        CONSTANT(count, LAY_PAIRS)
    } else if (form < INT8) {
        CONSTANT(count, LAY_NUMBERS)
    } else if (of->half) lay_levels(form, count, of, line, 1, first, last, laid);
    else lay_levels(form, count, of, line, 0, first, last, laid);
}
