/* Half a layer for a few tokens in one call: norm, mixer or feed-forward, residual. The decode step's shape.

   Not a second definition: mamba_step is mamba.py's forward and feed_forward_step is moe.py's, with everything between
   the two residuals in float32. Threads own channels, so that only the matrix products need a barrier. */

#include "cpu_channels.h"
#include "cpu_linear.h"

typedef struct {
    rows x, out; /* (m, d) the residual stream, before and after */
    vec norm, conv_weight, conv_bias, dt_norm, b_norm, c_norm, A_log, D, dt_bias;
    linear in_proj, x_proj, dt_proj, out_proj; /* dt_proj without its bias */
    const int64_t *starts; /* (num_sequences + 1,) rows */
    void **conv_states, **ssm_states;
    void *conv_trail; /* as in conv_args and scan_args */
    float *ssm_trail;
    int64_t conv_state_dtype, num_sequences, m, d, e, n, r, w, threads;
    double eps;
} mamba_args;

typedef struct {
    linear gate, up, down;
} expert;

typedef struct {
    rows x, out;
    vec norm, router; /* router (num_experts, d); data NULL: one expert of weight 1 */
    const expert *experts;
    int64_t num_experts, top_k, m, d, f, threads;
    double eps;
} feed_forward_args;

static void norm_rows(rows x, vec weight, float *out, int64_t m, int64_t d, double eps) {
    for (int64_t k = 0; k < m; k++) norm_row(x, k, weight, (rows){out, d, FLOAT32}, k, d, eps);
}

/* This thread's share of `count` columns, in whole vectors. */
static void own_columns(int64_t count, int64_t *first, int64_t *last) {
    const int64_t blocks = (count + VL - 1) / VL, of = num_threads(), me = thread_index();
    *first = blocks * me / of * VL;
    *last = me + 1 == of ? count : blocks * (me + 1) / of * VL;
}

/* out = x + y; y (m, d) */
static void add_columns(rows out, rows x, const float *y, int64_t m, int64_t d, int64_t first, int64_t last) {
    for (int64_t k = 0; k < m; k++)
        for (int64_t c = first; c < last; c += VL) {
            const int lanes = last - c < VL ? (int)(last - c) : VL;
            store(out, k, c, lanes, load(x, k, c, lanes) + load((rows){(void *)y, d, FLOAT32}, k, c, lanes));
        }
}

/* out = x + mamba(norm(x)) for m tokens; advances the states, or leaves a trail of them. */
void mamba_step(const mamba_args *a) {
    const int64_t m = a->m, d = a->d, e = a->e, n = a->n, r = a->r, wide = r + 2 * n;
    float *scratch = malloc((size_t)m * (2 * d + 5 * e + (1 + a->threads) * wide) * sizeof *scratch);
    float *normed = scratch, *xz = normed + m * d, *u = xz + 2 * m * e, *delta = u + m * e, *y = delta + m * e;
    float *dt_B_C = y + m * e, *mixed = dt_B_C + m * wide, *per_thread = mixed + m * d;
    norm_rows(a->x, a->norm, normed, m, d, a->eps);
    const conv_args conv = {
        .x = {xz, 2 * e, FLOAT32}, .out = {u, e, FLOAT32}, .weight = a->conv_weight, .bias = a->conv_bias,
        .starts = a->starts, .states = a->conv_states, .trail = a->conv_trail,
        .state_dtype = a->conv_state_dtype, .num_sequences = a->num_sequences, .e = e, .w = a->w, .threads = 1,
    };
#pragma omp parallel num_threads(a->threads)
    {
        int64_t first, last;
        own_columns(e, &first, &last);
        linear_span(&a->in_proj, normed, m, xz, 2 * e, first, last);
        linear_span(&a->in_proj, normed, m, xz, 2 * e, e + first, e + last);
        for (int64_t i = 0; i < a->num_sequences; i++)
            for (int64_t c = first; c < last; c += VL) conv_block(&conv, i, c);
#pragma omp barrier
        linear_share(&a->x_proj, u, m, dt_B_C, wide);
#pragma omp barrier
        float *dt = per_thread + thread_index() * m * wide, *B = dt + m * r, *C = B + m * n;
        for (int64_t k = 0; k < m; k++) {
            float *row = dt_B_C + k * wide;
            norm_rows((rows){row, r, FLOAT32}, a->dt_norm, dt + k * r, 1, r, a->eps);
            norm_rows((rows){row + r, n, FLOAT32}, a->b_norm, B + k * n, 1, n, a->eps);
            norm_rows((rows){row + r + n, n, FLOAT32}, a->c_norm, C + k * n, 1, n, a->eps);
        }
        const scan_args scan = {
            .u = {u, e, FLOAT32}, .delta = {delta, e, FLOAT32}, .z = {xz + e, 2 * e, FLOAT32},
            .out = {y, e, FLOAT32}, .B = {B, n, FLOAT32}, .C = {C, n, FLOAT32}, .A = a->A_log, .A_is_log = 1,
            .D = a->D, .bias = a->dt_bias, .starts = a->starts, .states = (float **)a->ssm_states,
            .trail = a->ssm_trail, .num_sequences = a->num_sequences, .e = e, .n = n, .threads = 1,
        };
        linear_span(&a->dt_proj, dt, m, delta, e, first, last);
        for (int64_t i = 0; i < a->num_sequences; i++)
            for (int64_t c = first; c < last; c += VL) scan_block(&scan, i, c);
#pragma omp barrier
        own_columns(d, &first, &last);
        linear_span(&a->out_proj, y, m, mixed, d, first, last);
        add_columns(a->out, a->x, mixed, m, d, first, last);
    }
    free(scratch);
}

