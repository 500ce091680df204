// Products of a few tokens (1..64) with int8 rows: each weight is read once, from device memory into registers, turned
// into bfloat16 there and multiplied by the tensor cores, weights as the 16-row operand, tokens as the 8-column one.
//
// A block works through items: OUT_ROWS outputs each over all columns (or a SPLIT-th of them). Its warps share an item
// by rows (WARPS_N) and by columns (WARPS_K) and add up in shared memory. A warp eats units of 16 * ROW_TILES rows x
// 128 columns; DEPTH units are always on their way, past the end of an item into the next, the first before grid_wait().
// Lane 4 g + q holds 16 adjacent bytes of rows g and g + 8, which is another order of columns than mma has, for the
// tokens too: any order will do. For 8 tokens a lane spends about 47 instructions on 16 bytes of weights (32 to widen
// them, 2 mma, 2 loads, the rest its share of a unit's addresses): 30% of an H100's issue slots at 3 TB/s.
// STAGES: many tokens do not fit the L1 cache beside each other; a block then brings a step's columns of all of them into
// shared memory, STAGES - 1 steps ahead. The more rows an item has, the less often tokens are read from the L2 cache.
// PAIRED: the first half of the row tiles are gates, the other their ups.
#pragma once
#include "gpu.cuh"

constexpr int UNIT = 128;  // columns: a row's full line of memory
constexpr int THREADS = 32 * WARPS_N * WARPS_K;
constexpr int PARTS = PAIRED ? 2 : 1;
constexpr int OUT_TILES = ROW_TILES / PARTS;
constexpr int OUT_ROWS = 16 * OUT_TILES * WARPS_N;
constexpr int TOKENS = 8 * TOKEN_TILES;
constexpr int STRIDE = OUT_ROWS + 4;  // of a token's sums in shared memory: no two lanes of a store in one bank
constexpr int MAX_ASSIGNMENTS = 128;
constexpr int MAX_EXPERTS = 64;
constexpr int MAX_SLOTS = MAX_EXPERTS + MAX_ASSIGNMENTS / TOKENS;
constexpr int CHUNK = UNIT * WARPS_K;  // columns of a step
constexpr int PITCH = CHUNK + 8;       // of a staged token: a quarter of a warp reads 16 bytes a lane from all banks
constexpr int TOGETHER = STAGES && TOKEN_TILES > 1 ? 2 : 1;  // token tiles whose chains of products alternate
static_assert(ROW_TILES % PARTS == 0 && THREADS % OUT_ROWS == 0, "rows of an item must divide among the threads");

struct Unit {
    uint4 bytes[ROW_TILES][2][2];  // [row tile][64 columns][row g, row g + 8]
};

struct Place {  // of this thread in its block
    int warp_k = threadIdx.x / 32 % WARPS_K, warp_n = threadIdx.x / 32 / WARPS_K;
    int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
};

__device__ __forceinline__ int item_row(const Place& place, int tile, int half)
{
    return (place.warp_n * OUT_TILES + tile % OUT_TILES) * 16 + 8 * half + place.g;
}

__device__ __forceinline__ bf16x2 subtract(bf16x2 x, bf16x2 y)
{
#ifdef CUDA_ON_CPU
    const float2 a = to_float2(x), b = to_float2(y);
    return to_bf16x2(a.x - b.x, a.y - b.y);
#else
    bf16x2 difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(y), "r"(0xbf80bf80u), "r"(x));  // x - 1.0 y
    return difference;
#endif
}

// Two bytes of `word` as bfloat16: 128 + the low seven bits, less 128 or, with the sign bit, 256; all exact.
__device__ __forceinline__ bf16x2 widen(unsigned word, unsigned select)
{
    const unsigned bits = __byte_perm(word, 0x43434343u, select);
    return subtract(bits & 0xff7fff7fu, bits & 0xff80ff80u);
}

__device__ __forceinline__ void widen_row(const uint4& bytes, unsigned (&a)[4][4], int half)
{
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        a[j][half] = widen(words[j], 0x4140);
        a[j][half + 2] = widen(words[j], 0x4342);
    }
}

// acc += weights of one unit, from `column` on, times the tokens whose rows of x begin at `token`.
__device__ __forceinline__ void multiply_unit(const Unit& unit, const bf16* x, const int (&token)[TOKEN_TILES],
                                              int column, int columns, int count,
                                              float (&acc)[ROW_TILES][TOKEN_TILES][4])
{
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = column + 64 * half;
        const bool inside = STAGES || !TAIL || at < columns;
        unsigned a[ROW_TILES][4][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            widen_row(unit.bytes[r][half][0], a[r], 0);
            widen_row(unit.bytes[r][half][1], a[r], 1);
        }
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; tile += TOGETHER) {
            if (tile && 8 * tile >= count) break;
            unsigned b[TOGETHER][4][2];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
                if (inside) {
                    const uint4* row = reinterpret_cast<const uint4*>(x + token[tile + i] + at);
                    low = row[0], high = row[1];
                }
                b[i][0][0] = low.x, b[i][0][1] = low.y, b[i][1][0] = low.z, b[i][1][1] = low.w;
                b[i][2][0] = high.x, b[i][2][1] = high.y, b[i][3][0] = high.z, b[i][3][1] = high.w;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                    for (int r = 0; r < ROW_TILES; ++r) mma_m16n8k16(acc[r][tile + i], a[r][j], b[i][j]);
        }
    }
}

