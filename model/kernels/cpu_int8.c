/* Products of rows that are rounded to int8 when they come with weights of int8 or int4, packed once.

   Each GROUP columns of a row have a scale of their own, so that a value forty times the others costs only its neighbours
   their precision. Sums within a group are exact, and added up in the same order whatever the number of rows or threads:
   a row has the same bits in any company. int4 is what int4.py stores, whose groups have scales of their own as well.
   Weights that stay as they are and rows that are not rounded: cpu_linear.c. */
#include "cpu_linear.h"

#include <math.h>

enum {
    GROUP = 64, /* columns of a row that share a scale */
    TILE = 6,   /* rows multiplied at a time, with two panels: what the registers hold the sums of */
    SHARES = 4, /* pieces of many rows' work a thread, at least: they are taken as threads get free */
};

#define INT4_BYTES (GROUP * VL + 2 * VL * 4) /* of 2 * VL rows of a group, and their scales */

typedef int8_t vb __attribute__((vector_size(VL)));
typedef vi vi_any __attribute__((aligned(1), may_alias));

/* sums[i] += the products of the 4 bytes of weights[i] with the 4 of `x`, added up. Where the processor takes unsigned
   bytes on one side, int8 weights are kept with OFFSET added, and sums begin at what that adds. */
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

/* Whether this is the fastest way here: with AMX, oneDNN multiplies bf16 faster than this int8. */
int packing_pays(void) {
#if defined(NO_DOT4) || defined(__AMX_BF16__)
    return 0;
#else
    return 1;
#endif
}

/* Rows rounded to int8, group by group; columns beyond the last are 0. */
typedef struct {
    int8_t *values;  /* (m, groups, GROUP) */
    float *scales;   /* (m, groups) */
    int32_t *totals; /* (m, groups), of the values */
    int64_t groups;
} rounded;

static rounded new_rounded(int64_t m, int64_t in) {
    const int64_t groups = (in + GROUP - 1) / GROUP;
    float *scales = malloc((size_t)(m * groups) * (sizeof(float) + sizeof(int32_t) + GROUP));
    int32_t *totals = (int32_t *)(scales + m * groups);
    return (rounded){(int8_t *)(totals + m * groups), scales, totals, groups};
}

INLINE void round_group(rows x, int64_t row, int64_t first, int64_t in, int8_t *values, float *scale, int32_t *total) {
    vf columns[GROUP / VL], largest = splat(0.0f), strange = splat(0.0f); /* NaN where a value is, or infinite */
    for (int i = 0; i < GROUP / VL; i++) {
        const int64_t at = first + i * VL, left = in - at;
        columns[i] = left >= VL ? load(x, row, at, VL) : left > 0 ? load(x, row, at, (int)left) : splat(0.0f);
        const vf magnitude = (vf)((vi)columns[i] & 0x7fffffff);
        largest = select_vf(magnitude > largest, magnitude, largest);
        strange += columns[i] * 0.0f;
    }
    const float most = fmaxf(max_lanes(largest), 1e-30f), steps = 127.0f / most;
    vi sum = {0};
    for (int i = 0; i < GROUP / VL; i++) {
        const vf nearest = (columns[i] * steps + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: to even where halfway */
        const vi whole = __builtin_convertvector(nearest, vi);
        const vb bytes = __builtin_convertvector(whole, vb);
        memcpy(values + i * VL, &bytes, VL);
        sum += whole;
    }
    *scale = most / 127.0f + sum_lanes(strange);
    *total = (int32_t)sum_lanes(__builtin_convertvector(sum, vf)); /* far below 2^24 */
}

static void round_row(rounded to, rows x, int64_t row, int64_t in) {
    for (int64_t group = 0; group < to.groups; group++) {
        const int64_t at = row * to.groups + group;
        round_group(x, row, group * GROUP, in, to.values + at * GROUP, to.scales + at, to.totals + at);
    }
}

/* Bytes that `pack_int8` writes for a matrix of this size. */
int64_t packed_int8_bytes(int64_t out, int64_t in) {
    return (out + VL - 1) / VL * VL * ((in + GROUP - 1) / GROUP * GROUP);
}

/* weight (out, in) as panels of VL rows, each (in / 4, VL, 4) bytes; rows and columns that are not there are 0. */
void pack_int8(const int8_t *weight, uint32_t *panels, int64_t out, int64_t in, int64_t threads) {
    const int64_t quads = (in + GROUP - 1) / GROUP * (GROUP / 4);
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < (out + VL - 1) / VL; panel++) {
        uint32_t *to = panels + panel * quads * VL;
        for (int64_t i = 0; i < quads; i++)
            for (int lane = 0; lane < VL; lane++) {
                const int64_t row = panel * VL + lane, left = row < out ? in - 4 * i : 0;
                uint32_t bytes = 0;
                if (left >= 4) memcpy(&bytes, weight + row * in + 4 * i, 4);
                else if (left > 0) memcpy(&bytes, weight + row * in + 4 * i, left);
                *to++ = OFFSET ? bytes ^ 0x80808080u : bytes;
            }
    }
}

