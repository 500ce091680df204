// Attention of one new token a sequence over its own KV: the keys of all sequences are cut into parts of equal size, a
// block computes one part of one KV head for up to 8 of its query heads, a second kernel joins the parts. Wrapper,
// shapes and definition: gpu_attention.py.
//
// A warp takes 16 keys at a time straight from memory into the fragments of mma.m16n8k16; as a sum does not care for
// its order, the head dimension is permuted so that every thread reads 16 bytes in a row. Scores have the heads as rows
// (8 of 16 used), outputs the dimensions as rows and the heads as columns.
//
// Of sequences that share their first keys (MEMBERS > 1) one's copy is read for up to MEMBERS of them: the query heads of
// all are rows of one product of scores, up to 8 of the first, up to 16 in two products of values. What lies behind the
// shared keys is read for each alone. A copy may lie in two places, the first of its keys lent by another sequence:
// other addresses, the same parts and so the same bits.
//
// Constants: HEAD_DIM p (a multiple of 64), GROUP query heads a KV head, MEMBERS sequences of a block.
#include "gpu.cuh"

constexpr int P = HEAD_DIM;
constexpr int WARPS = 4, KEYS = 16, STEP = WARPS * KEYS;
constexpr int HEADS = GROUP < 8 ? GROUP : 8, TILES = (GROUP + 7) / 8;  // query heads of a block, blocks a KV head
constexpr int SIDES = (MEMBERS * HEADS + 7) / 8;                         // products of values, 8 columns each
constexpr int JOINERS = 4;                                               // threads of attend_combine a dimension
constexpr float NONE = -1e30f;                                          // the maximum of no scores
constexpr unsigned ALL = 0xffffffffu;

static_assert(SIDES <= 2, "a product has 16 rows");

// What a step reads, (b) each: `until` keys of a sequence are read from the copy of its `owner`, maybe itself
struct Step {
    const long long *lengths, *owners, *until;
    int b;

    // Keys that are read from this sequence's copy for all of its group
    __device__ __forceinline__ int together(int i) const { return MEMBERS > 1 && owners[i] == i ? (int)until[i] : 0; }
    // Where begins what is read for it alone
    __device__ __forceinline__ int alone(int i) const { return MEMBERS > 1 ? (int)until[i] : 0; }
};

struct Part {
    int sequence, begin, end, length;  // keys; `length` is the new token's position, its key is not yet in the cache
    bool together;
};

__device__ __forceinline__ int keys_a_part(const Step& step, int parts) {
    long long total = 0;
    int pieces = step.b;  // each of them may end within a part
    for (int i = 0; i < step.b; ++i) {
        const int together = step.together(i);
        total += step.lengths[i] + 1 + together - step.alone(i);
        pieces += together > 0;
    }
    const int keys = (int)((total + parts - pieces - 1) / (parts - pieces));
    return (keys + STEP - 1) / STEP * STEP;
}

// Parts of a sequence's copy: first those that are read for its group, then its own
__device__ __forceinline__ int parts_together(const Step& step, int i, int keys) {
    return (step.together(i) + keys - 1) / keys;
}
__device__ __forceinline__ int parts_alone(const Step& step, int i, int keys) {
    return ((int)step.lengths[i] - step.alone(i)) / keys + 1;
}

__device__ __forceinline__ Part find_part(const Step& step, int index, int parts) {
    const int keys = keys_a_part(step, parts);
    for (int i = 0; i < step.b; ++i) {
        const int length = (int)step.lengths[i], together = parts_together(step, i, keys);
        if (index < together) return {i, index * keys, min((index + 1) * keys, step.together(i)), length, true};
        index -= together;
        const int own = parts_alone(step, i, keys), begin = step.alone(i) + index * keys;
        if (index < own) return {i, begin, min(begin + keys, length + 1), length, false};
        index -= own;
    }
    return {-1, 0, 0, 0, false};
}

// How many sequences before `end` read from the copy of `owner`; the sequence that is number `member` of those
__device__ __forceinline__ int count_members(const Step& step, int owner, int end) {
    int count = 0;
    for (int i = 0; i < end; ++i) count += step.owners[i] == owner;
    return count;
}
__device__ __forceinline__ int find_member(const Step& step, int owner, int member) {
    int i = 0;
    while (step.owners[i] != owner || member-- > 0) ++i;
    return i;
}

