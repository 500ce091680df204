/* Vectors of VL floats for the CPU kernels, in the C dialect that GCC and Clang share; intrinsics only for AVX-512.

   Not here: any kernel (cpu.c: scan and convolution; cpu_linear.c: products with few rows).
   Build without -ffast-math: NaN must travel through, and the rounding trick below needs the order as written. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef __AVX512F__
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(1), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t vh_any __attribute__((vector_size(2 * VL), aligned(1), may_alias));

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, PACKED = 3, PACKED_INT4 = 4 };

/* A matrix: row i starts `stride` elements after row i - 1, columns are contiguous. data NULL: not given. */
typedef struct {
    void *data;
    int64_t stride;
    int64_t dtype;
} rows;

/* A parameter without gaps; data NULL: not given. */
typedef struct {
    const void *data;
    int64_t dtype;
} vec;

INLINE vf splat(float x) { return x - (vf){0}; }

/* a * b + c. Rounded once wherever the processor can, and not where GCC's tuning chooses to: the same sum has the same
   bits in every loop that it stands in. */
INLINE vf fma_vf(vf a, vf b, vf c) {
#ifdef __AVX512F__
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vf select_vf(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* Both keep NaN. */
INLINE vf vmax(vf a, float low) { return select_vf(a < splat(low), splat(low), a); }
INLINE vf vmin(vf a, float high) { return select_vf(a > splat(high), splat(high), a); }

INLINE float sum_lanes(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s[VL];
    memcpy(s, &x, sizeof s);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
#endif
}

INLINE float max_lanes(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < VL; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

/* Lanes of a and, from VL on, of b. */
INLINE vi pick(vi a, vi b, vi lanes) {
#if defined(__AVX512F__)
    return (vi)_mm512_permutex2var_epi32((__m512i)a, (__m512i)lanes, (__m512i)b);
#elif defined(__clang__)
    vi picked;
    for (int i = 0; i < VL; i++) picked[i] = lanes[i] < VL ? a[lanes[i]] : b[lanes[i] - VL];
    return picked;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

INLINE vi lane_numbers(void) {
    vi numbers;
    for (int i = 0; i < VL; i++) numbers[i] = i;
    return numbers;
}

/* bf16 bits -> float, and back rounding to nearest even; NaN stays NaN, values under 2^-126 may become 0. */
INLINE vf from_bf16(vh bits) { return (vf)(__builtin_convertvector(bits, vu) << 16); }

INLINE vh to_bf16(vf x) {
#ifdef __AVX512BF16__
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vh);
#endif
}

/* `lanes` (< VL only at the right edge) elements of row i from column c on; lanes beyond are 0. */
INLINE vf load(rows m, int64_t i, int64_t c, int lanes) {
    int64_t at = i * m.stride + c;
    if (m.dtype == FLOAT32) {
        const float *p = (const float *)m.data + at;
        if (lanes == VL) return (vf) * (const vf_any *)p;
        vf x = {0};
        memcpy(&x, p, lanes * sizeof *p);
        return x;
    }
    const uint16_t *p = (const uint16_t *)m.data + at;
    if (lanes == VL) return from_bf16((vh) * (const vh_any *)p);
    vh x = {0};
    memcpy(&x, p, lanes * sizeof *p);
    return from_bf16(x);
}

INLINE vf load_vec(vec v, int64_t c, int lanes) { return load((rows){(void *)v.data, 0, v.dtype}, 0, c, lanes); }

INLINE void store(rows m, int64_t i, int64_t c, int lanes, vf x) {
    int64_t at = i * m.stride + c;
    if (m.dtype == FLOAT32) {
        float *p = (float *)m.data + at;
        if (lanes == VL) *(vf_any *)p = x;
        else memcpy(p, &x, lanes * sizeof *p);
        return;
    }
    uint16_t *p = (uint16_t *)m.data + at;
    vh bits = to_bf16(x);
    if (lanes == VL) *(vh_any *)p = bits;
    else memcpy(p, &bits, lanes * sizeof *p);
}

/* One element. */
INLINE float get(const void *data, int64_t dtype, int64_t i) {
    if (dtype == FLOAT32) return ((const float *)data)[i];
    union { uint32_t bits; float value; } u = {(uint32_t)((const uint16_t *)data)[i] << 16};
    return u.value;
}

INLINE void put(void *data, int64_t dtype, int64_t i, float x) {
    if (dtype == FLOAT32) {
        ((float *)data)[i] = x;
        return;
    }
    ((uint16_t *)data)[i] = to_bf16(splat(x))[0];
}

/* 2^x: 2^n times a polynomial of degree 6 on the rest; exactly 1 at 0, within 2 ulp elsewhere. Finite x. */
INLINE vf exp2v(vf x) {
#ifdef __AVX512F__
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = vmax(vmin(x, 128.0f), -150.0f);
    vf n = (x + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: leaves the integer in the low bits */
#endif
    vf r = x - n;
    vf p = r * 1.535336191e-4f + 1.339887441e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vi exponent = __builtin_convertvector(n, vi), half = exponent >> 1; /* in two steps: 2^-149 and 2^128 are reached */
    return p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
#endif
}

/* Row j of out = row i of x / sqrt(mean(x^2) + eps) * weight, of d columns */
INLINE void norm_row(rows x, int64_t i, vec weight, rows out, int64_t j, int64_t d, double eps) {
    vf squares[2] = {splat(0.0f), splat(0.0f)};
    for (int64_t c = 0; c < d; c += VL) {
        vf values = load(x, i, c, d - c < VL ? (int)(d - c) : VL);
        squares[c / VL & 1] += values * values;
    }
    const float factor = (float)(1 / sqrt(sum_lanes(squares[0] + squares[1]) / (double)d + eps));
    for (int64_t c = 0; c < d; c += VL) {
        const int lanes = d - c < VL ? (int)(d - c) : VL;
        store(out, j, c, lanes, load(x, i, c, lanes) * factor * load_vec(weight, c, lanes));
    }
}

#define LOG2_E 1.44269504088896341f

/* x * sigmoid(x) */
INLINE vf silu(vf x) { return x / (1.0f + exp2v(vmax(vmin(x, 126.0f), -126.0f) * -LOG2_E)); }

/* log(1 + exp(x)) = max(x, 0) + log1p(y), y = exp(-|x|); log1p(y)/y by a polynomial of degree 8 on [0, 1]. */
INLINE vf softplus(vf x) {
    vf magnitude = (vf)((vi)x & 0x7fffffff);
    vf y = exp2v(vmax(magnitude * -LOG2_E, -149.0f));
    vf p = y * 5.364824333e-3f - 3.006579231e-2f;
    p = p * y + 7.920453560e-2f;
    p = p * y - 1.375380234e-1f;
    p = p * y + 1.915365494e-1f;
    p = p * y - 2.485716367e-1f;
    p = p * y + 3.332132262e-1f;
    p = p * y - 4.999964796e-1f;
    p = p * y + 1.0f;
    return vmax(x, 0.0f) + y * p;
}
