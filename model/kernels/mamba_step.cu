// One decode step of the selective scan: norms of dt, B and C, dt_proj, the recurrence, the gate. Wrapper, shapes and
// definition: gpu_mamba.py. Four lanes share a channel; a block keeps its channels' weights for all its sequences.
//
// Constants: DT_RANK r (a multiple of 4), D_STATE n (a multiple of 4), SEQUENCES a block.
#include "gpu.cuh"

constexpr int R = DT_RANK, N = D_STATE;
constexpr int THREADS = 128, LANES = 4, WARPS = THREADS / 32;
constexpr int CHANNELS = THREADS / LANES;       // of a block
constexpr int STATES = N / LANES;               // of a thread
constexpr int WORDS = R % 8 == 0 ? 4 : 2;       // of a load, two weights a word
constexpr int LOADS = (R + 2 * WORDS * LANES - 1) / (2 * WORDS * LANES);
constexpr float LOG2E = 1.4426950408889634f;

struct __align__(4 * WORDS) Weights {
    unsigned words[WORDS];
};

template <int SIZE>
struct Row {  // of a warp
    float own[(SIZE + 31) / 32];

    __device__ __forceinline__ explicit Row(const float* x) {
#pragma unroll
        for (int i = 0; i < (SIZE + 31) / 32; ++i) {
            const int at = 32 * i + threadIdx.x % 32;
            own[i] = at < SIZE ? x[at] : 0.f;
        }
    }

    // out = x / rms(x) * weight
    __device__ __forceinline__ void normalize(const float* weight, float eps, float* out) const {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < (SIZE + 31) / 32; ++i) squares += own[i] * own[i];
        const float factor = rsqrtf(warp_sum(squares) / SIZE + eps);
#pragma unroll
        for (int i = 0; i < (SIZE + 31) / 32; ++i) {
            const int at = 32 * i + threadIdx.x % 32;
            if (at < SIZE) out[at] = own[i] * factor * weight[at];
        }
    }
};

__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

__device__ __forceinline__ float sum_of_channel(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ void copy_states(const float* from, float* to) {
    if constexpr (STATES % 4 == 0) {
#pragma unroll
        for (int i = 0; i < STATES; i += 4)
            *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
    } else {
#pragma unroll
        for (int i = 0; i < STATES; ++i) to[i] = from[i];
    }
}

// This lane's part of dt_proj's row times dt
__device__ __forceinline__ float project(const Weights (&weights)[LOADS], const float* dt, int lane) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int first = (i * LANES + lane) * 2 * WORDS;
        if (R % (2 * WORDS * LANES) == 0 || first < R) {
#pragma unroll
            for (int j = 0; j < WORDS; ++j) {
                const float2 weight = to_float2(weights[i].words[j]);
                sum += weight.x * dt[first + 2 * j] + weight.y * dt[first + 2 * j + 1];
            }
        }
    }
    return sum;
}

// What comes from the kernel before is not __restrict__: its loads could be moved above the wait.
// x (b, R + 2N), u, z, y (b, e), dt_weight (e, R), A_log (e, N); states: b addresses of float32, layer's at `offset`
extern "C" __global__ void __launch_bounds__(THREADS)
    ssm_step(const float* x, const bf16* u, const bf16* z, const bf16* __restrict__ dt_norm, const bf16* __restrict__ b_norm, const bf16* __restrict__ c_norm,
             const bf16* __restrict__ dt_weight, const bf16* __restrict__ dt_bias, const float* __restrict__ A_log,
             const float* __restrict__ D, const long long* __restrict__ states, bf16* __restrict__ y, long long offset,
             long long b, long long e, float eps) {
    __shared__ __align__(16) float norms[R + 2 * N], rows[SEQUENCES][R + 2 * N];
    const int lane = threadIdx.x % LANES;
    const long long first = blockIdx.y * SEQUENCES;
    const bool inside = blockIdx.x * CHANNELS + threadIdx.x / LANES < e;
    const long long channel = inside ? blockIdx.x * CHANNELS + threadIdx.x / LANES : e - 1;
    const long long cell = channel * N + lane * STATES;
    grid_launch_dependents();

    Weights weights[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int at = (i * LANES + lane) * 2 * WORDS;
        if (R % (2 * WORDS * LANES) == 0 || at < R)
            weights[i] = *reinterpret_cast<const Weights*>(dt_weight + channel * R + at);
    }
    float h[SEQUENCES][STATES], decay[STATES];
    copy_states(A_log + cell, decay);
#pragma unroll
    for (int i = 0; i < SEQUENCES; ++i)
        if (first + i < b) copy_states(reinterpret_cast<const float*>(states[first + i]) + offset + cell, h[i]);
    const float bias = to_float(dt_bias[channel]), skip = D[channel];
#pragma unroll
    for (int i = 0; i < STATES; ++i) decay[i] = -LOG2E * expf(decay[i]);
    for (int i = threadIdx.x; i < R; i += THREADS) norms[i] = to_float(dt_norm[i]);
    for (int i = threadIdx.x; i < N; i += THREADS) {
        norms[R + i] = to_float(b_norm[i]);
        norms[R + N + i] = to_float(c_norm[i]);
    }
    __syncthreads();
    grid_wait();

    float input[SEQUENCES], gate[SEQUENCES];
#pragma unroll
    for (int i = 0; i < SEQUENCES; ++i) {
        const long long at = min(first + i, b - 1) * e + channel;
        input[i] = to_float(u[at]);
        gate[i] = to_float(z[at]);
    }
    for (int i = threadIdx.x / 32; i < SEQUENCES && first + i < b; i += WARPS) {
        const float* row = x + (first + i) * (R + 2 * N);
        const Row<R> dt(row);
        const Row<N> B(row + R), C(row + R + N);
        dt.normalize(norms, eps, rows[i]);
        B.normalize(norms + R, eps, rows[i] + R);
        C.normalize(norms + R + N, eps, rows[i] + R + N);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SEQUENCES; ++i) {
        if (first + i >= b) break;
        const float delta = softplus(sum_of_channel(project(weights, rows[i], lane)) + bias);
        const float *B = rows[i] + R + lane * STATES, *C = B + N;
        float out = 0;
#pragma unroll
        for (int j = 0; j < STATES; ++j) {
            h[i][j] = exp2f(delta * decay[j]) * h[i][j] + delta * input[i] * B[j];
            out += h[i][j] * C[j];
        }
        out = (sum_of_channel(out) + skip * input[i]) * silu(gate[i]);
        if (inside) {
            copy_states(h[i], reinterpret_cast<float*>(states[first + i]) + offset + cell);
            if (lane == 0) y[(first + i) * e + channel] = to_bf16(out);
        }
    }
}
