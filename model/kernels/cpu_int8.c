/* Products of many rows with a matrix of int8 weights in which the rows are rounded to int8, too: the prefill's shape.

   Each GROUP columns of a row have a scale of their own, so that a value forty times the others costs only its neighbours
   their precision. Sums within a group are exact, and added up in the same order whatever the number of rows or threads:
   a row has the same bits in any company. Few rows, whose weights are what takes time: cpu_linear.c. */
#include "cpu_linear.h"

#include <math.h>

enum {
    GROUP = 64, /* columns of a row that share a scale */
    TILE = 6,   /* rows multiplied at a time, and */
    PANEL = 2 * VL, /* outputs: what the registers hold the sums of */
    SHARES = 4, /* pieces of the work a thread, at least: they are taken as threads get free */
};

typedef int8_t vb __attribute__((vector_size(VL)));
typedef vi vi_any __attribute__((aligned(1), may_alias));

/* sums[i] += the products of the 4 bytes of weights[i] with the 4 of `x`, added up. Where the processor takes unsigned
   bytes on one side, weights are kept with OFFSET added, and sums begin at what that adds. */
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
enum { OFFSET = 128 };
INLINE vi dot4(vi sums, vi weights, int32_t x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(x));
}
#elif defined(__AVXVNNI__)
enum { OFFSET = 128 };
INLINE vi dot4(vi sums, vi weights, int32_t x) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, _mm256_set1_epi32(x));
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
enum { OFFSET = 0 };
INLINE vi dot4(vi sums, vi weights, int32_t x) {
    return (vi)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}
#else
#define NO_DOT4
enum { OFFSET = 0 };
INLINE vi dot4(vi sums, vi weights, int32_t x) {
    for (int byte = 0; byte < 4; byte++) {
        const vi shifted = weights << (24 - 8 * byte);
        sums += (shifted >> 24) * ((int32_t)((uint32_t)x << (24 - 8 * byte)) >> 24);
    }
    return sums;
}
#endif

