/* Selective scan and causal convolution over channels: VL channels at a time, tokens in order.

   Sequences of different lengths lie one after another in the rows of a matrix; `starts` says where. Each keeps its own
   state. A channel's arithmetic depends on neither the number of tokens of the call nor on its neighbours: cutting a
   sequence over several calls gives the same bits. The definition is `_ref` in selective_scan.py and causal_conv.py. */
#include "cpu_channels.h"

enum { AHEAD = 8 }; /* tokens to prefetch, a cache line of each input */

/* (lanes, n) row-major at `matrix` <-> n vectors over lanes */
INLINE void load_transposed(vf *v, vec matrix, int64_t at, int64_t n, int lanes) {
    for (int64_t j = 0; j < n; j++) {
        v[j] = splat(0.0f);
        for (int lane = 0; lane < lanes; lane++) v[j][lane] = get(matrix.data, matrix.dtype, at + lane * n + j);
    }
}

INLINE void store_transposed(float *matrix, const vf *v, int64_t n, int lanes) {
    for (int64_t j = 0; j < n; j++)
        for (int lane = 0; lane < lanes; lane++) matrix[lane * n + j] = v[j][lane];
}

INLINE void prefetch(rows m, int64_t i, int64_t c) {
    const char *row = (const char *)m.data + (i * m.stride + c) * (m.dtype == FLOAT32 ? 4 : 2);
    __builtin_prefetch(row, 0, 2);
}

/* Tokens first..last of one sequence for the channels c..c + lanes; h[n] is the state. */
INLINE void scan_tokens(const scan_args *a, int64_t first, int64_t last, int64_t c, int lanes, const vf *A2, vf *h,
                        const int n) {
    const vf D = load_vec(a->D, c, lanes), bias = a->bias.data ? load_vec(a->bias, c, lanes) : splat(0.0f);
    for (int64_t i = first; i < last; i++) {
        if (i + AHEAD < last) {
            prefetch(a->u, i + AHEAD, c);
            prefetch(a->delta, i + AHEAD, c);
            prefetch(a->z, i + AHEAD, c);
        }
        vf delta = load(a->delta, i, c, lanes), u = load(a->u, i, c, lanes);
        if (a->bias.data) delta = softplus(delta + bias);
        const vf delta_u = delta * u;
        const float *B = (const float *)a->B.data + i * a->B.stride, *C = (const float *)a->C.data + i * a->C.stride;
        vf y[4] = {D * u};
#pragma GCC unroll 16
        for (int j = 0; j < n; j++) {
            h[j] = exp2v(delta * A2[j]) * h[j] + delta_u * B[j];
            y[j & 3] += h[j] * C[j];
        }
        vf total = (y[0] + y[1]) + (y[2] + y[3]);
        store(a->out, i, c, lanes, total * silu(load(a->z, i, c, lanes)));
        if (a->trail) store_transposed(a->trail + (i * a->e + c) * n, h, n, lanes);
    }
}

void scan_block(const scan_args *a, int64_t sequence, int64_t c) {
    const int64_t first = a->starts[sequence], last = a->starts[sequence + 1], n = a->n;
    const int lanes = a->e - c < VL ? (int)(a->e - c) : VL;
    float *state = a->states[sequence] + c * n;
    vf A2[n], h[n];
    load_transposed(A2, a->A, c * n, n, lanes);
    for (int64_t j = 0; j < n; j++) A2[j] = (a->A_is_log ? -exp2v(A2[j] * LOG2_E) : A2[j]) * LOG2_E;
    load_transposed(h, (vec){state, FLOAT32}, 0, n, lanes);
    if (n == 16 && lanes == VL) {
        vf h16[16];
        memcpy(h16, h, sizeof h16);
        scan_tokens(a, first, last, c, VL, A2, h16, 16);
        memcpy(h, h16, sizeof h16);
    } else {
        scan_tokens(a, first, last, c, lanes, A2, h, (int)n);
    }
    if (!a->trail) store_transposed(state, h, n, lanes);
}

