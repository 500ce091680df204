// Attention of one new token a sequence over its own KV: the keys of all sequences are cut into parts of equal size, a
// block computes one part of one KV head for up to 8 of its query heads, a second kernel joins the parts. Wrapper,
// shapes and definition: gpu_attention.py.
//
// A warp takes 16 keys at a time straight from memory into the fragments of mma.m16n8k16; as a sum does not care for
// its order, the head dimension is permuted so that every thread reads 16 bytes in a row. Scores have the heads as rows
// (8 of 16 used), outputs the dimensions as rows and the heads as columns.
//
// Constants: HEAD_DIM p (a multiple of 64), GROUP query heads a KV head.
#include "gpu.cuh"

constexpr int P = HEAD_DIM;
constexpr int WARPS = 4, KEYS = 16, STEP = WARPS * KEYS;
constexpr int HEADS = GROUP < 8 ? GROUP : 8, TILES = (GROUP + 7) / 8;  // query heads of a block, blocks a KV head
constexpr int JOINERS = 4;                                               // threads of attend_combine a dimension
constexpr float NONE = -1e30f;                                          // the maximum of no scores
constexpr unsigned ALL = 0xffffffffu;

struct Part {
    int sequence, begin, end, length;  // keys; `length` is the new token's position, its key is not yet in the cache
};

__device__ __forceinline__ int keys_a_part(const long long* lengths, int b, int parts) {
    long long total = 0;
    for (int i = 0; i < b; ++i) total += lengths[i] + 1;
    const int keys = (int)((total + parts - b - 1) / (parts - b));
    return (keys + STEP - 1) / STEP * STEP;
}

__device__ __forceinline__ Part find_part(const long long* lengths, int b, int index, int parts) {
    const int keys = keys_a_part(lengths, b, parts);
    for (int i = 0; i < b; ++i) {
        const int length = (int)lengths[i], own = length / keys + 1;
        if (index < own) return {i, index * keys, min((index + 1) * keys, length + 1), length};
        index -= own;
    }
    return {-1, 0, 0, 0};
}

// Keys or values of one KV head: the cached rows and the new one behind them
struct Rows {
    const bf16 *cached, *fresh;
    int stride, length;

    __device__ __forceinline__ uint4 load(int row, int column) const {
        if (row < length) return load_streaming16(cached + (long long)row * stride + column);
        return *reinterpret_cast<const uint4*>(fresh + column);  // beyond the end too, where the scores are masked
    }
};

using KeyTile = uint4[2][P / 32];
using ValueTile = uint4[4][P / 64];

__device__ __forceinline__ void load_keys(const Rows& rows, int key, KeyTile& tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < P / 32; ++j) tile[i][j] = rows.load(key + 8 * i + lane / 4, 32 * j + 8 * (lane % 4));
}

__device__ __forceinline__ void load_values(const Rows& rows, int key, ValueTile& tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < P / 64; ++j)
            tile[i][j] = rows.load(key + 2 * (lane % 4) + i % 2 + 8 * (i / 2), 64 * j + 8 * (lane / 4));
}

// scores[i][0..1]: of head lane / 4 and keys 8 i + 2 (lane % 4) + 0..1
__device__ __forceinline__ void score(const uint4 (&q)[P / 32], const KeyTile& keys, float (&scores)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < P / 32; ++j) {
            mma_m16n8k16(scores[i], {q[j].x, 0, q[j].y, 0}, {keys[i][j].x, keys[i][j].y});
            mma_m16n8k16(scores[i], {q[j].z, 0, q[j].w, 0}, {keys[i][j].z, keys[i][j].w});
        }
}

__device__ __forceinline__ unsigned word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
__device__ __forceinline__ unsigned lows(unsigned a, unsigned b) { return (a & 0xffffu) | (b << 16); }
__device__ __forceinline__ unsigned highs(unsigned a, unsigned b) { return (a >> 16) | (b & 0xffff0000u); }

