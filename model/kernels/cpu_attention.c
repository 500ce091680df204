/* Causal grouped-query attention of a few tokens to all before them: the decode step's shape.

   Keys come in blocks whose borders do not depend on the call, each row of queries is summed by itself, and blocks in
   order: a token gets the same bits alone, among others and with any number of threads. */
#include <math.h>

#include "cpu_linear.h"

enum { BLOCK = 256, TOGETHER = 4 }; /* keys of a block; rows that share a reading of the values */

typedef struct {
    rows q, out;                 /* (m, h * p) */
    const int64_t *starts;       /* (num_sequences + 1,) rows */
    const int64_t *pasts;        /* (num_sequences,) keys before those of the rows themselves */
    const void **keys, **values; /* num_sequences times (past + rows, g, p) without gaps */
    int64_t kv_dtype, num_sequences, h, g, p, threads;
} attention_args;

#if VL == 16
#define EVEN {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}
#elif VL == 8
#define EVEN {0, 2, 4, 6, 8, 10, 12, 14}
#else
#define EVEN {0, 2, 4, 6}
#endif

/* Sums of neighbouring lanes: of a, then of b. */
INLINE vf pair_sums(vf a, vf b) {
    const vi even = EVEN, odd = even + 1;
#if defined(__AVX512F__)
    return (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)even, (__m512)b) +
           (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)odd, (__m512)b);
#elif defined(__clang__)
    vf low, high;
    for (int i = 0; i < VL; i++) {
        low[i] = even[i] < VL ? a[even[i]] : b[even[i] - VL];
        high[i] = odd[i] < VL ? a[odd[i]] : b[odd[i] - VL];
    }
    return low + high;
#else
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

/* q (p,) times `count` keys, a lane each; lanes beyond are 0. */
INLINE vf score(const float *q, rows keys, int64_t first, int64_t column, const int count, int64_t p) {
    vf sums[VL];
#pragma GCC unroll 16
    for (int k = 0; k < VL; k++) sums[k] = splat(0.0f);
    for (int64_t c = 0; c < p; c += VL) {
        const int lanes = p - c < VL ? (int)(p - c) : VL;
        const vf of_q = load((rows){(void *)q, 0, FLOAT32}, 0, c, lanes);
#pragma GCC unroll 16
        for (int k = 0; k < count; k++) sums[k] = fma_vf(of_q, load(keys, first + k, column + c, lanes), sums[k]);
    }
#pragma GCC unroll 4
    for (int left = VL / 2; left; left /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < left; k++) sums[k] = pair_sums(sums[2 * k], sums[2 * k + 1]);
    return sums[0];
}

/* scores (count,) -> 2^(score - largest), 0 up to the next whole vector. */
static void weigh(float *scores, int64_t count, float *largest, float *total) {
    rows row = {scores, 0, FLOAT32};
    vf sum = splat(0.0f), high = splat(scores[0]);
    int64_t whole = 0;
    for (; whole + VL <= count; whole += VL) {
        const vf x = load(row, 0, whole, VL);
        high = select_vf(x > high, x, high);
    }
    *largest = high[0];
    for (int i = 1; i < VL; i++) *largest = fmaxf(*largest, high[i]);
    for (int64_t k = whole; k < count; k++) *largest = fmaxf(*largest, scores[k]);
    for (int64_t k = 0; k < count; k += VL) {
        const int lanes = count - k < VL ? (int)(count - k) : VL;
        vf weight = exp2v(load(row, 0, k, VL) - *largest);
        for (int i = lanes; i < VL; i++) weight[i] = 0;
        store(row, 0, k, VL, weight);
        sum += weight;
    }
    *total = sum_lanes(sum);
}

/* Columns c..c + v vectors of add_values. */
INLINE void add_columns(float *const *weights, rows values, int64_t first, int64_t column, int64_t count,
                        float *const *sums, int64_t c, int lanes, const int n, const int v) {
    vf sum[n * v];
#pragma GCC unroll 8
    for (int i = 0; i < n * v; i++) sum[i] = splat(0.0f);
    for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 2
        for (int j = 0; j < v; j++) {
            const vf value = load(values, first + k, column + c + j * VL, lanes);
#pragma GCC unroll 4
            for (int r = 0; r < n; r++) sum[r * v + j] = fma_vf(value, splat(weights[r][k]), sum[r * v + j]);
        }
    for (int r = 0; r < n; r++)
        for (int j = 0; j < v; j++) store((rows){sums[r], 0, FLOAT32}, 0, c + j * VL, lanes, sum[r * v + j]);
}

/* sums[r] (p,) = weights[r] (count,) times values, for n rows. */
INLINE void add_values(float *const *weights, rows values, int64_t first, int64_t column, int64_t count,
                       float *const *sums, int64_t p, const int n) {
    int64_t c = 0;
    for (; c + 2 * VL <= p; c += 2 * VL) add_columns(weights, values, first, column, count, sums, c, VL, n, 2);
    for (; c < p; c += VL)
        add_columns(weights, values, first, column, count, sums, c, p - c < VL ? (int)(p - c) : VL, n, 1);
}

