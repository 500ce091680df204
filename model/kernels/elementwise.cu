// What stands between the products: sums with norms and the router, gates, rounding of weights to bfloat16 and back.
// Rows are read and written 16 bytes at a time; all sums are float32.
#include "gpu.cuh"

#ifndef CHUNKS
#define CHUNKS 1
#endif
#ifndef EXPERTS
#define EXPERTS 0
#endif

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

__device__ __forceinline__ void unpack(const uint4& packed, float (&values)[8])
{
    const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = to_float2(words[i]);
        values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ uint4 pack(const float (&values)[8])
{
    return {to_bf16x2(values[0], values[1]), to_bf16x2(values[2], values[3]), to_bf16x2(values[4], values[5]),
            to_bf16x2(values[6], values[7])};
}

__device__ __forceinline__ uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }

// out (rows, columns) = weight * scale[row]; a thread a 16 weights
extern "C" __global__ void __launch_bounds__(256)
dequantize(const signed char* weight, const float* scale, bf16* out, long long rows, long long columns)
{
    const unsigned index = blockIdx.x * 256 + threadIdx.x, row = index / (unsigned)(columns / 16);
    if (row >= rows) return;
    const uint4 bytes = load_streaming16(weight + 16ll * index);
    const float factor = scale[row];
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    float values[2][8];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        // 0x4b0000bb is 2^23 + bb
        const unsigned bits = __byte_perm(words[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7650 + i % 4);
        values[i / 8][i % 8] = (__uint_as_float(bits) - 8388736.f) * factor;
    }
    uint4* to = reinterpret_cast<uint4*>(out + 16ll * index);
    to[0] = pack(values[0]), to[1] = pack(values[1]);
}

// out (rows, columns) = silu(gate) * up; rows of gate and up lie `stride` apart
extern "C" __global__ void __launch_bounds__(256)
silu_mul(const bf16* gate, const bf16* up, bf16* out, long long rows, long long columns, long long gate_stride,
         long long up_stride)
{
    const unsigned index = blockIdx.x * 256 + threadIdx.x, groups = columns / 8;
    const unsigned row = index / groups, column = index % groups * 8;
    if (row >= rows) return;
    float g[8], u[8];
    unpack(load16(gate + row * gate_stride + column), g);
    unpack(load16(up + row * up_stride + column), u);
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] *= silu(g[i]);
    *reinterpret_cast<uint4*>(out + 8ll * index) = pack(u);
}

// out (rows, columns) = x / rms(x) * weight; a warp a row, CHUNKS * 256 >= columns
extern "C" __global__ void __launch_bounds__(256)
rms_norm(const bf16* x, const bf16* weight, bf16* out, long long rows, long long columns, long long stride, float eps)
{
    const long long row = blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    uint4 kept[CHUNKS];
    float square = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int column = (i * 32 + lane) * 8;
        if (column >= columns) continue;
        float values[8];
        unpack(kept[i] = load16(x + row * stride + column), values);
#pragma unroll
        for (int j = 0; j < 8; ++j) square += values[j] * values[j];
    }
    const float factor = rsqrtf(warp_sum(square) / columns + eps);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int column = (i * 32 + lane) * 8;
        if (column >= columns) continue;
        float values[8], weights[8];
        unpack(kept[i], values);
        unpack(load16(weight + column), weights);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] *= factor * weights[j];
        *reinterpret_cast<uint4*>(out + row * columns + column) = pack(values);
    }
}

// out[index[i]] += weight[i] * rows[i]; no index twice
extern "C" __global__ void __launch_bounds__(256)
add_rows(const bf16* rows, const long long* index, const float* weight, bf16* out, long long count, long long columns)
{
    const unsigned at = blockIdx.x * 256 + threadIdx.x, groups = columns / 8;
    const unsigned row = at / groups, column = at % groups * 8;
    if (row >= count) return;
    bf16* to = out + index[row] * columns + column;
    const float factor = weight[row];
    float values[8], sums[8];
    unpack(load16(rows + 8ll * at), values);
    unpack(load16(to), sums);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += factor * values[i];
    *reinterpret_cast<uint4*>(to) = pack(sums);
}

#ifdef THREADS
constexpr int WARPS = THREADS / 32;
constexpr int MAX_WARPS = 32;

__device__ __forceinline__ float block_sum(float x, float* sums)
{
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp];
    return total;
}

struct Four {
    float at[4];
};

__device__ __forceinline__ Four load_four(const float* from)
{
    const float4 x = *reinterpret_cast<const float4*>(from);
    return {{x.x, x.y, x.z, x.w}};
}

__device__ __forceinline__ Four widen_four(const uint2& packed)
{
    const float2 low = to_float2(packed.x), high = to_float2(packed.y);
    return {{low.x, low.y, high.x, high.y}};
}

__device__ __forceinline__ Four load_four(const bf16* from) { return widen_four(*reinterpret_cast<const uint2*>(from)); }

#if Y_FLOAT
using Added = float;
#else
using Added = bf16;
#endif

#if EXPERTS
constexpr int EXPERT_TILES = (EXPERTS + 15) / 16, LOGITS = 16 * EXPERT_TILES;
constexpr int PIECES = 4 * CHUNKS;  // of 32 columns, a warp's: every WARPS-th

// A warp's pieces of the router, as A of mma.m16n8k16: experts as rows, 8 adjacent columns a lane, in the order memory has
// them; any order will do if the tokens have it too.
struct Router {
    uint4 rows[EXPERT_TILES][PIECES][2];

