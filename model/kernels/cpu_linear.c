/* Products of a few rows with a weight matrix that is read once: the decode step's shape.

   Each output is one dot product, summed in the same order whatever the number of rows or threads: a sequence gets the
   same bits alone and in a batch. Weights int8 with a float32 scale per output row, bf16 or float32. */
#include "cpu_linear.h"

#include <math.h>

enum { TILES_AHEAD = 2 }; /* fetched into the second cache while one is multiplied */

INLINE vf load_weights(const void *w, int64_t at, int64_t dtype, int lanes) {
    if (dtype != INT8) return load((rows){(void *)w, 0, dtype}, 0, at, lanes);
    int8_t bytes[VL] = {0};
    memcpy(bytes, (const int8_t *)w + at, lanes);
#ifdef __AVX512F__
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)bytes)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)bytes)));
#else
    vf x;
    for (int i = 0; i < VL; i++) x[i] = bytes[i];
    return x;
#endif
}

/* `num_rows` weight rows from `row` on, times `m` rows of x; both constant where this is inlined. */
INLINE void dot_tile(const linear *l, const float *x, float *y, int64_t ldy, int64_t row, const int num_rows,
                     const int m, const int64_t dtype) {
    const int64_t in = l->in, whole = in - in % VL;
    vf sums[num_rows * m];
#pragma GCC unroll 32
    for (int s = 0; s < num_rows * m; s++) sums[s] = splat(0.0f);
    for (int64_t i = 0; i < in; i += VL) {
        const int lanes = i < whole ? VL : (int)(in - i);
        if (lanes == VL) {
#pragma GCC unroll 8
            for (int r = 0; r < num_rows; r++) {
                vf w = load_weights(l->weight, (row + r) * in + i, dtype, VL);
#pragma GCC unroll 8
                for (int k = 0; k < m; k++) {
                    const vf column = (vf) * (const vf_any *)(x + k * in + i);
                    sums[r * m + k] = fma_vf(w, column, sums[r * m + k]);
                }
            }
        } else {
            for (int r = 0; r < num_rows; r++) {
                vf w = load_weights(l->weight, (row + r) * in + i, dtype, lanes);
                for (int k = 0; k < m; k++) {
                    const vf column = load((rows){(void *)x, in, FLOAT32}, k, i, lanes);
                    sums[r * m + k] = fma_vf(w, column, sums[r * m + k]);
                }
            }
        }
    }
    for (int r = 0; r < num_rows; r++) {
        const float scale = l->scale ? l->scale[row + r] : 1.0f;
        const float bias = l->bias.data ? get(l->bias.data, l->bias.dtype, row + r) : 0.0f;
        for (int k = 0; k < m; k++) y[k * ldy + row + r] = fmaf(sum_lanes(sums[r * m + k]), scale, bias);
    }
}

INLINE void dot_span(const linear *l, const float *x, float *y, int64_t ldy, int64_t first, int64_t last, const int m,
                     const int64_t dtype) {
    const int tile = m <= 4 ? 4 : 2;
    const int64_t bytes = tile * l->in * (dtype == INT8 ? 1 : dtype == BFLOAT16 ? 2 : 4);
    int64_t row = first;
    for (; row + tile <= last; row += tile) {
        const char *ahead = (const char *)l->weight + (row / tile + TILES_AHEAD) * bytes;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 1);
        dot_tile(l, x, y, ldy, row, tile, m, dtype);
    }
    for (; row < last; row++) dot_tile(l, x, y, ldy, row, 1, m, dtype);
}

INLINE void dot_rows(const linear *l, const float *x, int64_t m, float *y, int64_t ldy, int64_t first, int64_t last,
                     const int64_t dtype) {
    for (; m >= 8; m -= 8, x += 8 * l->in, y += 8 * ldy) dot_span(l, x, y, ldy, first, last, 8, dtype);
    switch (m) { /* each reads the weights once */
        case 7: dot_span(l, x, y, ldy, first, last, 7, dtype); break;
        case 6: dot_span(l, x, y, ldy, first, last, 6, dtype); break;
        case 5: dot_span(l, x, y, ldy, first, last, 5, dtype); break;
        case 4: dot_span(l, x, y, ldy, first, last, 4, dtype); break;
        case 3: dot_span(l, x, y, ldy, first, last, 3, dtype); break;
        case 2: dot_span(l, x, y, ldy, first, last, 2, dtype); break;
        case 1: dot_span(l, x, y, ldy, first, last, 1, dtype); break;
    }
}

void linear_span(const linear *l, const float *x, int64_t m, float *y, int64_t ldy, int64_t first, int64_t last) {
    if (l->dtype == PACKED || l->dtype == PACKED_INT4) packed_span(l, x, m, y, ldy, first, last);
    else if (l->dtype == INT8) dot_rows(l, x, m, y, ldy, first, last, INT8);
    else if (l->dtype == BFLOAT16) dot_rows(l, x, m, y, ldy, first, last, BFLOAT16);
    else dot_rows(l, x, m, y, ldy, first, last, FLOAT32);
}

void linear_share(const linear *l, const float *x, int64_t m, float *y, int64_t ldy) {
    const int64_t of = num_threads(), me = thread_index();
    linear_span(l, x, m, y, ldy, l->out * me / of, l->out * (me + 1) / of);
}

void copy_rows(rows to, rows from, int64_t m, int64_t columns) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < columns; c += VL) {
            const int lanes = columns - c < VL ? (int)(columns - c) : VL;
            store(to, i, c, lanes, load(from, i, c, lanes));
        }
}

/* out (m, out) = x (m, in) @ weight.T * scale + bias. */
void linear_few(const linear_args *a) {
    const int64_t m = a->m, in = a->linear.in, out = a->linear.out;
    float *x = malloc((size_t)(m * (in + out)) * sizeof *x), *y = x + m * in;
    copy_rows((rows){x, in, FLOAT32}, a->x, m, in);
#pragma omp parallel num_threads(a->threads) if (in * out > 16384)
    linear_share(&a->linear, x, m, y, out);
    copy_rows(a->y, (rows){y, out, FLOAT32}, m, out);
    free(x);
}

/* out = weight * scale, a row at a time: what oneDNN or MKL multiplies. */
void unpack_int8(const int8_t *weight, const float *scale, rows out, int64_t num_rows, int64_t in, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (num_rows * in > 16384)
    for (int64_t i = 0; i < num_rows; i++)
        for (int64_t c = 0; c < in; c += VL) {
            const int lanes = in - c < VL ? (int)(in - c) : VL;
            store(out, i, c, lanes, load_weights(weight, i * in + c, INT8, lanes) * scale[i]);
        }
}