// Keys or values of one KV head: the cached rows, the first of them lent, and the new one behind them
struct Rows {
    const bf16 *cached, *fresh, *lent;
    int stride, length, num_lent;  // a multiple of KEYS

    // Where the rows of the tile are that begins at `key`
    __device__ __forceinline__ const bf16* of(int key) const { return key < num_lent ? lent : cached; }

    __device__ __forceinline__ uint4 load(const bf16* rows, int row, int column) const {
        if (row < length) return load_streaming16(rows + (long long)row * stride + column);
        return *reinterpret_cast<const uint4*>(fresh + column);  // beyond the end too, where the scores are masked
    }
};

using KeyTile = uint4[2][P / 32];
using ValueTile = uint4[4][P / 64];

__device__ __forceinline__ void load_keys(const Rows& rows, int key, KeyTile& tile) {
    const int lane = threadIdx.x % 32;
    const bf16* from = rows.of(key);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < P / 32; ++j) tile[i][j] = rows.load(from, key + 8 * i + lane / 4, 32 * j + 8 * (lane % 4));
}

__device__ __forceinline__ void load_values(const Rows& rows, int key, ValueTile& tile) {
    const int lane = threadIdx.x % 32;
    const bf16* from = rows.of(key);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < P / 64; ++j)
            tile[i][j] = rows.load(from, key + 2 * (lane % 4) + i % 2 + 8 * (i / 2), 64 * j + 8 * (lane / 4));
}

// scores[i][2 side + 0..1]: of row 8 side + lane / 4 and keys 8 i + 2 (lane % 4) + 0..1
__device__ __forceinline__ void score(const uint4 (&q)[SIDES][P / 32], const KeyTile& keys, float (&scores)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < P / 32; ++j) {
            const uint4 low = q[0][j], high = SIDES > 1 ? q[SIDES - 1][j] : uint4{0, 0, 0, 0};
            mma_m16n8k16(scores[i], {low.x, high.x, low.y, high.y}, {keys[i][j].x, keys[i][j].y});
            mma_m16n8k16(scores[i], {low.z, high.z, low.w, high.w}, {keys[i][j].z, keys[i][j].w});
        }
}

__device__ __forceinline__ unsigned word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
__device__ __forceinline__ unsigned lows(unsigned a, unsigned b) { return (a & 0xffffu) | (b << 16); }
__device__ __forceinline__ unsigned highs(unsigned a, unsigned b) { return (a >> 16) | (b & 0xffff0000u); }

// out[4 j + i]: dimensions 64 j + 8 (lane / 4) + 2 i + 0 (elements 0, 1) and + 1 (2, 3) of rows 2 (lane % 4) + 0..1
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

// What a warp knows of its keys: of row lane / 4 of a side the maximum and this lane's share of the sum, and the outputs
struct Partial {
    float maximum = NONE, sum = 0, out[P / 16][4] = {};

    // Scores (base 2) of 16 keys of which the first `count` exist -> their weights as the B fragment of add_values
    __device__ __forceinline__ void weigh(float (&scores)[2][4], int side, float scale, int count, unsigned (&p)[2]) {
        const int lane = threadIdx.x % 32;
        float highest = NONE;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& x = scores[i / 2][2 * side + i % 2];
            x = 8 * (i / 2) + 2 * (lane % 4) + i % 2 < count ? x * scale : NONE;
            highest = fmaxf(highest, x);
        }
        highest = fmaxf(maximum, max_of_quad(highest));
        if (__ballot_sync(ALL, highest > maximum)) rescale(exp2f(maximum - highest));
        maximum = highest;
        float weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = scores[i / 2][2 * side + i % 2];
            weights[i] = x == NONE ? 0.f : exp2f(x - maximum);
            sum += weights[i];
        }
        p[0] = to_bf16x2(weights[0], weights[1]);
        p[1] = to_bf16x2(weights[2], weights[3]);
    }

    __device__ __forceinline__ void rescale(float factor) {
        const int column = 8 * (threadIdx.x % 4);  // the first lane of row 2 (lane % 4)
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
    float maximum[WARPS][8 * SIDES], sum[WARPS][8 * SIDES], out[WARPS][8 * SIDES][P + 1];
};

