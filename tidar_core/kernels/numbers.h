/* Vectors of 16 numbers in fp32, read from and written to memory in fp32, or in bf16 where `half` is 1. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define LANES 16
#define MANY 8192 /* numbers from which on several threads take less time than one */
#define VECTOR(type, bytes, align) type __attribute__((vector_size(bytes), aligned(align), may_alias))

typedef VECTOR(float, 64, 4) F;
typedef VECTOR(float, 32, 4) F8;
typedef VECTOR(float, 16, 4) F4;
typedef VECTOR(uint32_t, 64, 4) U;
typedef VECTOR(int32_t, 64, 4) I;
typedef VECTOR(uint16_t, 32, 2) H;
typedef VECTOR(uint16_t, 64, 2) W;
typedef VECTOR(uint8_t, 16, 1) B;

/* As many numbers as a register holds. Where it holds fewer than 16, a vector of 16 that is handed over goes through
 * memory. */
#if defined __AVX512F__
#define NATIVE 16
#elif defined __AVX__
#define NATIVE 8
#else
#define NATIVE 4
#endif
typedef VECTOR(float, 4 * NATIVE, 4) N;
typedef VECTOR(int32_t, 4 * NATIVE, 4) NI;

INLINE F all(float x) { return (F){} + x; }

INLINE F load(const void *x, long i, int half) {
    if (!half) return *(const F *)((const float *)x + i);
#ifdef __AVX512F__
    return (F)((U)_mm512_cvtepu16_epi32(*(const __m256i_u *)((const uint16_t *)x + i)) << 16);
#else
    return (F)(__builtin_convertvector(*(const H *)((const uint16_t *)x + i), U) << 16);
#endif
}

INLINE void store(void *x, long i, int half, F value) {
    if (!half) {
        *(F *)((float *)x + i) = value;
        return;
    }
#ifdef __AVX512BF16__
    *(H *)((uint16_t *)x + i) = (H)_mm512_cvtneps_pbh((__m512)value);
#else
    U bits = (U)value;
    *(H *)((uint16_t *)x + i) = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, H);
#endif
}

INLINE float load_one(const void *x, long i, int half) {
    if (!half) return ((const float *)x)[i];
    union { uint32_t bits; float value; } one = {(uint32_t)((const uint16_t *)x)[i] << 16};
    return one.value;
}

INLINE void store_one(void *x, long i, int half, float value) {
    union { float value; uint32_t bits; } one = {value};
    if (half) ((uint16_t *)x)[i] = (uint16_t)((one.bits + 0x7fff + (one.bits >> 16 & 1)) >> 16);
    else ((float *)x)[i] = value;
}

/* The first `count` of 16 entries; the others are `rest`. */
INLINE F load_some(const void *x, long i, int half, long count, float rest) {
    F value = all(rest);
    for (long n = 0; n < count; n++) value[n] = load_one(x, i + n, half);
    return value;
}

INLINE void store_some(void *x, long i, int half, long count, F value) {
    for (long n = 0; n < count; n++) store_one(x, i + n, half, value[n]);
}

/* A run of 16 entries, or the last ones of `width`. */
INLINE F run(const void *x, long first, long i, long width, int half) {
    return i + LANES <= width ? load(x, first + i, half) : load_some(x, first + i, half, width - i, 0);
}

INLINE void put_run(void *x, long first, long i, long width, int half, F value) {
    if (i + LANES <= width) store(x, first + i, half, value);
    else store_some(x, first + i, half, width - i, value);
}