/* Bytes that `pack_int4` writes for a matrix of this size. */
int64_t packed_int4_bytes(int64_t out, int64_t in) { return (out + 2 * VL - 1) / (2 * VL) * (in / GROUP) * INT4_BYTES; }

/* Four columns of a row as int4.py has them, a byte each; 0 beyond the last row. */
INLINE uint32_t four_nibbles(const uint8_t *weight, int64_t row, int64_t out, int64_t in, int64_t column) {
    uint16_t packed = 0x8888;
    if (row < out) memcpy(&packed, weight + (row * in + column) / 2, 2);
    const uint32_t apart = (packed | (uint32_t)packed << 8) & 0x00ff00ff;
    return (apart | apart << 4) & 0x0f0f0f0f;
}

/* weight (out, in / 2) and scales (out, in / GROUP) as int4.py has them -> 2 * VL rows together, group by group: VL rows in
   the low halves of bytes, in the order of pack_int8, VL in the high halves, then the scales. Rows that are not there are 0. */
void pack_int4(const uint8_t *weight, const float *scales, uint8_t *packed, int64_t out, int64_t in, int64_t threads) {
    const int64_t groups = in / GROUP;
#pragma omp parallel for num_threads(threads)
    for (int64_t pair = 0; pair < (out + 2 * VL - 1) / (2 * VL); pair++)
        for (int64_t group = 0; group < groups; group++) {
            uint32_t *to = (uint32_t *)(packed + (pair * groups + group) * INT4_BYTES);
            for (int64_t column = group * GROUP; column < (group + 1) * GROUP; column += 4)
                for (int64_t row = pair * 2 * VL; row < (2 * pair + 1) * VL; row++)
                    *to++ = four_nibbles(weight, row, out, in, column) | four_nibbles(weight, row + VL, out, in, column) << 4;
            for (int64_t row = pair * 2 * VL; row < (pair + 1) * 2 * VL; row++, to++) {
                const float scale = row < out ? scales[row * groups + group] : 0;
                memcpy(to, &scale, sizeof scale);
            }
        }
}

/* One vector of results, those of `column` and on, of which only first..last are wanted. */
static __attribute__((noinline)) void finish_part(const linear *l, const vf *totals, rows y, int64_t row, int64_t column,
                                                  int64_t first, int64_t last) {
    vf scale = splat(1.0f), bias = splat(0.0f);
    const int from = first > column ? (int)(first - column) : 0, to = last - column < VL ? (int)(last - column) : VL;
    for (int i = from; i < to; i++) {
        if (l->scale) scale[i] = l->scale[column + i];
        if (l->bias.data) bias[i] = get(l->bias.data, l->bias.dtype, column + i);
    }
    const vf out = fma_vf(*totals, scale, bias);
    for (int i = from; i < to; i++) put(y.data, y.dtype, row * y.stride + column + i, out[i]);
}

/* The same where mostly all are wanted. What is rare is not inlined: compiled a hundred times it took 40 of 50 seconds. */
INLINE void finish(const linear *l, vf totals, rows y, int64_t row, int64_t column, int64_t first, int64_t last) {
    if (column < first || column + VL > last) {
        finish_part(l, &totals, y, row, column, first, last);
        return;
    }
    const vf bias = l->bias.data ? load_vec(l->bias, column, VL) : splat(0.0f);
    const vf scale = l->scale ? load_vec((vec){l->scale, FLOAT32}, column, VL) : splat(1.0f);
    store(y, row, column, VL, fma_vf(totals, scale, bias));
}