    static __device__ __forceinline__ int column(int piece)
    {
        return (piece * WARPS + threadIdx.x / 32) * 32 + threadIdx.x % 4 * 8;
    }
    __device__ __forceinline__ void load(const bf16* router, long long d)
    {
#pragma unroll
        for (int tile = 0; tile < EXPERT_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int expert = 16 * tile + 8 * half + threadIdx.x % 32 / 4;
                    const bool inside = expert < EXPERTS && column(i) < d;
                    rows[tile][i][half] = inside ? load16(router + expert * d + column(i)) : uint4{0, 0, 0, 0};
                }
    }
    // This warp's share of the logits of one row `normed` (d) in shared memory, which stands in all columns of B.
    __device__ __forceinline__ void multiply(const bf16* normed, long long d, float* logits) const
    {
        float acc[EXPERT_TILES][4][4] = {};  // four chains: none waits for another
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const uint4 x = column(i) < d ? load16(normed + column(i)) : uint4{0, 0, 0, 0};
#pragma unroll
            for (int tile = 0; tile < EXPERT_TILES; ++tile) {
                const uint4 &low = rows[tile][i][0], &high = rows[tile][i][1];
                mma_m16n8k16(acc[tile][2 * (i % 2)], {low.x, high.x, low.y, high.y}, {x.x, x.y});
                mma_m16n8k16(acc[tile][2 * (i % 2) + 1], {low.z, high.z, low.w, high.w}, {x.z, x.w});
            }
        }
        const int expert = threadIdx.x % 32 / 4;
        if (threadIdx.x % 4) return;
#pragma unroll
        for (int tile = 0; tile < EXPERT_TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = 0;
#pragma unroll
                for (int chain = 0; chain < 4; ++chain) sum += acc[tile][chain][2 * half];
                logits[16 * tile + 8 * half + expert] = sum;
            }
    }
};

// The first warp: softmax over all experts, the top_k highest of it, the lower index where two are equal.
__device__ __forceinline__ void choose(const float (*logits)[LOGITS], float* weights, int* chosen, int top_k)
{
    const int lane = threadIdx.x;
    const float lowest = __uint_as_float(0xff800000u);
    float logit = lowest;
    if (lane < EXPERTS) {
        logit = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) logit += logits[warp][lane];
    }
    const float highest = warp_max(logit), share = lane < EXPERTS ? expf(logit - highest) : 0.f;
    const float total = warp_sum(share);
    for (int rank = 0; rank < top_k; ++rank) {
        const float best = warp_max(logit);
        const unsigned holders = __ballot_sync(0xffffffffu, logit == best && lane < EXPERTS);
        const int winner = holders ? __ffs(holders) - 1 : rank;  // none is equal to NaN
        if (lane == winner) {
            weights[rank] = share / total, chosen[rank] = lane;
            logit = lowest;
        }
    }
}
#endif

// residual (rows, d) += y: nothing, (rows, d), or the sum of ROUTES rows (rows, ROUTES, d) times y_weights (rows,
// ROUTES). normed = residual / rms * weight; with EXPERTS router (EXPERTS, d) chooses of it. A block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
add_norm(float* residual, const Added* y, const float* y_weights, const bf16* weight, bf16* normed, const bf16* router,
         float* weights, int* chosen, long long d, long long top_k, float eps)
{
    __shared__ float sums[MAX_WARPS];
    const long long row = blockIdx.x;
    int column[CHUNKS];
    uint2 norm[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        column[i] = (i * THREADS + threadIdx.x) * 4;
        if (column[i] < d) norm[i] = *reinterpret_cast<const uint2*>(weight + column[i]);
    }
#if EXPERTS
    __shared__ __align__(16) bf16 shared_normed[4 * CHUNKS * THREADS];
    Router own;
    own.load(router, d);
#endif
    grid_wait();
    grid_launch_dependents();

    Four x[CHUNKS] = {};
    float square = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        if (column[i] >= d) continue;
        float* at = residual + row * d + column[i];
        x[i] = load_four(at);
        if (y) {
#pragma unroll
            for (int route = 0; route < ROUTES; ++route) {
                const Four added = load_four(y + (row * ROUTES + route) * d + column[i]);
                const float factor = y_weights ? y_weights[row * ROUTES + route] : 1.f;
#pragma unroll
                for (int j = 0; j < 4; ++j) x[i].at[j] += factor * added.at[j];
            }
            *reinterpret_cast<float4*>(at) = make_float4(x[i].at[0], x[i].at[1], x[i].at[2], x[i].at[3]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) square += x[i].at[j] * x[i].at[j];
    }
    const float factor = rsqrtf(block_sum(square, sums) / d + eps);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        if (column[i] >= d) continue;
        const Four scale = widen_four(norm[i]);
        const uint2 packed = {to_bf16x2(x[i].at[0] * factor * scale.at[0], x[i].at[1] * factor * scale.at[1]),
                              to_bf16x2(x[i].at[2] * factor * scale.at[2], x[i].at[3] * factor * scale.at[3])};
        *reinterpret_cast<uint2*>(normed + row * d + column[i]) = packed;
#if EXPERTS
        *reinterpret_cast<uint2*>(shared_normed + column[i]) = packed;
#endif
    }
#if EXPERTS
    __shared__ float partial[WARPS][LOGITS];
    __syncthreads();
    own.multiply(shared_normed, d, partial[threadIdx.x / 32]);
    __syncthreads();
    if (threadIdx.x < 32) choose(partial, weights + row * top_k, chosen + row * top_k, top_k);
#endif
}
#endif