// Which units an item has, and how many a warp takes of it; warps of the last rounds may find none left.
struct Span {
    int units, length, steps;

    __device__ explicit Span(int columns)
        : units((columns + UNIT - 1) / UNIT), length((units + SPLIT - 1) / SPLIT),
          steps((length + WARPS_K * DEPTH - 1) / (WARPS_K * DEPTH) * DEPTH) {}
    __device__ int first(int item) const { return item % SPLIT * length; }
    __device__ int last(int item) const { return min(first(item) + length, units); }
};

#if STAGES
// A thread's share of the tokens of an item on their way into shared memory: every ROWS-th row of one 16-byte column.
struct Stager {
    static constexpr int ROWS = 2 * WARPS_N, PIECES = TOKENS / ROWS;
    static_assert(STAGES > 1 && PIECES * ROWS == TOKENS, "the threads must share the tokens of a step evenly");
    bf16* rooms;  // (STAGES, TOKENS, PITCH)
    const bf16* x;
    int columns, count, at, end, own = threadIdx.x % (CHUNK / 8) * 8, first = threadIdx.x / (CHUNK / 8), room = 0;
    int from[PIECES];

    template <class Weights>
    __device__ __forceinline__ void begin(const Weights& weights, int item, const Span& span)
    {
        at = span.first(item) * UNIT + own, end = min(span.last(item) * UNIT, columns);
        count = weights.count(item), room = 0;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) from[i] = weights.token(item, min(first + i * ROWS, count - 1)) * columns;
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) fetch();
    }
    // The next step's; past the end of a row: zeros.
    __device__ __forceinline__ void fetch()
    {
        bf16* to = rooms + (room * TOKENS + first) * PITCH + own;
#pragma unroll
        for (int i = 0; i < PIECES; ++i, to += ROWS * PITCH) {
            if (first + i * ROWS >= count) break;
            if (at < end)
                cp_async16(to, x + from[i] + at);
            else if (TAIL && at >= columns)
                *reinterpret_cast<uint4*>(to) = {0, 0, 0, 0};
        }
        cp_async_commit();
        at += CHUNK, room = room + 1 == STAGES ? 0 : room + 1;
    }
    // The oldest step's tokens, when all threads' shares have come; then the room before them may be filled again.
    __device__ __forceinline__ const bf16* take()
    {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        const int oldest = room + 1 >= STAGES ? room + 1 - STAGES : room + 1;
        fetch();
        return rooms + oldest * TOKENS * PITCH;
    }
};
#endif

// Runs DEPTH units ahead of the products.
template <class Weights>
struct Loader {
    const Weights& weights;
    const Span& span;
    const Place& place;
    int columns, item = blockIdx.x, step = 0;
    const signed char* rows[ROW_TILES][2] = {};

    __device__ __forceinline__ void find_rows()
    {
        if (item >= weights.items) return;
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                rows[r][half] = weights.row(item, r / OUT_TILES, item_row(place, r, half));
    }

    __device__ __forceinline__ void next(Unit& unit)
    {
        const int index = span.first(item) + step * WARPS_K + place.warp_k;
        if (item < weights.items && index < span.last(item)) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int at = index * UNIT + 64 * half + 16 * place.q;
                    if (TAIL) at = min(at, columns - 16);  // what is read twice meets tokens of zero
                    unit.bytes[r][half][0] = load_streaming16(rows[r][0] + at);
                    unit.bytes[r][half][1] = load_streaming16(rows[r][1] + at);
                }
        }
        if (++step == span.steps) {
            step = 0, item += gridDim.x;
            find_rows();
        }
    }
};

template <bool WAIT, class Weights, class Output>
__device__ __forceinline__ void multiply(const Weights& weights, const bf16* x, int columns, Output output)
{
    SHARED_MEMORY(float, sums);  // (WARPS_K, PARTS, TOKENS, STRIDE)
    const Place place;
    const Span span(columns);
    Loader<Weights> loader{weights, span, place, columns};
    Unit ring[DEPTH] = {};
    loader.find_rows();
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) loader.next(ring[d]);
    if (WAIT) grid_wait(), grid_launch_dependents();
#if STAGES
    Stager stager{reinterpret_cast<bf16*>(sums + WARPS_K * PARTS * TOKENS * STRIDE), x, columns};
#endif

    for (int item = blockIdx.x; item < weights.items; item += gridDim.x) {
        const int count = weights.count(item), own = threadIdx.x % OUT_ROWS;
        float scale[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) scale[part] = weights.scale(item, part, own);
        output.prepare(weights.out_row(item, own), threadIdx.x / OUT_ROWS, count);
        int token[TOKEN_TILES];
#if STAGES
        stager.begin(weights, item, span);
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) token[tile] = (8 * tile + place.g) * PITCH;
#else
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile)
            token[tile] = weights.token(item, min(8 * tile + place.g, count - 1)) * columns;
