// Small kernels for the tests of the runtime: each uses a part of gpu.cuh in a way whose result is easily known.
#include "gpu.cuh"

#ifndef BLOCK
#define BLOCK 32
#endif

// out (16, 8) = a (16, K) b (K, 8), b given as (8, K); K steps of 16 come through shared memory, two in flight
extern "C" __global__ void __launch_bounds__(32) toy_product(const bf16* a, const bf16* b, float* out, long long K) {
    SHARED_MEMORY(bf16, staged);  // 2 buffers of (16 + 8) rows of 16
    const int lane = threadIdx.x, group = lane / 4, quad = lane % 4;
    auto load = [&](long long step) {
        bf16* to = staged + step % 2 * 24 * 16;
        for (int i = lane; i < 48; i += 32) {
            const int row = i / 2, half = i % 2 * 8;
            const bf16* from = row < 16 ? a + row * K : b + (row - 16) * K;
            cp_async16(to + row * 16 + half, from + step * 16 + half);
        }
        cp_async_commit();
    };
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    load(0);
    for (long long step = 0; step < K / 16; ++step) {
        if (step + 1 < K / 16) {
            load(step + 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncwarp();
        const bf16* at = staged + step % 2 * 24 * 16;
        auto pair = [&](int row, int column) { return *reinterpret_cast<const bf16x2*>(at + row * 16 + column); };
        const unsigned x[4] = {pair(group, quad * 2), pair(group + 8, quad * 2), pair(group, quad * 2 + 8),
                               pair(group + 8, quad * 2 + 8)};
        const unsigned y[2] = {pair(16 + group, quad * 2), pair(16 + group, quad * 2 + 8)};
        mma_m16n8k16(d, x, y);
        __syncwarp();
    }
    for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + quad * 2 + i % 2] = d[i];
}

// out (grid) = scale * each block's sum of its part of x (n), plus a maximum into *largest; BLOCK threads
extern "C" __global__ void __launch_bounds__(BLOCK) toy_sum(const float* x, float* out, float* total, long long n,
                                                           float scale) {
    __shared__ float sums[BLOCK / 32];
    grid_wait();
    float sum = 0.0f;
    const long long all = (long long)gridDim.x * BLOCK;
    for (long long i = blockIdx.x * (long long)BLOCK + threadIdx.x; i < n; i += all) sum += x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < BLOCK / 32 ? sums[threadIdx.x] : 0.0f;
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = scale * sum;
        atomicAdd(total, scale * sum);
    }
    grid_launch_dependents();
}

// y (n) bf16 = x (n), two at a time and 16 bytes at a time; room in shared memory for what a block may have at most
extern "C" __global__ void toy_round(const float* x, bf16* y, long long n) {
    SHARED_MEMORY(bf16x2, pairs);
    const long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * 4;
    if (i < n) {
        const uint4 bits = load_streaming16(x + i);
        pairs[threadIdx.x * 2] = to_bf16x2(__uint_as_float(bits.x), __uint_as_float(bits.y));
        pairs[threadIdx.x * 2 + 1] = to_bf16x2(make_float2(__uint_as_float(bits.z), __uint_as_float(bits.w)));
    }
    __syncthreads();
    if (i < n) *reinterpret_cast<uint2*>(y + i) = reinterpret_cast<uint2*>(pairs)[threadIdx.x];
}

// what the emulator must refuse: a barrier inside a warp's half, with a warp operation in the other
extern "C" __global__ void toy_deadlock(float* x) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        x[threadIdx.x] = __shfl_sync(0xffffffffu, x[threadIdx.x], 0);
    }
}

// ... 16 bytes from where only 4 are aligned, and shared memory past its end
extern "C" __global__ void toy_misaligned(const float* x, float* out) {
    out[0] = reinterpret_cast<const float4*>(x + threadIdx.x)->x;
}
extern "C" __global__ void toy_overrun(float* x) {
    SHARED_MEMORY(float, few);
    few[threadIdx.x] = x[threadIdx.x];
}