INLINE float sum_of(F x) {
    F8 a = *(F8 *)&x + *((F8 *)&x + 1);
    F4 b = *(F4 *)&a + *((F4 *)&a + 1);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* The list f(0, s) .. f(15, s), for a vector of constants. A vector that is filled entry by entry is filled at run time. */
#define SIXTEEN(f, s)                                                                                              \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s), f(10, s), f(11, s),  \
        f(12, s), f(13, s), f(14, s), f(15, s)
#define PARTNER(n, s) (n) ^ (s)

/* The larger of each two numbers; the second where none is. */
INLINE F larger(F x, F y) {
#ifdef __AVX512F__
    return (F)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return (F)(((I)x & (x > y)) | ((I)y & ~(x > y)));
#endif
}

/* The same of numbers in registers. */
INLINE N larger_each(N x, N y) {
#ifdef __AVX512F__
    return larger(x, y);
#else
    return (N)(((NI)x & (x > y)) | ((NI)y & ~(x > y)));
#endif
}

/* The same of integers, or of the bits of numbers that are not negative: nan is larger than infinity. */
INLINE I larger_bits(I x, I y) {
#ifdef __AVX512F__
    return (I)_mm512_max_epi32((__m512i)x, (__m512i)y);
#else
    return (x & (x > y)) | (y & ~(x > y));
#endif
}

INLINE float largest_of(F x) {
    UNROLL for (int s = 1; s < 16; s *= 2) x = larger(x, __builtin_shuffle(x, (I){SIXTEEN(PARTNER, s)}));
    return x[0];
}

INLINE int32_t largest_bits_of(I x) {
    UNROLL for (int s = 1; s < 16; s *= 2) x = larger_bits(x, __builtin_shuffle(x, (I){SIXTEEN(PARTNER, s)}));
    return x[0];
}

/* The largest of the numbers of a register; what is no number does not count. */
INLINE float largest_in(N x) {
#ifdef __AVX512F__
    return largest_of(x);
#else
    float found = x[0];
    for (int n = 1; n < NATIVE; n++) found = x[n] > found ? x[n] : found;
    return found;
#endif
}

INLINE float sum_in(N x) {
#ifdef __AVX512F__
    return sum_of(x);
#else
    float sum = 0;
    for (int n = 0; n < NATIVE; n++) sum += x[n];
    return sum;
#endif
}

INLINE F smaller(F x, F y) { return -larger(-x, -y); }

/* exp of x <= 88, up to about 1e-7 of the result; 0 below -87. */
INLINE F exponential(F x) {
    F whole = x * 1.44269504f + 12582912.f; /* 1.5 * 2^23: what follows the point is rounded away */
    I power = (I)whole - (I)all(12582912.f);
    whole -= 12582912.f;
    F r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.f;
    return (F)((I)(y * (F)((power + 127) << 23)) & (x > -87.f));
}

/* 2 to the power of x <= 0, up to about 2e-7 of the result; 0, or next to nothing, below -126. What is no number stays
 * none. */
INLINE N power_of_two(N x) {
    x = larger_each((N){} - 160, x);
    const N whole = x + 12582912.f; /* 1.5 * 2^23: what follows the point is rounded away */
    const N r = x - (whole - 12582912.f);
    N y = r * 1.32647273e-3f + 9.67151299e-3f;
    y = y * r + 5.55073358e-2f;
    y = y * r + 2.40222424e-1f;
    y = y * r + 6.93147004e-1f;
    y = y * r + 1.f;
#ifdef __AVX512F__
    return (N)_mm512_scalef_ps((__m512)y, (__m512)(whole - 12582912.f));
#else
    return (N)(((NI)y + ((NI)whole << 23 & (x == x))) & ~(x <= -126.f));
#endif
}

/* Exchange rows and columns of a square of words. */
INLINE void transpose(U word[16]) {
#ifdef __AVX512F__
    __m512i pair[16], four[16];
    UNROLL for (int n = 0; n < 16; n += 2) {
        pair[n] = _mm512_unpacklo_epi32((__m512i)word[n], (__m512i)word[n + 1]);
        pair[n + 1] = _mm512_unpackhi_epi32((__m512i)word[n], (__m512i)word[n + 1]);
    }
    UNROLL for (int n = 0; n < 16; n += 4) /* four[n + c] has columns c, 4 + c, 8 + c and 12 + c of rows n to n + 3 */
        UNROLL for (int c = 0; c < 4; c += 2) {
            four[n + c] = _mm512_unpacklo_epi64(pair[n + c / 2], pair[n + c / 2 + 2]);
            four[n + c + 1] = _mm512_unpackhi_epi64(pair[n + c / 2], pair[n + c / 2 + 2]);
        }
    UNROLL for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(four[c], four[4 + c], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(four[c], four[4 + c], 0xdd);
        const __m512i last_even = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0x88);
        const __m512i last_odd = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0xdd);
        word[c] = (U)_mm512_shuffle_i32x4(even, last_even, 0x88);
        word[4 + c] = (U)_mm512_shuffle_i32x4(odd, last_odd, 0x88);
        word[8 + c] = (U)_mm512_shuffle_i32x4(even, last_even, 0xdd);
        word[12 + c] = (U)_mm512_shuffle_i32x4(odd, last_odd, 0xdd);
    }
#else
    uint32_t row[16][16], column[16][16]; /* a vector of 16 words that no register holds is shuffled word by word */
    memcpy(row, word, sizeof row);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) column[n][m] = row[m][n];
    memcpy(word, column, sizeof row);
#endif
}
