// Activations (.., e) eight neighbouring channels at a time: 16-byte loads and stores, and their gate.
#pragma once
#include "gpu.cuh"

template <int BITS>
struct Float;
template <>
struct Float<16> {
    using type = bf16;
};
template <>
struct Float<32> {
    using type = float;
};

constexpr float LOG2E = 1.4426950408889634f;

template <typename T>
struct Eight {
    static constexpr int WORDS = sizeof(T) / 2, PER_WORD = 16 / sizeof(T);
    uint4 words[WORDS];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = load_streaming16((const uint4*)from + i);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ float operator[](int i) const {
        const uint4& word = words[i / PER_WORD];
        const int quarter = i % PER_WORD * (int)sizeof(T) / 4;
        const unsigned bits = quarter == 0 ? word.x : quarter == 1 ? word.y : quarter == 2 ? word.z : word.w;
        if (sizeof(T) == 4) return __uint_as_float(bits);
        return __uint_as_float(i % 2 ? bits & 0xffff0000u : bits << 16);
    }
};

__device__ __forceinline__ void store8(bf16* to, const float (&x)[8]) {
    const bf16x2 a = to_bf16x2(x[0], x[1]), b = to_bf16x2(x[2], x[3]);
    const bf16x2 c = to_bf16x2(x[4], x[5]), d = to_bf16x2(x[6], x[7]);
    *(uint4*)to = make_uint4(a, b, c, d);
}

__device__ __forceinline__ void store8(float* to, const float (&x)[8]) {
    *(float4*)to = make_float4(x[0], x[1], x[2], x[3]);
    *((float4*)to + 1) = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ float silu(float x) { return x * fast_rcp(1.0f + exp2_fast(-LOG2E * x)); }