// out[4 j + i]: dimensions 64 j + 8 (lane / 4) + 2 i + 0 (elements 0, 1) and + 1 (2, 3) of heads 2 (lane % 4) + 0..1
__device__ __forceinline__ void add_values(const ValueTile& v, const unsigned (&p)[2], float (&out)[P / 16][4]) {
#pragma unroll
    for (int j = 0; j < P / 64; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned a = word(v[0][j], i), b = word(v[1][j], i), c = word(v[2][j], i), d = word(v[3][j], i);
            mma_m16n8k16(out[4 * j + i], {lows(a, b), highs(a, b), lows(c, d), highs(c, d)}, p);
        }
}

__device__ __forceinline__ float max_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

// What a warp knows of its keys: of head lane / 4 the maximum and this lane's share of the sum, and the outputs
struct Partial {
    float maximum = NONE, sum = 0, out[P / 16][4] = {};

    // Scores (base 2) of 16 keys of which the first `count` exist -> their weights as the B fragment of add_values
    __device__ __forceinline__ void weigh(float (&scores)[2][4], float scale, int count, unsigned (&p)[2]) {
        const int lane = threadIdx.x % 32;
        float highest = NONE;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& x = scores[i / 2][i % 2];
            x = 8 * (i / 2) + 2 * (lane % 4) + i % 2 < count ? x * scale : NONE;
            highest = fmaxf(highest, x);
        }
        highest = fmaxf(maximum, max_of_quad(highest));
        if (__ballot_sync(ALL, highest > maximum)) rescale(exp2f(maximum - highest));
        maximum = highest;
        float weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = scores[i / 2][i % 2];
            weights[i] = x == NONE ? 0.f : exp2f(x - maximum);
            sum += weights[i];
        }
        p[0] = to_bf16x2(weights[0], weights[1]);
        p[1] = to_bf16x2(weights[2], weights[3]);
    }

    __device__ __forceinline__ void rescale(float factor) {
        const int column = 8 * (threadIdx.x % 4);  // the first lane of head 2 (lane % 4)
        const float even = __shfl_sync(ALL, factor, column), odd = __shfl_sync(ALL, factor, column + 4);
        sum *= factor;
#pragma unroll
        for (int i = 0; i < P / 16; ++i) {
            out[i][0] *= even;
            out[i][1] *= odd;
            out[i][2] *= even;
            out[i][3] *= odd;
        }
    }
};

struct Shared {
    float maximum[WARPS][8], sum[WARPS][8], out[WARPS][8][P + 1];
};

