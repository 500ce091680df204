/* What stands between the matrix products, row by row in one pass: RMS norm, and SiLU(gate) * up. */
#include "cpu.h"

typedef struct {
    rows x, out; /* (m, d) */
    vec weight;  /* (d,) */
    int64_t m, d, threads;
    double eps;
} norm_args;

/* out = x / sqrt(mean(x^2) + eps) * weight */
void rms_norm_rows(const norm_args *a) {
#pragma omp parallel for num_threads(a->threads) if (a->m * a->d > 16384)
    for (int64_t i = 0; i < a->m; i++) norm_row(a->x, i, a->weight, a->out, i, a->d, a->eps);
}

typedef struct {
    rows gate, up, out; /* (m, f) */
    int64_t m, f, threads;
} gate_args;

/* out = silu(gate) * up */
void gate_rows(const gate_args *a) {
#pragma omp parallel for num_threads(a->threads) if (a->m * a->f > 16384)
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t c = 0; c < a->f; c += VL) {
            const int lanes = a->f - c < VL ? (int)(a->f - c) : VL;
            store(a->out, i, c, lanes, silu(load(a->gate, i, c, lanes)) * load(a->up, i, c, lanes));
        }
}
