/* A linear layer with few input rows, and the parts of it that one thread of a team does. See cpu_linear.c. */
#pragma once
#include "cpu.h"
#ifdef _OPENMP
#include <omp.h>
INLINE int num_threads(void) { return omp_get_num_threads(); }
INLINE int thread_index(void) { return omp_get_thread_num(); }
#else
INLINE int num_threads(void) { return 1; }
INLINE int thread_index(void) { return 0; }
#endif

typedef struct {
    const void *weight; /* (out, in), or what pack_int8 or pack_int4 made of more rows: these are those from `first` on */
    const float *scale; /* (out,), or NULL: 1 */
    vec bias;           /* (out,), or NULL: 0 */
    int64_t dtype, in, out, first;
} linear;

typedef struct {
    rows x, y;
    linear linear;
    int64_t m, threads;
} linear_args;

/* y[k * ldy + row] for rows first..last of the weight and k < m; x is (m, in) without gaps. */
void linear_span(const linear *l, const float *x, int64_t m, float *y, int64_t ldy, int64_t first, int64_t last);
/* As linear_span, of a packed weight; x is rounded to int8. See cpu_int8.c. */
void packed_span(const linear *l, const float *x, int64_t m, float *y, int64_t ldy, int64_t first, int64_t last);
/* The calling thread's part of all rows. */
void linear_share(const linear *l, const float *x, int64_t m, float *y, int64_t ldy);
/* Between float32 and bf16. */
void copy_rows(rows to, rows from, int64_t m, int64_t columns);
