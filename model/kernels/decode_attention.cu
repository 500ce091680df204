// Attention of one new token a sequence over its own KV: the keys of all sequences are cut into parts of equal size, a
// block computes one part of one KV head for up to 8 of its query heads, a second kernel joins the parts. Wrapper,
// shapes and definition: gpu_attention.py.
//
// A block copies tiles of keys and values into shared memory, STAGES - 1 tiles ahead; its warps take 16 keys at a time
// from there into the fragments of mma.m16n8k16. Scores have the heads as rows (as a sum does not care for its order, the
// head dimension is permuted so that every thread reads 16 bytes in a row), outputs the dimensions as rows and the heads as
// columns.
//
// Of sequences that share their first keys (MEMBERS > 1) one's copy is read for up to MEMBERS of them: the query heads of
// all are rows, 16 a warp. Warps that have the same rows take turns at the keys of a tile: all four of them for up to 16
// rows, two each for up to 32. What lies behind the shared keys is read for each alone. A copy may lie in two places,
// the first of its keys lent by another sequence: other addresses, the same parts and so the same bits.
//
// Constants: HEAD_DIM p (a multiple of 64), GROUP query heads a KV head, MEMBERS sequences of a block, STAGES, BLOCKS of a
// multiprocessor.
#include "gpu.cuh"

constexpr int P = HEAD_DIM;
constexpr int HEADS = GROUP < 8 ? GROUP : 8, TILES = (GROUP + 7) / 8;  // query heads of a block, blocks a KV head
constexpr int SIDES = MEMBERS * HEADS > 8 ? 2 : 1, ROWS = 8 * SIDES;    // products of values, 8 columns each; of a warp
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int KEYS = 16, TILE = 64;                     // keys of a product, and of a tile
constexpr int KEY_PITCH = P + 32, VALUE_PITCH = P + 8;  // a quarter of a warp reads 16 bytes a lane from all banks
constexpr int JOINERS = 4;                              // threads of attend_combine a dimension
constexpr float NONE = -1e30f;                          // the maximum of no scores
constexpr unsigned ALL = 0xffffffffu;

static_assert(MEMBERS * HEADS <= WARPS * ROWS, "each row needs a warp");

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
    return (keys + TILE - 1) / TILE * TILE;
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
    int stride, length, num_lent;  // num_lent: a multiple of TILE

    // Starts the copies of TILE rows from `key` on, this thread's share of them; beyond the end, where the scores are
    // masked, copies of the new one
    template <int PITCH>
    __device__ __forceinline__ void fetch(bf16 (&to)[TILE][PITCH], int key) const {
        constexpr int APART = 8 * THREADS / P;
        const int first = threadIdx.x / (P / 8), column = threadIdx.x % (P / 8) * 8;
        const bf16* from = (key < num_lent ? lent : cached) + (long long)(key + first) * stride + column;
        const bool is_cached = key + TILE <= length;
#pragma unroll
        for (int i = 0; i < TILE / APART; ++i) {
            const bf16* row = from + i * APART * stride;
            if (!is_cached && key + first + i * APART >= length) row = fresh + column;
            cp_async16(&to[first + i * APART][column], row);
        }
    }
};
static_assert(THREADS % (P / 8) == 0 && TILE * P % (8 * THREADS) == 0, "the threads must share a tile evenly");

struct Tile {
    bf16 keys[TILE][KEY_PITCH], values[TILE][VALUE_PITCH];
};

__device__ __forceinline__ uint4 load16(const bf16* from) { return *reinterpret_cast<const uint4*>(from); }

// Scores of 16 keys from `key` of the tile on; scores[i][2 side + 0..1]: of row 8 side + lane / 4 and keys
// 8 i + 2 (lane % 4) + 0..1. Two chains of products each, as one waits for its last sum
__device__ __forceinline__ void score(const uint4 (&q)[SIDES][P / 32], const Tile& tile, int key, float (&scores)[2][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float odd[4] = {};
#pragma unroll
        for (int j = 0; j < P / 32; ++j) {
            const uint4 low = q[0][j], high = SIDES > 1 ? q[SIDES - 1][j] : uint4{0, 0, 0, 0};
            const uint4 k = load16(&tile.keys[key + 8 * i + lane / 4][32 * j + 8 * (lane % 4)]);
            mma_m16n8k16(scores[i], {low.x, high.x, low.y, high.y}, {k.x, k.y});
            mma_m16n8k16(odd, {low.z, high.z, low.w, high.w}, {k.z, k.w});
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] += odd[j];
    }
}

__device__ __forceinline__ float max_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