#endif
        float acc[ROW_TILES][TOKEN_TILES][4] = {};
        for (int step = 0; step < span.steps; step += DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int index = span.first(item) + (step + d) * WARPS_K + place.warp_k;
#if STAGES
                const bf16* room = stager.take();
                if (index < span.last(item))
                    multiply_unit(ring[d], room, token, place.warp_k * UNIT + 16 * place.q, columns, TOKENS, acc);
#else
                if (index < span.last(item))
                    multiply_unit(ring[d], x, token, index * UNIT + 16 * place.q, columns, count, acc);
#endif
                loader.next(ring[d]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int tile = 0; tile < TOKEN_TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = 8 * tile + 2 * place.q + i % 2, part = r / OUT_TILES;
                    if (n < count)
                        sums[((place.warp_k * PARTS + part) * TOKENS + n) * STRIDE + item_row(place, r, i / 2)] =
                            acc[r][tile][i];
                }
        __syncthreads();
#pragma unroll 1
        for (int n = threadIdx.x / OUT_ROWS; n < count; n += THREADS / OUT_ROWS) {
            float total[PARTS] = {};
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                for (int k = 0; k < WARPS_K; ++k) total[part] += sums[((k * PARTS + part) * TOKENS + n) * STRIDE + own];
                total[part] *= scale[part];
            }
            output.write(item, weights.out_row(item, own), n, weights.out_token(item, n), total);
        }
        output.end(item, weights.out_row(item, own), count);
        __syncthreads();
    }
}

// One matrix, or the two of a pair, that all tokens meet.
struct Dense {
    const signed char* weight[PARTS];
    const float* scales[PARTS];
    int num_rows, columns, num_tokens, items;

    __device__ __forceinline__ int out_row(int item, int row) const { return item / SPLIT * OUT_ROWS + row; }
    __device__ __forceinline__ const signed char* row(int item, int part, int row) const
    {
        return weight[part] + (long long)min(out_row(item, row), num_rows - 1) * columns;
    }
    __device__ __forceinline__ float scale(int item, int part, int row) const
    {
        return scales[part][min(out_row(item, row), num_rows - 1)];
    }
    __device__ __forceinline__ int count(int) const { return num_tokens; }
    __device__ __forceinline__ int token(int, int n) const { return n; }
    __device__ __forceinline__ int out_token(int, int n) const { return n; }
};

__device__ __forceinline__ int count_items(int num_rows) { return (num_rows + OUT_ROWS - 1) / OUT_ROWS * SPLIT; }

// The chosen experts in ascending order, and which assignments (token * k + rank) each has; one with more than TOKENS
// of them has several slots. Every block makes its own.
struct Routing {
    int chosen[MAX_ASSIGNMENTS], sorted[MAX_ASSIGNMENTS];
    int start[MAX_EXPERTS + 1], slot_expert[MAX_SLOTS], slot_start[MAX_SLOTS + 1], num_slots;

    __device__ void fill(const int* from, int assignments, int num_experts)
    {
        const int expert = threadIdx.x;
        for (int i = threadIdx.x; i < assignments; i += THREADS) chosen[i] = from[i];
        __syncthreads();
        if (expert < num_experts) {
            int before = 0;
            for (int i = 0; i < assignments; ++i) before += chosen[i] < expert;
            start[expert] = before;
            for (int i = 0; i < assignments; ++i)
                if (chosen[i] == expert) sorted[before++] = i;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int slots = 0;
            start[num_experts] = assignments;
            for (int e = 0, at = 0; e < num_experts; ++e)
                for (const int end = start[e + 1]; at < end; at = min(at + TOKENS, end))
                    slot_expert[slots] = e, slot_start[slots++] = at;
            slot_start[slots] = assignments, num_slots = slots;
        }
        __syncthreads();
    }
};

// The matrices of the chosen experts; each meets its own tokens. `x_share` assignments have one row of x in common.
struct Routed {
    const Routing& routing;
    const signed char* weight;
    const float* scales;
    int num_rows, columns, x_share, tiles, items;  // num_rows: of one part

    __device__ __forceinline__ int out_row(int item, int row) const { return item % tiles * OUT_ROWS + row; }
    __device__ __forceinline__ long long expert_row(int item, int part, int row) const
    {
        const long long expert = routing.slot_expert[item / tiles];
        return (expert * PARTS + part) * num_rows + min(out_row(item, row), num_rows - 1);
    }
    __device__ __forceinline__ const signed char* row(int item, int part, int row) const
    {
        return weight + expert_row(item, part, row) * columns;
    }
    __device__ __forceinline__ float scale(int item, int part, int row) const
    {
        return scales[expert_row(item, part, row)];
    }
    __device__ __forceinline__ int count(int item) const
    {
        return routing.slot_start[item / tiles + 1] - routing.slot_start[item / tiles];
    }
    __device__ __forceinline__ int out_token(int item, int n) const
    {
        return routing.sorted[routing.slot_start[item / tiles] + n];
    }
    __device__ __forceinline__ int token(int item, int n) const { return out_token(item, n) / x_share; }
};
