// Products of a few tokens with int8 rows, and what follows them at once: bias, SwiGLU, the causal convolution's step.
// How the work is shared and what the constants mean: linear.cuh.
#include "linear.cuh"

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

#if PAIRED
struct Gated {
    bf16* out;
    int num_rows;

    __device__ __forceinline__ void prepare(int, int, int) {}
    __device__ __forceinline__ void write(int, int row, int, int token, const float (&total)[2])
    {
        if (row >= num_rows) return;
        out[(long long)token * num_rows + row] = to_bf16(silu(total[0]) * total[1]);
    }
    __device__ __forceinline__ void end(int, int, int) {}
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
swiglu_rows(const bf16* x, const signed char* gate, const float* gate_scale, const signed char* up,
            const float* up_scale, bf16* out, long long tokens, long long num_rows, long long columns)
{
    const Dense weights{{gate, up}, {gate_scale, up_scale}, (int)num_rows, (int)columns, (int)tokens,
                        count_items(num_rows)};
    multiply<true>(weights, x, columns, Gated{out, (int)num_rows});
}

// Which weights to read is known only after the wait. Dependents start after it too, so `chosen` is theirs to read.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
experts_gate_up(const bf16* x, const int* chosen, const signed char* weight, const float* scale, bf16* out,
                long long assignments, long long top_k, long long num_experts, long long num_rows, long long columns)
{
    __shared__ Routing routing;
    grid_wait();
    grid_launch_dependents();
    routing.fill(chosen, assignments, num_experts);
    const int tiles = count_items(num_rows);
    const Routed weights{routing, weight,     scale, (int)num_rows,           (int)columns,
                         (int)top_k, tiles, tiles * routing.num_slots};
    multiply<false>(weights, x, columns, Gated{out, (int)num_rows});
}
#else
// float32 or bfloat16. With SPLIT the blocks of one tile leave their parts in `parts` (split, token, row); the last of
// them to arrive adds up, always in the same order.
template <class T>
struct Rows {
    T* out;
    const bf16* bias;
    int num_rows;
    float *parts, *arrived;
    bool* is_last;  // in shared memory

    __device__ __forceinline__ void prepare(int, int, int) {}
    __device__ __forceinline__ void store(int row, int token, float value)
    {
        if (bias) value += to_float(bias[row]);
        out[(long long)token * num_rows + row] = from_float<T>(value);
    }
    __device__ __forceinline__ void write(int item, int row, int, int token, const float (&total)[1])
    {
        if (row >= num_rows) return;
        if (SPLIT > 1)
            parts[((long long)(item % SPLIT) * TOKENS + token) * num_rows + row] = total[0];
        else
            store(row, token, total[0]);
    }
    __device__ __forceinline__ void end(int item, int row, int count)
    {
        if (SPLIT == 1) return;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *is_last = atomicAdd(arrived + item / SPLIT, 1.f) == SPLIT - 1;
        __syncthreads();
        if (!*is_last) return;
        __threadfence();
        for (int n = threadIdx.x / OUT_ROWS; n < count && row < num_rows; n += THREADS / OUT_ROWS) {
            float total = 0;
            for (int split = 0; split < SPLIT; ++split)
                total += *static_cast<const volatile float*>(parts + ((long long)split * TOKENS + n) * num_rows + row);
            store(row, n, total);
        }
        if (threadIdx.x == 0) arrived[item / SPLIT] = 0;
    }
};
#if OUT_FLOAT
using Out = float;
#else
using Out = bf16;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
int8_rows(const bf16* x, const signed char* weight, const float* scale, const bf16* bias, Out* out, float* parts,
          float* arrived, long long tokens, long long num_rows, long long columns)
{
    __shared__ bool is_last;
    const Dense weights{{weight}, {scale}, (int)num_rows, (int)columns, (int)tokens, count_items(num_rows)};
    multiply<true>(weights, x, columns, Rows<Out>{out, bias, (int)num_rows, parts, arrived, &is_last});
}

// Follows experts_gate_up, which is behind the wait for whoever chose: `chosen` can be read before this one's own.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
experts_down(const bf16* x, const int* chosen, const signed char* weight, const float* scale, float* out,
             long long assignments, long long num_experts, long long num_rows, long long columns)
{
    __shared__ Routing routing;
    routing.fill(chosen, assignments, num_experts);
    const int tiles = count_items(num_rows);
    const Routed weights{routing, weight, scale, (int)num_rows, (int)columns, 1, tiles, tiles * routing.num_slots};
    multiply<true>(weights, x, columns, Rows<float>{out, nullptr, (int)num_rows, nullptr, nullptr, nullptr});
}

#if WIDTH
// Rows below e: one step of the causal convolution and SiLU, advancing conv (e, WIDTH - 1) of each sequence. The rest: z.
struct Convolved {
    const bf16 *bias, *conv_weight, *conv_bias;
    const long long* states;
    long long offset;
    bf16 *u, *z;
    int e;
    float past[WIDTH - 1], taps[WIDTH];  // of this thread's first output of an item, fetched before its products

    __device__ __forceinline__ bf16* state(int row, int n) const
    {
        return reinterpret_cast<bf16*>(states[n]) + offset + row * (WIDTH - 1);
    }
    __device__ __forceinline__ void fetch(int row, int n)
    {
#pragma unroll
        for (int i = 0; i < WIDTH - 1; ++i) past[i] = to_float(state(row, n)[i]);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) taps[i] = to_float(conv_weight[row * WIDTH + i]);
    }
    __device__ __forceinline__ void prepare(int row, int n, int count)
    {
        if (row < e && n < count) fetch(row, n);
    }
    __device__ __forceinline__ void write(int, int row, int n, int, const float (&total)[1])
    {
        if (row >= 2 * e) return;
        const bf16 value = to_bf16(bias ? total[0] + to_float(bias[row]) : total[0]);
        if (row >= e) {
            z[(long long)n * e + row - e] = value;
            return;
        }
        if (n >= THREADS / OUT_ROWS) fetch(row, n);
        float sum = to_float(value) * taps[WIDTH - 1] + (conv_bias ? to_float(conv_bias[row]) : 0.f);
#pragma unroll
        for (int i = 0; i < WIDTH - 1; ++i) {
            sum += past[i] * taps[i];
            state(row, n)[i] = i + 2 < WIDTH ? to_bf16(past[i + 1]) : value;
        }
        u[(long long)n * e + row] = to_bf16(silu(sum));
    }
    __device__ __forceinline__ void end(int, int, int) {}
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
in_proj_conv(const bf16* x, const signed char* weight, const float* scale, const bf16* bias, const bf16* conv_weight,
             const bf16* conv_bias, const long long* states, long long offset, bf16* u, bf16* z, long long tokens,
             long long e, long long columns)
{
    const Dense weights{{weight}, {scale}, (int)(2 * e), (int)columns, (int)tokens, count_items(2 * e)};
    multiply<true>(weights, x, columns, Convolved{bias, conv_weight, conv_bias, states, offset, u, z, (int)e});
}
#endif
#endif