__device__ __forceinline__ void store_warp(const Partial& own, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = own.sum + __shfl_xor_sync(ALL, own.sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (lane % 4 == 0) {
        shared.maximum[warp][lane / 4] = own.maximum;
        shared.sum[warp][lane / 4] = sum;
    }
#pragma unroll
    for (int i = 0; i < P / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            shared.out[warp][2 * (lane % 4) + j % 2][64 * (i / 4) + 8 * (lane / 4) + 2 * (i % 4) + j / 2] = own.out[i][j];
}

// The warps' partials become the block's: out (P) and (maximum, sum) of each head
__device__ __forceinline__ void join_warps(const Shared& shared, int heads, float* out, float* weights) {
    for (int at = threadIdx.x; at < heads * P; at += 32 * WARPS) {
        const int head = at / P;
        float maximum = NONE, sum = 0, total = 0;
        for (int i = 0; i < WARPS; ++i) maximum = fmaxf(maximum, shared.maximum[i][head]);
        for (int i = 0; i < WARPS; ++i) {
            const float factor = exp2f(shared.maximum[i][head] - maximum);
            sum += factor * shared.sum[i][head];
            total += factor * shared.out[i][head][at % P];
        }
        out[at] = total;
        if (at % P == 0) weights[2 * head] = maximum, weights[2 * head + 1] = sum;
    }
}

// q (b, g GROUP, P), k, v (b, g, P); caches: b addresses of (layers, 2, capacity, g, P), capacities, lengths (b)
// -> outs (parts, g GROUP, P), weights (parts, g GROUP, 2); writes k and v into the caches. Grid (parts, g TILES).
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
    attend_split(const bf16* q, const bf16* k, const bf16* v, const long long* __restrict__ caches,
                 const long long* __restrict__ capacities, const long long* __restrict__ lengths,
                 float* __restrict__ outs, float* __restrict__ weights, long long layer, long long b, long long g,
                 float scale) {
    __shared__ Shared shared;
    grid_launch_dependents();
    const int head = blockIdx.y / TILES, tile = blockIdx.y % TILES, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Part part = find_part(lengths, (int)b, blockIdx.x, gridDim.x);
    if (part.sequence < 0) return;
    const long long plane = capacities[part.sequence] * g * P, first_head = head * GROUP + tile * HEADS;
    bf16* cache = reinterpret_cast<bf16*>(caches[part.sequence]) + 2 * layer * plane + head * P;
    const long long fresh = (part.sequence * g + head) * P;
    const int stride = (int)g * P;
    const Rows keys{cache, k + fresh, stride, part.length}, values{cache + plane, v + fresh, stride, part.length};

    int key = part.begin + warp * KEYS;
    KeyTile key_tile;
    ValueTile value_tile;
    const bool is_cached = key + KEYS <= part.length;  // then nothing of it comes from the kernel before
    if (!is_cached) grid_wait();
    load_keys(keys, key, key_tile);
    load_values(values, key, value_tile);
    if (is_cached) grid_wait();

    const int heads = min(HEADS, GROUP - tile * HEADS);
    uint4 queries[P / 32];
#pragma unroll
    for (int i = 0; i < P / 32; ++i) {
        const bf16* row = q + (part.sequence * g * GROUP + first_head + lane / 4) * P;
        queries[i] = lane / 4 < heads ? reinterpret_cast<const uint4*>(row)[4 * i + lane % 4] : uint4{0, 0, 0, 0};
    }
    Partial own;
    for (; key < part.end; key += STEP) {
        float scores[2][4] = {};
        score(queries, key_tile, scores);
        if (key + STEP < part.end) load_keys(keys, key + STEP, key_tile);
        unsigned p[2];
        own.weigh(scores, scale, part.end - key, p);
        add_values(value_tile, p, own.out);
        if (key + STEP < part.end) load_values(values, key + STEP, value_tile);
    }
    store_warp(own, shared);
    __syncthreads();
    const long long row = blockIdx.x * g * GROUP + first_head;
    join_warps(shared, heads, outs + row * P, weights + row * 2);
    if (part.end > part.length && tile == 0)
        for (int i = threadIdx.x; i < P; i += 32 * WARPS) {
            cache[part.length * g * P + i] = k[fresh + i];
            cache[plane + part.length * g * P + i] = v[fresh + i];
        }
}

// outs (parts, h, P), weights (parts, h, 2) -> out (b, h, P). Grid (h, b), JOINERS P threads.
extern "C" __global__ void __launch_bounds__(JOINERS * P)
    attend_combine(const float* outs, const float* weights, const long long* __restrict__ lengths,
                   bf16* __restrict__ out, long long b, long long parts) {
    __shared__ float totals[JOINERS][P], sums[JOINERS];
    grid_launch_dependents();
    const long long h = gridDim.x;
    const int keys = keys_a_part(lengths, (int)b, (int)parts), own = blockIdx.y;
    int first = 0;
    for (int i = 0; i < own; ++i) first += (int)lengths[i] / keys + 1;
    const int end = first + (int)lengths[own] / keys + 1;
    const int joiner = threadIdx.x / P, column = threadIdx.x % P;
    grid_wait();

    float maximum = NONE, sum = 0, total = 0;
#pragma unroll 8
    for (int i = first; i < end; ++i) maximum = fmaxf(maximum, weights[2 * (i * h + blockIdx.x)]);
#pragma unroll 4
    for (int i = first + joiner; i < end; i += JOINERS) {
        const float* weight = weights + 2 * (i * h + blockIdx.x);
        const float factor = exp2f(weight[0] - maximum);
        sum += factor * weight[1];
        total += factor * outs[(i * h + blockIdx.x) * P + column];
    }
    totals[joiner][column] = total;
    if (column == 0) sums[joiner] = sum;
    __syncthreads();
    if (joiner == 0) {
#pragma unroll
        for (int i = 1; i < JOINERS; ++i) {
            total += totals[i][column];
            sum += sums[i];
        }
        out[(own * h + blockIdx.x) * P + column] = to_bf16(total / sum);
    }
}