/* `m` rows of x times `halves` panels; constant where this is inlined, as is dtype. */
INLINE void multiply_tile(const linear *l, rounded x, int64_t row, const int m, int64_t panel, const int halves, rows y,
                          int64_t first, int64_t last, const int64_t dtype) {
    const int64_t quads = x.groups * (GROUP / 4);
    const int offset = dtype == PACKED_INT4 ? 8 : OFFSET;
    const uint32_t *left = (const uint32_t *)l->weight + panel * quads * VL, *right = left + quads * VL;
    if (dtype == PACKED_INT4) left = (const uint32_t *)((const char *)l->weight + panel / 2 * x.groups * INT4_BYTES);
    vf totals[TILE][2];
    for (int r = 0; r < m; r++) totals[r][0] = totals[r][1] = splat(0.0f);
    for (int64_t group = 0; group < x.groups; group++) {
        const int8_t *columns = x.values + (row * x.groups + group) * GROUP;
        vi sums[TILE][2];
        for (int r = 0; r < m; r++)
            sums[r][0] = sums[r][1] = (vi){0} - offset * x.totals[(row + r) * x.groups + group];
#pragma GCC unroll 2
        for (int i = 0; i < GROUP / 4; i++, left += VL, right += VL) {
            vi a = *(const vi_any *)left, b = a;
            if (dtype == PACKED_INT4) b = a >> 4 & 0x0f0f0f0f, a &= 0x0f0f0f0f;
            else if (halves == 2) b = *(const vi_any *)right;
#pragma GCC unroll 8
            for (int r = 0; r < m; r++) {
                int32_t four;
                memcpy(&four, columns + r * x.groups * GROUP + 4 * i, 4);
                sums[r][0] = dot4(sums[r][0], a, four);
                if (halves == 2) sums[r][1] = dot4(sums[r][1], b, four);
            }
        }
        vf scales[2] = {splat(1.0f), splat(1.0f)};
        if (dtype == PACKED_INT4) {
            for (int half = 0; half < 2; half++) scales[half] = (vf) * (const vf_any *)(left + half * VL);
            left += 2 * VL;
        }
        for (int r = 0; r < m; r++) {
            const vf scale = splat(x.scales[(row + r) * x.groups + group]);
            for (int half = 0; half < halves; half++) {
                const vf of_both = dtype == PACKED_INT4 ? scale * scales[half] : scale;
                totals[r][half] = fma_vf(__builtin_convertvector(sums[r][half], vf), of_both, totals[r][half]);
            }
        }
    }
    for (int half = 0; half < halves; half++)
        for (int r = 0; r < m; r++)
            finish(l, totals[r][half], y, row + r, (panel + half) * VL - l->first, first, last);
}

INLINE void multiply_rows(const linear *l, rounded x, int64_t row, int64_t end, int64_t panel, const int halves, rows y,
                          int64_t first, int64_t last, const int64_t dtype) {
    for (; row + TILE <= end; row += TILE) multiply_tile(l, x, row, TILE, panel, halves, y, first, last, dtype);
    switch (end - row) { /* each reads the weights once */
        case 5: multiply_tile(l, x, row, 5, panel, halves, y, first, last, dtype); break;
        case 4: multiply_tile(l, x, row, 4, panel, halves, y, first, last, dtype); break;
        case 3: multiply_tile(l, x, row, 3, panel, halves, y, first, last, dtype); break;
        case 2: multiply_tile(l, x, row, 2, panel, halves, y, first, last, dtype); break;
        case 1: multiply_tile(l, x, row, 1, panel, halves, y, first, last, dtype); break;
    }
}

/* Columns first..last of y, for the rows row..end; panels of others are not read, but for the other half of a pair. */
static void multiply(const linear *l, rounded x, int64_t row, int64_t end, rows y, int64_t first, int64_t last) {
    int64_t panel = (l->first + first) / VL;
    const int64_t panels = (l->first + last + VL - 1) / VL;
    if (l->dtype == PACKED_INT4)
        for (panel -= panel % 2; panel < panels; panel += 2)
            multiply_rows(l, x, row, end, panel, 2, y, first, last, PACKED_INT4);
    for (; panel + 2 <= panels; panel += 2) multiply_rows(l, x, row, end, panel, 2, y, first, last, PACKED);
    if (panel < panels) multiply_rows(l, x, row, end, panel, 1, y, first, last, PACKED);
}

void packed_span(const linear *l, const float *x, int64_t m, float *y, int64_t ldy, int64_t first, int64_t last) {
    if (m == 0 || first == last) return;
    const rounded own = new_rounded(m, l->in);
    for (int64_t row = 0; row < m; row++) round_row(own, (rows){(void *)x, l->in, FLOAT32}, row, l->in);
    multiply(l, own, 0, m, (rows){y, ldy, FLOAT32}, first, last);
    free(own.scales);
}

/* y (m, out) = round(x) (m, in) @ weight.T * scale + bias for many rows, the weight packed. */
void linear_packed(const linear_args *a) {
    if (a->m == 0 || a->linear.out == 0) return;
    const linear *l = &a->linear;
    const int64_t m = a->m, pairs = (l->out + 2 * VL - 1) / (2 * VL), wanted = (SHARES * a->threads + pairs - 1) / pairs;
    const int64_t block = (m + wanted - 1) / wanted, blocks = (m + block - 1) / block; /* of rows, with two panels */
    const rounded x = new_rounded(m, l->in);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for
        for (int64_t row = 0; row < m; row++) round_row(x, a->x, row, l->in);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pairs * blocks; task++) {
            const int64_t first = task / blocks * 2 * VL, row = task % blocks * block;
            multiply(l, x, row, row + block < m ? row + block : m, a->y, first, first + 2 * VL < l->out ? first + 2 * VL : l->out);
        }
    }
    free(x.scales);
}