INLINE float max_lanes(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < VL; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

/* Whether this is the fastest way here: with AMX, oneDNN multiplies bf16 faster than this int8. */
int linear_int8_pays(void) {
#if defined(NO_DOT4) || defined(__AMX_BF16__)
    return 0;
#else
    return 1;
#endif
}

/* Rows rounded to int8, group by group; columns beyond the last are 0. */
typedef struct {
    int8_t *values; /* (m, groups, GROUP) */
    float *scales;  /* (m, groups) */
    int32_t *bases; /* (m, groups): what a sum begins with */
    int64_t groups;
} rounded;

INLINE void round_group(rows x, int64_t row, int64_t first, int64_t in, int8_t *values, float *scale, int32_t *base) {
    vf columns[GROUP / VL], largest = splat(0.0f), strange = splat(0.0f); /* NaN where a value is, or infinite */
    for (int i = 0; i < GROUP / VL; i++) {
        const int64_t at = first + i * VL, left = in - at;
        columns[i] = left >= VL ? load(x, row, at, VL) : left > 0 ? load(x, row, at, (int)left) : splat(0.0f);
        const vf magnitude = (vf)((vi)columns[i] & 0x7fffffff);
        largest = select_vf(magnitude > largest, magnitude, largest);
        strange += columns[i] * 0.0f;
    }
    const float most = fmaxf(max_lanes(largest), 1e-30f), steps = 127.0f / most;
    vi total = {0};
    for (int i = 0; i < GROUP / VL; i++) {
        const vf nearest = (columns[i] * steps + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: to even where halfway */
        const vi whole = __builtin_convertvector(nearest, vi);
        const vb bytes = __builtin_convertvector(whole, vb);
        memcpy(values + i * VL, &bytes, VL);
        total += whole;
    }
    *scale = most / 127.0f + sum_lanes(strange);
    *base = OFFSET ? -OFFSET * (int32_t)sum_lanes(__builtin_convertvector(total, vf)) : 0; /* far below 2^24 */
}

/* PANEL rows of the weight from `first` on, as (in / 4, PANEL, 4) bytes; rows and columns that are not there are 0. */
INLINE void pack_panel(const linear *l, int64_t first, int64_t in, uint32_t *panel) {
    const int8_t *weight = l->weight;
    for (int lane = 0; lane < PANEL; lane++) {
        const int64_t there = first + lane < l->out ? l->in : 0, whole = there / 4;
        const int8_t *row = weight + (first + lane) * l->in;
        for (int64_t i = 0; i < in / 4; i++) {
            uint32_t bytes = 0;
            if (i < whole) memcpy(&bytes, row + 4 * i, 4);
            else if (4 * i < there) memcpy(&bytes, row + 4 * i, there - 4 * i);
            panel[i * PANEL + lane] = OFFSET ? bytes ^ 0x80808080u : bytes;
        }
    }
}

/* `m` rows of x (constant where this is inlined) times a panel. */
INLINE void multiply_tile(const linear_args *a, rounded x, int64_t row, const int m, int64_t first, const uint32_t *panel) {
    vf totals[TILE][2];
    for (int r = 0; r < m; r++) totals[r][0] = totals[r][1] = splat(0.0f);
    for (int64_t group = 0; group < x.groups; group++) {
        const int8_t *columns = x.values + (row * x.groups + group) * GROUP;
        const uint32_t *weights = panel + group * (GROUP / 4) * PANEL;
        vi sums[TILE][2];
        for (int r = 0; r < m; r++) sums[r][0] = sums[r][1] = (vi){0} + x.bases[(row + r) * x.groups + group];
#pragma GCC unroll 2
        for (int i = 0; i < GROUP / 4; i++) {
            const vi left = *(const vi_any *)(weights + i * PANEL), right = *(const vi_any *)(weights + i * PANEL + VL);
#pragma GCC unroll 8
            for (int r = 0; r < m; r++) {
                int32_t four;
                memcpy(&four, columns + r * x.groups * GROUP + 4 * i, 4);
                sums[r][0] = dot4(sums[r][0], left, four);
                sums[r][1] = dot4(sums[r][1], right, four);
            }
        }
        for (int r = 0; r < m; r++) {
            const vf scale = splat(x.scales[(row + r) * x.groups + group]);
            for (int half = 0; half < 2; half++)
                totals[r][half] = fma_vf(__builtin_convertvector(sums[r][half], vf), scale, totals[r][half]);
        }
    }
    const linear *l = &a->linear;
    for (int half = 0; half < 2; half++) {
        const int64_t column = first + half * VL, left = l->out - column;
        if (left <= 0) break;
        const int lanes = left < VL ? (int)left : VL;
        const vf scale = load_vec((vec){l->scale, FLOAT32}, column, lanes);
        const vf bias = l->bias.data ? load_vec(l->bias, column, lanes) : splat(0.0f);
        for (int r = 0; r < m; r++) store(a->y, row + r, column, lanes, fma_vf(totals[r][half], scale, bias));
    }
}

INLINE void multiply_rows(const linear_args *a, rounded x, int64_t row, int64_t last, int64_t first, const uint32_t *panel) {
    for (; row + TILE <= last; row += TILE) multiply_tile(a, x, row, TILE, first, panel);
    for (; row < last; row++) multiply_tile(a, x, row, 1, first, panel);
}

/* y (m, out) = round(x) (m, in) @ weight.T * scale + bias, the weight int8. */
void linear_int8(const linear_args *a) {
    const int64_t m = a->m, groups = (a->linear.in + GROUP - 1) / GROUP, in = groups * GROUP;
    const int64_t panels = (a->linear.out + PANEL - 1) / PANEL, wanted = (SHARES * a->threads + panels - 1) / panels;
    const int64_t block = (m + wanted - 1) / wanted, blocks = (m + block - 1) / block; /* of rows, with a packed panel */
    rounded x = {malloc(m * in), malloc(m * groups * sizeof(float)), malloc(m * groups * sizeof(int32_t)), groups};
#pragma omp parallel num_threads(a->threads)
    {
        uint32_t *panel = aligned_alloc(64, PANEL * in);
#pragma omp for
        for (int64_t row = 0; row < m; row++)
            for (int64_t group = 0; group < groups; group++) {
                const int64_t at = row * groups + group;
                round_group(a->x, row, group * GROUP, a->linear.in, x.values + at * GROUP, x.scales + at, x.bases + at);
            }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * blocks; task++) {
            const int64_t first = task / blocks * PANEL, row = task % blocks * block;
            pack_panel(&a->linear, first, in, panel);
            multiply_rows(a, x, row, row + block < m ? row + block : m, first, panel);
        }
        free(panel);
    }
    free(x.values);
    free(x.scales);
    free(x.bases);
}
