/* Norm, gate and rotation of a train step, with their gradients, for fp32 and bf16.
 *
 * Weights of a norm are frozen: their gradient is not computed. Sums are in fp32; results in bf16 are rounded once.
 */
#include "numbers.h"

/* With y = x * s * w and s = 1 / rms(x): the gradient is s * (w * dy - x * s^2 * mean(x * w * dy)). */
INLINE void gradient_of_norm(const void *x, const void *weight, const void *grad, float eps, long first, long width, int half,
                             void *out) {
    F squares = {}, products = {};
    for (long i = 0; i < width; i += LANES) {
        F value = run(x, first, i, width, half);
        squares += value * value;
        products += value * run(weight, 0, i, width, half) * run(grad, first, i, width, half);
    }
    float square = sum_of(squares) / width + eps, scale = 1 / sqrtf(square), share = sum_of(products) / width / square;
    for (long i = 0; i < width; i += LANES)
        put_run(out, first, i, width, half,
                (run(weight, 0, i, width, half) * run(grad, first, i, width, half) - run(x, first, i, width, half) * share) * scale);
}

void rms_norm_gradient(const void *x, const void *weight, const void *grad, float eps, long tokens, long width, int half, void *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++)
        if (half) gradient_of_norm(x, weight, grad, eps, t * width, width, 1, out);
        else gradient_of_norm(x, weight, grad, eps, t * width, width, 0, out);
}

INLINE void gradient_of_gate(const void *gate_up, const void *grad, long token, long width, int half, void *out) {
    for (long i = 0; i < width; i += LANES) {
        F gate = run(gate_up, 2 * token * width, i, width, half), up = run(gate_up, (2 * token + 1) * width, i, width, half);
        F given = run(grad, token * width, i, width, half), open = 1.f / (exponential(smaller(-gate, all(88.f))) + 1.f);
        put_run(out, 2 * token * width, i, width, half, given * up * open * (gate * (1.f - open) + 1.f));
        put_run(out, (2 * token + 1) * width, i, width, half, given * gate * open);
    }
}

void silu_mul_gradient(const void *gate_up, const void *grad, long tokens, long width, int half, void *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++)
        if (half) gradient_of_gate(gate_up, grad, t, width, 1, out);
        else gradient_of_gate(gate_up, grad, t, width, 0, out);
}

INLINE void turn_head(const void *x, long from, const void *cosine, const void *sine, long angle, long size, float sign, int half,
                      void *out, long to) {
    long middle = size / 2;
    for (long d = 0; d < middle; d += LANES) {
        F low = run(x, from, d, middle, half), high = run(x, from + middle, d, middle, half);
        F c = run(cosine, angle, d, middle, half), s = run(sine, angle, d, middle, half) * sign;
        put_run(out, to, d, middle, half, low * c - high * s);
        put_run(out, to + middle, d, middle, half, high * c + low * s);
    }
}

/* Heads of `tokens`, `stride` entries apart, turned forwards (`sign` 1) or back (-1). Both halves of an angle are equal. */
void rotate(const void *x, long stride, const void *cosine, const void *sine, long tokens, long heads, long size, float sign,
            int half, void *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++)
            if (half) turn_head(x, t * stride + h * size, cosine, sine, t * size, size, sign, 1, out, (t * heads + h) * size);
            else turn_head(x, t * stride + h * size, cosine, sine, t * size, size, sign, 0, out, (t * heads + h) * size);
}