// What a warp knows of its keys: of row lane / 4 of a side the maximum and this lane's share of the sum, and the outputs:
// out[i]: dimensions 16 i + lane / 4 + 0 (elements 0, 1) and + 8 (2, 3) of rows 2 (lane % 4) + 0..1
struct Partial {
    float maximum[SIDES], sum[SIDES], out[SIDES][P / 16][4];

    __device__ __forceinline__ Partial() : sum(), out() {
#pragma unroll
        for (int side = 0; side < SIDES; ++side) maximum[side] = NONE;
    }

    // Scores of 16 keys of which the first `count` exist, at least one -> their weights as the B fragment of add_values;
    // scale > 0 makes them powers of 2
    __device__ __forceinline__ void weigh(float (&scores)[2][4], float scale, int count, unsigned (&p)[SIDES][2]) {
        const int lane = threadIdx.x % 32;
        if (count < KEYS)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= count) scores[i / 4][i % 4] = NONE;
        float highest[SIDES];
        bool grows = false;
#pragma unroll
        for (int side = 0; side < SIDES; ++side) {
            const float own = fmaxf(fmaxf(scores[0][2 * side], scores[0][2 * side + 1]),
                                    fmaxf(scores[1][2 * side], scores[1][2 * side + 1]));
            highest[side] = fmaxf(maximum[side], max_of_quad(own) * scale);
            grows |= highest[side] > maximum[side];
        }
        if (__ballot_sync(ALL, grows))
#pragma unroll
            for (int side = 0; side < SIDES; ++side) rescale(side, highest[side]);
#pragma unroll
        for (int side = 0; side < SIDES; ++side)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float even = exp2_fast(fmaf(scores[i][2 * side], scale, -maximum[side]));
                const float odd = exp2_fast(fmaf(scores[i][2 * side + 1], scale, -maximum[side]));
                sum[side] += even + odd;
                p[side][i] = to_bf16x2(even, odd);
            }
    }

    __device__ __forceinline__ void rescale(int side, float highest) {
        const float factor = exp2_fast(maximum[side] - highest);
        const int column = 8 * (threadIdx.x % 4);  // the first lane of row 2 (lane % 4)
        const float even = __shfl_sync(ALL, factor, column), odd = __shfl_sync(ALL, factor, column + 4);
        maximum[side] = highest;
        sum[side] *= factor;
#pragma unroll
        for (int i = 0; i < P / 16; ++i) {
            out[side][i][0] *= even;
            out[side][i][1] *= odd;
            out[side][i][2] *= even;
            out[side][i][3] *= odd;
        }
    }

    // Adds the weights p times the values of 16 keys, from `key` of the tile on
    __device__ __forceinline__ void add_values(const Tile& tile, int key, const unsigned (&p)[SIDES][2]) {
        const int lane = threadIdx.x % 32;
        const bf16* row = &tile.values[key + lane % 8 + 8 * (lane / 16)][8 * (lane / 8 % 2)];
#pragma unroll
        for (int i = 0; i < P / 16; ++i) {
            unsigned v[4];
            load_transposed(v, row + 16 * i);
#pragma unroll
            for (int side = 0; side < SIDES; ++side) mma_m16n8k16(out[side][i], v, p[side]);
        }
    }
};

struct Joined {
    float maximum[WARPS][ROWS], sum[WARPS][ROWS], out[WARPS][ROWS][P + 1];
};
static_assert(sizeof(Joined) <= STAGES * sizeof(Tile), "the warps' results take the place of the tiles");