/* One block of keys of one KV head for all rows of sequence s. parts (rows, h, blocks, 2 + p): largest, total, sums. */
INLINE void attend_block(const attention_args *a, const float *q, float *parts, int64_t blocks, int64_t s, int64_t head,
                         int64_t block, const int64_t dtype) {
    const int64_t heads = a->h / a->g, p = a->p, column = head * p, begin = block * BLOCK, first = a->starts[s];
    const int64_t end = a->pasts[s] + a->starts[s + 1] - first; /* of the last row's keys */
    const int64_t all = (end < begin + BLOCK ? end : begin + BLOCK) - begin;
    const int64_t num_rows = (a->starts[s + 1] - first) * heads;
    const rows keys = {(void *)a->keys[s], a->g * p, dtype}, values = {(void *)a->values[s], a->g * p, dtype};
    float *scores = calloc(num_rows * BLOCK, sizeof *scores), *weights[TOGETHER], *sums[TOGETHER];
    for (int64_t k = 0; k < all; k += VL)
        for (int64_t r = 0; r < num_rows; r++) {
            const int64_t i = r / heads, visible = a->pasts[s] + i + 1 - begin - k;
            const float *of_row = q + ((first + i) * a->h + head * heads + r % heads) * p;
            if (visible <= 0) continue;
            vf out = visible < VL ? score(of_row, keys, begin + k, column, (int)visible, p)
                                  : score(of_row, keys, begin + k, column, VL, p);
            store((rows){scores, BLOCK, FLOAT32}, r, k, VL, out);
        }
    for (int64_t r = 0, n = 0; r < num_rows; r++) {
        const int64_t i = r / heads, visible = a->pasts[s] + i + 1 - begin, count = visible < BLOCK ? visible : BLOCK;
        if (count <= 0) continue;
        float *part = parts + (((first + i) * a->h + head * heads + r % heads) * blocks + block) * (2 + p);
        weigh(scores + r * BLOCK, count, part, part + 1);
        weights[n] = scores + r * BLOCK, sums[n++] = part + 2;
        if (n < TOGETHER && r + 1 < num_rows) continue;
        if (n == 4) add_values(weights, values, begin, column, all, sums, p, 4);
        if (n == 3) add_values(weights, values, begin, column, all, sums, p, 3);
        if (n == 2) add_values(weights, values, begin, column, all, sums, p, 2);
        if (n == 1) add_values(weights, values, begin, column, all, sums, p, 1);
        n = 0;
    }
    free(scores);
}

/* Blocks 0.. of one row and head, in order -> out (p,) */
static void merge_blocks(const float *parts, int64_t count, int64_t p, rows out, int64_t row, int64_t column) {
    float largest = parts[0], total = 0;
    for (int64_t b = 1; b < count; b++) largest = fmaxf(largest, parts[b * (2 + p)]);
    for (int64_t b = 0; b < count; b++) total += parts[b * (2 + p) + 1] * exp2v(splat(parts[b * (2 + p)] - largest))[0];
    for (int64_t c = 0; c < p; c += VL) {
        const int lanes = p - c < VL ? (int)(p - c) : VL;
        vf sum = splat(0.0f);
        for (int64_t b = 0; b < count; b++) {
            const vf of_block = load((rows){(void *)(parts + b * (2 + p) + 2), 0, FLOAT32}, 0, c, lanes);
            sum += of_block * exp2v(splat(parts[b * (2 + p)] - largest));
        }
        store(out, row, column + c, lanes, sum / total);
    }
}

void attention_step(const attention_args *a) {
    const int64_t m = a->starts[a->num_sequences], h = a->h, p = a->p;
    int64_t blocks = 0;
    for (int64_t s = 0; s < a->num_sequences; s++) {
        const int64_t own = (a->pasts[s] + a->starts[s + 1] - a->starts[s] + BLOCK - 1) / BLOCK;
        blocks = own > blocks ? own : blocks;
    }
    float *q = malloc((size_t)(m * h) * (p + blocks * (2 + p)) * sizeof *q), *parts = q + m * h * p;
    const float scale = LOG2_E / sqrtf((float)p);
    for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < h * p; c++) q[i * h * p + c] = scale * get(a->q.data, a->q.dtype, i * a->q.stride + c);
#pragma omp parallel num_threads(a->threads)
    {
        for (int64_t s = 0; s < a->num_sequences; s++) {
            const int64_t own = (a->pasts[s] + a->starts[s + 1] - a->starts[s] + BLOCK - 1) / BLOCK;
#pragma omp for collapse(2) nowait
            for (int64_t head = 0; head < a->g; head++)
                for (int64_t block = 0; block < own; block++) {
                    if (a->kv_dtype == BFLOAT16) attend_block(a, q, parts, blocks, s, head, block, BFLOAT16);
                    else attend_block(a, q, parts, blocks, s, head, block, FLOAT32);
                }
        }
#pragma omp barrier
        for (int64_t s = 0; s < a->num_sequences; s++)
#pragma omp for collapse(2) nowait
            for (int64_t i = a->starts[s]; i < a->starts[s + 1]; i++)
                for (int64_t head = 0; head < h; head++) {
                    const int64_t seen = a->pasts[s] + i - a->starts[s] + 1;
                    const float *of_row = parts + (i * h + head) * blocks * (2 + p);
                    merge_blocks(of_row, (seen + BLOCK - 1) / BLOCK, p, a->out, i, head * p);
                }
    }
    free(q);
}