/* The top_k largest of softmax(router x), not renormalised; of equals the first. chosen, weights (top_k,). */
static void route(const feed_forward_args *a, const float *x, int64_t *chosen, float *weights) {
    const int64_t count = a->num_experts;
    float p[count], largest = -INFINITY, total = 0;
    linear router = {.weight = a->router.data, .dtype = a->router.dtype, .in = a->d, .out = count};
    linear_span(&router, x, 1, p, count, 0, count);
    for (int64_t i = 0; i < count; i++) largest = fmaxf(largest, p[i]);
    for (int64_t i = 0; i < count; i++) total += p[i] = expf(p[i] - largest);
    for (int64_t k = 0; k < a->top_k; k++) {
        int64_t best = 0;
        for (int64_t i = 1; i < count; i++)
            if (p[i] > p[best]) best = i;
        chosen[k] = best, weights[k] = p[best] / total;
        p[best] = -1;
    }
}

/* out = x + feed_forward(norm(x)) for m rows. Each expert's weights are read once, for all rows that chose it. */
void feed_forward_step(const feed_forward_args *a) {
    const int64_t m = a->m, d = a->d, f = a->f, k = a->router.data ? a->top_k : 1, total = m * k;
    float *scratch = malloc((size_t)(m * 2 * d + total * (2 * d + 2 * f + 1)) * sizeof *scratch);
    float *normed = scratch, *sum = normed + m * d, *x = sum + m * d, *gate = x + total * d, *up = gate + total * f;
    float *y = up + total * f, *weights = y + total * d;
    int64_t chosen[total], starts[a->num_experts + 1], slots[total]; /* slots: a choice's row among those by expert */
    norm_rows(a->x, a->norm, normed, m, d, a->eps);
    for (int64_t i = 0; i < m; i++) {
        chosen[i * k] = 0, weights[i * k] = 1;
        if (a->router.data) route(a, normed + i * d, chosen + i * k, weights + i * k);
    }
    int64_t filled = 0;
    for (int64_t j = 0; j < a->num_experts; j++) {
        starts[j] = filled;
        for (int64_t i = 0; i < total; i++)
            if (chosen[i] == j) {
                memcpy(x + filled * d, normed + i / k * d, d * sizeof *x);
                slots[i] = filled++;
            }
    }
    starts[a->num_experts] = filled;
#pragma omp parallel num_threads(a->threads)
    {
        int64_t first, last;
        own_columns(f, &first, &last);
        for (int64_t j = 0; j < a->num_experts; j++) {
            const int64_t at = starts[j], count = starts[j + 1] - at;
            linear_span(&a->experts[j].gate, x + at * d, count, gate + at * f, f, first, last);
            linear_span(&a->experts[j].up, x + at * d, count, up + at * f, f, first, last);
        }
        for (int64_t i = 0; i < total; i++)
            for (int64_t c = first; c < last; c += VL) {
                const int lanes = last - c < VL ? (int)(last - c) : VL;
                rows g = {gate, f, FLOAT32}, u = {up, f, FLOAT32};
                store(g, i, c, lanes, silu(load(g, i, c, lanes)) * load(u, i, c, lanes));
            }
#pragma omp barrier
        own_columns(d, &first, &last);
        for (int64_t j = 0; j < a->num_experts; j++) {
            const int64_t at = starts[j], count = starts[j + 1] - at;
            linear_span(&a->experts[j].down, gate + at * f, count, y + at * d, d, first, last);
        }
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = first; c < last; c += VL) {
                const int lanes = last - c < VL ? (int)(last - c) : VL;
                vf total = splat(0.0f);
                for (int64_t s = i * k; s < (i + 1) * k; s++)
                    total = fma_vf(splat(weights[s]), load((rows){y, d, FLOAT32}, slots[s], c, lanes), total);
                store((rows){sum, d, FLOAT32}, i, c, lanes, total);
            }
        add_columns(a->out, a->x, sum, m, d, first, last);
    }
    free(scratch);
}