__device__ __forceinline__ void store_warp(const Partial& own, int side, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = own.sum + __shfl_xor_sync(ALL, own.sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (lane % 4 == 0) {
        shared.maximum[warp][8 * side + lane / 4] = own.maximum;
        shared.sum[warp][8 * side + lane / 4] = sum;
    }
#pragma unroll
    for (int i = 0; i < P / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            shared.out[warp][8 * side + 2 * (lane % 4) + j % 2][64 * (i / 4) + 8 * (lane / 4) + 2 * (i % 4) + j / 2] =
                own.out[i][j];
}

// The warps' partials become the block's: out (P) and (maximum, sum) of each of `heads` rows from `first` on
__device__ __forceinline__ void join_warps(const Shared& shared, int first, int heads, float* out, float* weights) {
    for (int at = threadIdx.x; at < heads * P; at += 32 * WARPS) {
        const int head = at / P, row = first + head;
        float maximum = NONE, sum = 0, total = 0;
        for (int i = 0; i < WARPS; ++i) maximum = fmaxf(maximum, shared.maximum[i][row]);
        for (int i = 0; i < WARPS; ++i) {
            const float factor = exp2f(shared.maximum[i][row] - maximum);
            sum += factor * shared.sum[i][row];
            total += factor * shared.out[i][row][at % P];
        }
        out[at] = total;
        if (at % P == 0) weights[2 * head] = maximum, weights[2 * head + 1] = sum;
    }
}

// q (b, g GROUP, P), k, v (b, g, P); caches: b addresses of (layers, 2, capacity, g, P), capacities, and Step's (b);
// the same of what is lent, its first `num_lent` rows in the place of the cache's, which has none for them
// -> outs (parts, MEMBERS, g GROUP, P), weights (parts, MEMBERS, g GROUP, 2); writes k and v into the caches.
// Grid (parts, g TILES). With 16 rows the registers of two blocks a multiprocessor.
extern "C" __global__ void __launch_bounds__(32 * WARPS, SIDES > 1 ? 2 : 3)
    attend_split(const bf16* q, const bf16* k, const bf16* v, const long long* __restrict__ caches,
                 const long long* __restrict__ capacities, const long long* __restrict__ lengths,
                 const long long* __restrict__ owners, const long long* __restrict__ until,
                 const long long* __restrict__ lenders, const long long* __restrict__ lender_capacities,
                 const long long* __restrict__ num_lent, float* __restrict__ outs, float* __restrict__ weights,
                 long long layer, long long b, long long g, float scale) {
    __shared__ Shared shared;
    grid_launch_dependents();
    const int head = blockIdx.y / TILES, tile = blockIdx.y % TILES, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Step step{lengths, owners, until, (int)b};
    const Part part = find_part(step, blockIdx.x, gridDim.x);
    if (part.sequence < 0) return;
    const long long plane = capacities[part.sequence] * g * P, first_head = head * GROUP + tile * HEADS;
    const int stride = (int)g * P, lent = (int)num_lent[part.sequence];
    bf16* cache = reinterpret_cast<bf16*>(caches[part.sequence]) + 2 * layer * plane + head * P - (long long)lent * stride;
    const long long fresh = (part.sequence * g + head) * P;
    Rows keys{cache, k + fresh, nullptr, stride, part.length, lent};
    Rows values{cache + plane, v + fresh, nullptr, stride, part.length, lent};
    if (lent) {
        const long long lent_plane = lender_capacities[part.sequence] * stride;
        keys.lent = reinterpret_cast<const bf16*>(lenders[part.sequence]) + 2 * layer * lent_plane + head * P;
        values.lent = keys.lent + lent_plane;
    }

    const int heads = min(HEADS, GROUP - tile * HEADS);
    const int members = MEMBERS > 1 && part.together ? count_members(step, part.sequence, step.b) : 1;
    int asking[SIDES];  // of which sequence a row is
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
        asking[side] = part.sequence;
        if (MEMBERS > 1 && part.together)
            asking[side] = find_member(step, part.sequence, min((8 * side + lane / 4) / HEADS, members - 1));
    }

    int key = part.begin + warp * KEYS;
    KeyTile key_tile;
    ValueTile value_tile;
    const bool is_cached = key + KEYS <= part.length;  // then nothing of it comes from the kernel before
    if (!is_cached) grid_wait();
    load_keys(keys, key, key_tile);
    load_values(values, key, value_tile);
    if (is_cached) grid_wait();

    uint4 queries[SIDES][P / 32];
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
        const int row = 8 * side + lane / 4;
        const bool is_used = row / HEADS < members && row % HEADS < heads;
        const bf16* from = q + (asking[side] * g * GROUP + first_head + row % HEADS) * P;
#pragma unroll
        for (int i = 0; i < P / 32; ++i)
            queries[side][i] = is_used ? reinterpret_cast<const uint4*>(from)[4 * i + lane % 4] : uint4{0, 0, 0, 0};
    }
    const bool both = SIDES > 1 && members * HEADS > 8;
    Partial own[SIDES];
    for (; key < part.end; key += STEP) {
        float scores[2][4] = {};
        score(queries, key_tile, scores);
        if (key + STEP < part.end) load_keys(keys, key + STEP, key_tile);
        unsigned p[2];
        own[0].weigh(scores, 0, scale, part.end - key, p);
        add_values(value_tile, p, own[0].out);
        if (both) {
            own[SIDES - 1].weigh(scores, SIDES - 1, scale, part.end - key, p);
            add_values(value_tile, p, own[SIDES - 1].out);
        }
        if (key + STEP < part.end) load_values(values, key + STEP, value_tile);
    }
#pragma unroll
    for (int side = 0; side < SIDES; ++side) store_warp(own[side], side, shared);
    __syncthreads();
    for (int member = 0; member < members; ++member) {
        const long long row = (blockIdx.x * MEMBERS + member) * g * GROUP + first_head;
        join_warps(shared, member * HEADS, heads, outs + row * P, weights + row * 2);
    }
    if (part.end > part.length && tile == 0)
        for (int i = threadIdx.x; i < P; i += 32 * WARPS) {
            cache[part.length * g * P + i] = k[fresh + i];
            cache[plane + part.length * g * P + i] = v[fresh + i];
        }
}