/* y = (C . h + D u) * silu(z), h = exp(delta A) h + delta u B. */
void selective_scan(const scan_args *a) {
    const int64_t blocks = (a->e + VL - 1) / VL, tasks = a->num_sequences * blocks;
    const int64_t tokens = a->starts[a->num_sequences] - a->starts[0];
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) if (tokens * blocks > 128)
    for (int64_t task = 0; task < tasks; task++) scan_block(a, task / blocks, task % blocks * VL);
}

/* The first w - 1 inputs of the window, in the state's dtype. */
INLINE void store_window(const conv_args *a, void *to, int64_t channel, int lanes, const vf *window, const int w) {
    for (int lane = 0; lane < lanes; lane++)
        for (int k = 0; k < w - 1; k++) put(to, a->state_dtype, (channel + lane) * (w - 1) + k, window[k][lane]);
}

INLINE void conv_tokens(const conv_args *a, int64_t first, int64_t last, int64_t c, int lanes, const vf *taps, vf bias,
                        vf *window, const int w) {
    for (int64_t i = first; i < last; i++) {
        if (i + AHEAD < last) prefetch(a->x, i + AHEAD, c);
        window[w - 1] = load(a->x, i, c, lanes);
        vf y = bias;
#pragma GCC unroll 4
        for (int k = 0; k < w; k++) y += window[k] * taps[k];
        store(a->out, i, c, lanes, silu(y));
        if (a->state_dtype == BFLOAT16) window[w - 1] = from_bf16(to_bf16(window[w - 1])); /* as the next call sees it */
#pragma GCC unroll 4
        for (int k = 1; k < w; k++) window[k - 1] = window[k];
        if (a->trail) store_window(a, a->trail, i * a->e + c, lanes, window, w);
    }
}

void conv_block(const conv_args *a, int64_t sequence, int64_t c) {
    const int64_t first = a->starts[sequence], last = a->starts[sequence + 1];
    const int lanes = a->e - c < VL ? (int)(a->e - c) : VL, w = (int)a->w;
    vf taps[w], window[w], bias = a->bias.data ? load_vec(a->bias, c, lanes) : splat(0.0f);
    for (int k = 0; k < w; k++) taps[k] = window[k] = splat(0.0f);
    for (int lane = 0; lane < lanes; lane++) {
        const int64_t channel = c + lane;
        for (int k = 0; k < w; k++) taps[k][lane] = get(a->weight.data, a->weight.dtype, channel * w + k);
        for (int k = 0; k < w - 1; k++)
            window[k][lane] = get(a->states[sequence], a->state_dtype, channel * (w - 1) + k);
    }
    if (w == 4 && lanes == VL) {
        vf window4[4] = {window[0], window[1], window[2]};
        conv_tokens(a, first, last, c, VL, taps, bias, window4, 4);
        memcpy(window, window4, sizeof window4);
    } else {
        conv_tokens(a, first, last, c, lanes, taps, bias, window, w);
    }
    if (!a->trail) store_window(a, a->states[sequence], c, lanes, window, w);
}

/* silu(causal depthwise convolution + bias). */
void causal_conv(const conv_args *a) {
    const int64_t blocks = (a->e + VL - 1) / VL, tasks = a->num_sequences * blocks;
    const int64_t tokens = a->starts[a->num_sequences] - a->starts[0];
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) if (tokens * blocks > 512)
    for (int64_t task = 0; task < tasks; task++) conv_block(a, task / blocks, task % blocks * VL);
}

/* 2^x, silu(x) or softplus(x) alone, so that tests can hold them against float64. */
void apply_elementwise(const float *x, float *out, int64_t count, int64_t which) {
    for (int64_t i = 0; i < count; i += VL) {
        const int lanes = count - i < VL ? (int)(count - i) : VL;
        rows in_row = {(void *)x, 0, FLOAT32}, out_row = {out, 0, FLOAT32};
        vf v = load(in_row, 0, i, lanes);
        store(out_row, 0, i, lanes, which == 0 ? exp2v(v) : which == 1 ? silu(v) : softplus(v));
    }
}