__device__ __forceinline__ void store_warp(const Partial& own, Joined& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
        float sum = own.sum[side] + __shfl_xor_sync(ALL, own.sum[side], 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        if (lane % 4 == 0) {
            shared.maximum[warp][8 * side + lane / 4] = own.maximum[side];
            shared.sum[warp][8 * side + lane / 4] = sum;
        }
#pragma unroll
        for (int i = 0; i < P / 16; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                shared.out[warp][8 * side + 2 * (lane % 4) + j % 2][16 * i + lane / 4 + 8 * (j / 2)] =
                    own.out[side][i][j];
    }
}

// The results of a row's warps become the block's: out (P) and (maximum, sum) of each of `heads` rows from `first` on
__device__ __forceinline__ void join_warps(const Joined& shared, int row_blocks, int turns, int first, int heads,
                                           float* out, float* weights) {
    for (int at = threadIdx.x; at < heads * P; at += THREADS) {
        const int head = at / P, row = (first + head) % ROWS, warp = (first + head) / ROWS;
        float maximum = NONE, sum = 0, total = 0;
        for (int i = 0; i < turns; ++i) maximum = fmaxf(maximum, shared.maximum[warp + i * row_blocks][row]);
        for (int i = 0; i < turns; ++i) {
            const float factor = exp2f(shared.maximum[warp + i * row_blocks][row] - maximum);
            sum += factor * shared.sum[warp + i * row_blocks][row];
            total += factor * shared.out[warp + i * row_blocks][row][at % P];
        }
        out[at] = total;
        if (at % P == 0) weights[2 * head] = maximum, weights[2 * head + 1] = sum;
    }
}

// q (b, g GROUP, P), k, v (b, g, P); caches: b addresses of (layers, 2, capacity, g, P), capacities, and Step's (b);
// the same of what is lent, its first `num_lent` rows in the place of the cache's, which has none for them
// -> outs (parts, MEMBERS, g GROUP, P), weights (parts, MEMBERS, g GROUP, 2); writes k and v into the caches.
// Grid (parts, g TILES), shared memory for STAGES tiles.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attend_split(const bf16* q, const bf16* k, const bf16* v, const long long* __restrict__ caches,
                 const long long* __restrict__ capacities, const long long* __restrict__ lengths,
                 const long long* __restrict__ owners, const long long* __restrict__ until,
                 const long long* __restrict__ lenders, const long long* __restrict__ lender_capacities,
                 const long long* __restrict__ num_lent, float* __restrict__ outs, float* __restrict__ weights,
                 long long layer, long long b, long long g, float scale) {
    SHARED_MEMORY(Tile, tiles);
    grid_launch_dependents();
    const int head = blockIdx.y / TILES, head_tile = blockIdx.y % TILES, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Step step{lengths, owners, until, (int)b};
    const Part part = find_part(step, blockIdx.x, gridDim.x);
    if (part.sequence < 0) return;
    const long long plane = capacities[part.sequence] * g * P, first_head = head * GROUP + head_tile * HEADS;
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

    const auto fetch = [&](Tile& tile, int key) {
        keys.fetch(tile.keys, key);
        values.fetch(tile.values, key);
    };
    if (part.begin + (STAGES - 1) * TILE > part.length) grid_wait();  // what is fetched first includes the new row
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (part.begin + i * TILE < part.end) fetch(tiles[i], part.begin + i * TILE);
        cp_async_commit();
    }
    if (part.begin + (STAGES - 1) * TILE <= part.length) grid_wait();

    const int heads = min(HEADS, GROUP - head_tile * HEADS);
    const int members = MEMBERS > 1 && part.together ? count_members(step, part.sequence, step.b) : 1;
    const int row_blocks = (members * HEADS + ROWS - 1) / ROWS, turns = WARPS / row_blocks;
    const int row_block = warp % row_blocks, turn = warp / row_blocks;
    uint4 queries[SIDES][P / 32];
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
        const int row = row_block * ROWS + 8 * side + lane / 4, member = row / HEADS;
        int asking = part.sequence;
        if (MEMBERS > 1 && part.together) asking = find_member(step, part.sequence, min(member, members - 1));
        const bool is_used = member < members && row % HEADS < heads;
        const bf16* from = q + (asking * g * GROUP + first_head + row % HEADS) * P;
#pragma unroll
        for (int i = 0; i < P / 32; ++i)
            queries[side][i] = is_used ? load16(from + 32 * i + 8 * (lane % 4)) : uint4{0, 0, 0, 0};
    }
    Partial own;
    int stage = 0;
    for (int begin = part.begin; begin < part.end; begin += TILE) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        const int next = begin + (STAGES - 1) * TILE, free = stage ? stage - 1 : STAGES - 1;
        if (next < part.end) fetch(tiles[free], next);
        cp_async_commit();
        for (int key = turn < turns ? KEYS * turn : TILE; key < min(TILE, part.end - begin); key += KEYS * turns) {
            float scores[2][4] = {};
            unsigned p[SIDES][2];
            score(queries, tiles[stage], key, scores);
            own.weigh(scores, scale, part.end - begin - key, p);
            own.add_values(tiles[stage], key, p);
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    Joined& joined = *reinterpret_cast<Joined*>(tiles);
    store_warp(own, joined);
    __syncthreads();
    for (int member = 0; member < members; ++member) {
        const long long row = (blockIdx.x * MEMBERS + member) * g * GROUP + first_head;
        join_warps(joined, row_blocks, turns, member * HEADS, heads, outs + row * P, weights + row * 2);
    }
    if (part.end > part.length && head_tile == 0)
        for (int i = threadIdx.x; i < P; i += THREADS) {
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
