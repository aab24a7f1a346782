/* Losses of labels against a blend of label and teacher, and their gradient, for logits in fp32 and bf16.
 *
 * `tidar_core.training.losses` defines what is computed. A row of logits is read twice in the forward pass and once in
 * the backward pass; nothing of its length is kept between them.
 */
#include "numbers.h"

struct rows {
    const void *plain, *link, *teacher; /* logits [count, width]; link and teacher may be null */
    const int64_t *label;
    long width;
    float share, unlinked; /* of the teacher; weight of the loss without the link */
};

INLINE F logits(const void *x, long first, long i, long width, int half) {
    return i + LANES <= width ? load(x, first + i, half) : load_some(x, first + i, half, width - i, -INFINITY);
}

INLINE F linked(const struct rows *r, F plain, long first, long i, int half) {
    if (r->link) plain += logits(r->link, first, i, r->width, half);
    return plain;
}

/* Finite, so that a chance of 0 times it is 0. */
INLINE F bounded(F x) { return larger(x, all(-1e30f)); }

/* Row `n`: loss, cross-entropy of the label, likeliest token, and log-sums of linked, plain and teacher's logits. */
INLINE void losses_of_row(const struct rows *r, long n, int half, float *loss, float *cross_entropy, int64_t *likeliest, float *sums) {
    long first = n * r->width, best = 0;
    F most = all(-INFINITY), most_plain = most, most_taught = most;
    I odd = {}, place = {}, lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long i = 0; i < r->width; i += LANES) {
        F plain = logits(r->plain, first, i, r->width, half), both = linked(r, plain, first, i, half);
        I above = both > most;
        odd |= ~(both < INFINITY);
        most = larger(both, most);
        place = (above & (lane + (int)i)) | (~above & place);
        if (r->link) most_plain = larger(plain, most_plain);
        if (!r->teacher) continue;
        F taught = logits(r->teacher, first, i, r->width, half);
        odd |= ~(taught < INFINITY);
        most_taught = larger(taught, most_taught);
    }
    for (int m = 1; m < LANES; m++)
        if (most[m] > most[best] || (most[m] == most[best] && place[m] < place[best])) best = m;
    float top = most[best], top_plain = r->link ? largest_of(most_plain) : top, top_taught = largest_of(most_taught);
    F sum = {}, sum_plain = {}, taught = {}, dot = {}, dot_plain = {};
    for (long i = 0; i < r->width; i += LANES) {
        F plain = logits(r->plain, first, i, r->width, half), both = linked(r, plain, first, i, half) - top;
        plain -= top_plain;
        sum += exponential(both);
        if (r->link) sum_plain += exponential(plain);
        if (!r->teacher) continue;
        F weight = exponential(logits(r->teacher, first, i, r->width, half) - top_taught);
        taught += weight;
        dot += weight * bounded(both);
        dot_plain += weight * bounded(plain);
    }
    long label = first + r->label[n];
    float plain = load_one(r->plain, label, half), both = r->link ? plain + load_one(r->link, label, half) : plain;
    float log_sum = logf(sum_of(sum)), log_plain = r->link ? logf(sum_of(sum_plain)) : log_sum;
    float of_label = log_sum + top - both, of_plain = log_plain + top_plain - plain, total = sum_of(taught);
    *cross_entropy = of_label;
    if (r->teacher) {
        of_label = (1 - r->share) * of_label + r->share * (log_sum - sum_of(dot) / total);
        of_plain = (1 - r->share) * of_plain + r->share * (log_plain - sum_of(dot_plain) / total);
    }
    *loss = r->link ? (of_label + r->unlinked * of_plain) / (1 + r->unlinked) : of_label;
    *likeliest = place[best];
    for (int m = 0; m < LANES; m++)
        if (odd[m]) *loss = *cross_entropy = top = NAN; /* nan and infinity are found here: exponential() hides them */
    sums[0] = top + log_sum, sums[1] = top_plain + log_plain, sums[2] = top_taught + logf(total);
}

/* Gradient of row `n` with respect to plain logits and, where there is a link, to its logits. */
INLINE void gradients_of_row(const struct rows *r, long n, int half, float grad, const float *sums, void *of_plain, void *of_link) {
    long first = n * r->width, label = r->label[n];
    if (sums[0] != sums[0]) grad = NAN;
    float of_label = r->teacher ? 1 - r->share : 1, weight = r->link ? grad / (1 + r->unlinked) : grad;
    float weight_plain = weight * r->unlinked;
    for (long i = 0; i < r->width; i += LANES) {
        F plain = logits(r->plain, first, i, r->width, half), target = {};
        if (r->teacher) target = r->share * exponential(logits(r->teacher, first, i, r->width, half) - sums[2]);
        if (label >= i && label < i + LANES) target[label - i] += of_label;
        F both = (exponential(linked(r, plain, first, i, half) - sums[0]) - target) * weight, sum = both;
        if (r->link) sum += (exponential(plain - sums[1]) - target) * weight_plain;
        if (i + LANES <= r->width) {
            if (r->link) store(of_link, first + i, half, both);
            store(of_plain, first + i, half, sum);
        } else {
            if (r->link) store_some(of_link, first + i, half, r->width - i, both);
            store_some(of_plain, first + i, half, r->width - i, sum);
        }
    }
}

void losses_forward(const void *plain, const void *link, const void *teacher, const int64_t *label, long count, long width,
                    float share, float unlinked, int half, float *loss, float *cross_entropy, int64_t *likeliest, float *sums) {
    struct rows r = {plain, link, teacher, label, width, share, unlinked};
#pragma omp parallel for schedule(static)
    for (long n = 0; n < count; n++)
        if (half) losses_of_row(&r, n, 1, loss + n, cross_entropy + n, likeliest + n, sums + 3 * n);
        else losses_of_row(&r, n, 0, loss + n, cross_entropy + n, likeliest + n, sums + 3 * n);
}

void losses_backward(const void *plain, const void *link, const void *teacher, const int64_t *label, long count, long width,
                     float share, float unlinked, int half, const float *grad, const float *sums, void *of_plain, void *of_link) {
    struct rows r = {plain, link, teacher, label, width, share, unlinked};
#pragma omp parallel for schedule(static)
    for (long n = 0; n < count; n++)
        if (half) gradients_of_row(&r, n, 1, grad[n], sums + 3 * n, of_plain, of_link);
        else gradients_of_row(&r, n, 0, grad[n], sums + 3 * n, of_plain, of_link);
}
