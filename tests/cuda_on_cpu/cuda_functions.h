// CUDA's own functions and those of gpu.cuh, on top of cuda_on_cpu.h.
#pragma once

static inline void __syncthreads() { cuda_on_cpu::leave(cuda_on_cpu::AT_BARRIER); }
static inline int __syncthreads_or(int x) {
    cuda_on_cpu::barrier_vote |= x != 0;
    __syncthreads();
    return cuda_on_cpu::barrier_result;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    static char nothing;
    cuda_on_cpu::warp_operation(mask, [](void**, unsigned) {}, &nothing);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <typename T>
static inline T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    return cuda_on_cpu::shuffle(mask, x, cuda_on_cpu::lane_index() / width * width + source % width);
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32) {
    return cuda_on_cpu::shuffle_bounded(mask, x, cuda_on_cpu::lane_index() ^ lanes, width);
}
template <typename T>
static inline T __shfl_down_sync(unsigned mask, T x, unsigned lanes, int width = 32) {
    return cuda_on_cpu::shuffle_bounded(mask, x, cuda_on_cpu::lane_index() + (int)lanes, width);
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T x, unsigned lanes, int width = 32) {
    return cuda_on_cpu::shuffle_bounded(mask, x, cuda_on_cpu::lane_index() - (int)lanes, width);
}
static inline unsigned __ballot_sync(unsigned mask, int x) { return cuda_on_cpu::ballot(mask, x != 0); }
static inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
static inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == mask; }

template <typename T>
static inline T atomicAdd(T* at, T x) {
    const T before = *at;
    *at += x;
    return before;
}
template <typename T>
static inline T atomicMax(T* at, T x) {
    const T before = *at;
    *at = before > x ? before : x;
    return before;
}

static inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}
static inline float __int_as_float(int x) { return __uint_as_float((unsigned)x); }
static inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned which = selector >> (4 * i) & 15, byte = bytes >> (8 * (which & 7)) & 255;
        result |= (which & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
    }
    return result;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
template <typename T>
static inline T __ldg(const T* at) { return *at; }

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define __expf(x) expf(x)  // the C library has functions of these two names
#define __logf(x) logf(x)
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __int2float_rn(int x) { return (float)x; }

#define SAME_TYPE_MIN_MAX(T)                                     \
    static inline T min(T x, T y) { return x < y ? x : y; } \
    static inline T max(T x, T y) { return x > y ? x : y; }
SAME_TYPE_MIN_MAX(int)
SAME_TYPE_MIN_MAX(unsigned)
SAME_TYPE_MIN_MAX(long)
SAME_TYPE_MIN_MAX(unsigned long)
SAME_TYPE_MIN_MAX(long long)
SAME_TYPE_MIN_MAX(unsigned long long)
#undef SAME_TYPE_MIN_MAX
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }

static inline float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
static inline bf16 to_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    return {x != x ? (unsigned short)0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static inline bf16x2 to_bf16x2(float low, float high) {
    return to_bf16(low).bits | (unsigned)to_bf16(high).bits << 16;
}
static inline float flush_to_zero(float x) { return fabsf(x) < 1.17549435e-38f ? 0.0f * x : x; }
static inline float exp2_fast(float x) { return flush_to_zero(exp2f(flush_to_zero(x))); }
static inline float log2_fast(float x) { return log2f(flush_to_zero(x)); }
static inline float fast_rcp(float x) { return flush_to_zero(1.0f / flush_to_zero(x)); }
static inline uint4 load_streaming16(const void* from) {
    cuda_on_cpu::check_aligned(from, "load_streaming16");
    return *static_cast<const uint4*>(from);
}

static inline void cp_async16(void* shared, const void* global) {
    cuda_on_cpu::check_aligned(shared, "cp_async16 to");
    cuda_on_cpu::check_aligned(global, "cp_async16 from");
    if (cuda_on_cpu::eager_copies) memcpy(shared, global, 16);
    cuda_on_cpu::threads[cuda_on_cpu::current].issued.push_back({shared, global});
}
static inline void cp_async_commit() {
    auto& thread = cuda_on_cpu::threads[cuda_on_cpu::current];
    thread.groups.push_back(thread.issued);
    thread.issued.clear();
}
template <int GROUPS_LEFT>
static inline void cp_async_wait() {
    auto& groups = cuda_on_cpu::threads[cuda_on_cpu::current].groups;
    while ((int)groups.size() > GROUPS_LEFT) {
        if (!cuda_on_cpu::eager_copies)
            for (const auto& copy : groups.front()) memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

static inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    cuda_on_cpu::Product mine = {d, a, b};
    cuda_on_cpu::warp_operation(0xffffffffu, cuda_on_cpu::multiply, &mine);
}

static inline void load_transposed(unsigned (&d)[4], const bf16* row) {
    cuda_on_cpu::check_aligned(row, "load_transposed");
    cuda_on_cpu::Transposed mine = {d, row};
    cuda_on_cpu::warp_operation(0xffffffffu, cuda_on_cpu::transpose, &mine);
}

static inline void grid_wait() {}
static inline void grid_launch_dependents() {}
