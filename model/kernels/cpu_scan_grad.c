/* The gradient of the selective scan: what trains small models on a CPU. See selective_scan of cpu.c for the forward.

   Each sequence by itself, VL channels at a time: forward once more, keeping the states, then back from the last token.
   Everything float32 and without gaps. Sums over sequences are left to the caller, so that no two threads add to one
   place and the result does not depend on their number. */
#include "cpu_channels.h"

typedef struct {
    const float *u, *delta, *z, *B, *C, *A, *D, *bias, *grad;                              /* bias may be NULL */
    float *grad_u, *grad_delta, *grad_z, *grad_B, *grad_C, *grad_A, *grad_D, *grad_bias; /* A, D, bias: (b, ...) */
    int64_t b, t, e, n, threads;
} scan_grad_args;

INLINE rows of(const float *data, int64_t width) { return (rows){(void *)data, width, FLOAT32}; }

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp2v(vmax(vmin(x, 126.0f), -126.0f) * -LOG2_E)); }

/* delta, and in `slope` its derivative to what was given */
INLINE vf step_size(const scan_grad_args *a, vf given, vf bias, vf *slope) {
    *slope = splat(1.0f);
    if (!a->bias) return given;
    *slope = sigmoid(given + bias);
    return softplus(given + bias);
}

/* Channels c..c + lanes of sequence s; h has room for (t + 1, n); adds to lane_B and lane_C (t, n). */
static void scan_grad_block(const scan_grad_args *a, int64_t s, int64_t c, vf *h, vf *lane_B, vf *lane_C) {
    const int64_t n = a->n, first = s * a->t;
    const int lanes = a->e - c < VL ? (int)(a->e - c) : VL;
    const rows u = of(a->u, a->e), delta = of(a->delta, a->e), z = of(a->z, a->e), grad = of(a->grad, a->e);
    const vf D = load(of(a->D, 0), 0, c, lanes), bias = a->bias ? load(of(a->bias, 0), 0, c, lanes) : splat(0.0f);
    vf A[n], carried[n], grad_A[n], grad_D = splat(0.0f), grad_bias = splat(0.0f), slope;
    for (int64_t j = 0; j < n; j++) {
        A[j] = h[j] = carried[j] = grad_A[j] = splat(0.0f);
        for (int lane = 0; lane < lanes; lane++) A[j][lane] = a->A[(c + lane) * n + j];
    }
    for (int64_t i = 0; i < a->t; i++) {
        const vf step = step_size(a, load(delta, first + i, c, lanes), bias, &slope);
        const vf input = step * load(u, first + i, c, lanes);
        for (int64_t j = 0; j < n; j++)
            h[(i + 1) * n + j] = exp2v(step * A[j] * LOG2_E) * h[i * n + j] + input * a->B[(first + i) * n + j];
    }
    for (int64_t i = a->t - 1; i >= 0; i--) {
        const float *B = a->B + (first + i) * n, *C = a->C + (first + i) * n;
        const vf step = step_size(a, load(delta, first + i, c, lanes), bias, &slope);
        const vf x = load(u, first + i, c, lanes), gate = load(z, first + i, c, lanes), open = sigmoid(gate);
        const vf grad_out = load(grad, first + i, c, lanes), grad_y = grad_out * gate * open;
        vf y = D * x, of_step = splat(0.0f), of_input = splat(0.0f);
        for (int64_t j = 0; j < n; j++) {
            const vf state = h[(i + 1) * n + j], grad_h = grad_y * C[j] + carried[j];
            y += state * C[j];
            lane_B[i * n + j] += grad_h * step * x;
            lane_C[i * n + j] += grad_y * state;
            of_input += grad_h * B[j];
            carried[j] = grad_h * exp2v(step * A[j] * LOG2_E);
            const vf of_exponent = carried[j] * h[i * n + j];
            grad_A[j] += of_exponent * step;
            of_step += of_exponent * A[j];
        }
        const vf of_given = (of_step + of_input * x) * slope;
        store(of(a->grad_u, a->e), first + i, c, lanes, grad_y * D + of_input * step);
        store(of(a->grad_delta, a->e), first + i, c, lanes, of_given);
        store(of(a->grad_z, a->e), first + i, c, lanes, grad_out * y * open * (1.0f + gate * (1.0f - open)));
        grad_D += grad_y * x;
        grad_bias += of_given;
    }
    store(of(a->grad_D, a->e), s, c, lanes, grad_D);
    if (a->bias) store(of(a->grad_bias, a->e), s, c, lanes, grad_bias);
    for (int64_t j = 0; j < n; j++)
        for (int lane = 0; lane < lanes; lane++) a->grad_A[(s * a->e + c + lane) * n + j] = grad_A[j][lane];
}

static void scan_grad_sequence(const scan_grad_args *a, int64_t s) {
    const int64_t size = a->t * a->n;
    vf *h = aligned_alloc(sizeof(vf), (3 * size + a->n) * sizeof(vf)), *lane_B = h + size + a->n, *lane_C = lane_B + size;
    if (!h) abort();
    memset(lane_B, 0, 2 * size * sizeof(vf));
    for (int64_t c = 0; c < a->e; c += VL) scan_grad_block(a, s, c, h, lane_B, lane_C);
    for (int64_t i = 0; i < size; i++) {
        a->grad_B[s * size + i] = sum_lanes(lane_B[i]);
        a->grad_C[s * size + i] = sum_lanes(lane_C[i]);
    }
    free(h);
}

void selective_scan_grad(const scan_grad_args *a) {
#pragma omp parallel for schedule(dynamic) num_threads(a->threads)
    for (int64_t s = 0; s < a->b; s++) scan_grad_sequence(a, s);
}