// Where a sequence's partials lie: `num_shared` of them one a part from `shared` on, the others from `alone` on
struct Partials {
    int shared, num_shared, alone, count;

    __device__ __forceinline__ int row(int i) const {
        return MEMBERS == 1 || i >= num_shared ? (alone + i - num_shared) * MEMBERS : shared + i * MEMBERS;
    }
};

__device__ __forceinline__ Partials find_partials(const Step& step, int sequence, int parts) {
    const int keys = keys_a_part(step, parts), owner = MEMBERS > 1 ? (int)step.owners[sequence] : sequence;
    Partials own{};
    int part = 0;
    for (int i = 0; i <= max(owner, sequence); ++i) {
        const int together = parts_together(step, i, keys), alone = parts_alone(step, i, keys);
        if (MEMBERS > 1 && i == owner) {
            own.shared = part * MEMBERS + count_members(step, owner, sequence);
            own.num_shared = together;
        }
        part += together;
        if (i == sequence) own.alone = part, own.count = alone;
        part += alone;
    }
    own.count += own.num_shared;
    return own;
}

// outs (parts, MEMBERS, h, P), weights (parts, MEMBERS, h, 2) -> out (b, h, P). Grid (h, b), JOINERS P threads.
extern "C" __global__ void __launch_bounds__(JOINERS * P)
    attend_combine(const float* outs, const float* weights, const long long* __restrict__ lengths,
                   const long long* __restrict__ owners, const long long* __restrict__ until, bf16* __restrict__ out,
                   long long b, long long parts) {
    __shared__ float totals[JOINERS][P], sums[JOINERS];
    grid_launch_dependents();
    const long long h = gridDim.x, sequence = blockIdx.y;
    const Partials own = find_partials({lengths, owners, until, (int)b}, (int)sequence, (int)parts);
    const int joiner = threadIdx.x / P, column = threadIdx.x % P;
    grid_wait();

    float maximum = NONE, sum = 0, total = 0;
#pragma unroll 8
    for (int i = 0; i < own.count; ++i) maximum = fmaxf(maximum, weights[2 * (own.row(i) * h + blockIdx.x)]);
#pragma unroll 4
    for (int i = joiner; i < own.count; i += JOINERS) {
        const long long row = own.row(i) * h + blockIdx.x;
        const float factor = exp2f(weights[2 * row] - maximum);
        sum += factor * weights[2 * row + 1];
        total += factor * outs[row * P + column];
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
        out[(sequence * h + blockIdx.x) * P + column] = to_bf16(total / sum);
    }
}
