// The selective scan of a prompt, forward only. Definition: selective_scan.py.
//
// LANES lanes hold a channel's N states, a lane its share of CHANNELS_PER_LANE channels; a block walks TILE steps at a
// time over CHANNELS channels. While the recurrence of a tile runs, the next one is prepared (softplus, delta u) and
// the one before it finished (D u, SiLU gate), so that a tile needs one barrier; the loads are another tile ahead.
// Lanes' parts of y are summed LANES steps at once: each exchange halves what a lane still has to add.
//
// CHUNKED: few channels do not fill the card, so the sequence is cut. Launch 1 (first_chunk 0) runs chunk 0 as a whole
// and the others but the last from a zero state, only for their end states and sums of delta; launch 2 (first_chunk 1)
// runs chunks 1... as a whole from the states that follow from these: exp(A sum of delta) carries a state past a chunk.
//
// A lane's step of four states in sm_90 code (LANES 4): 4 MUFU.EX2, 17 FMUL/FFMA, 2.5 LDS.128, 0.75 SHFL, 2.25 FSEL and
// FADD: 26.5 instructions; preparing and finishing add 11.7 (0.75 MUFU). For 8192 channels x 8192 steps on an H100 that
// is 0.35 ms of exponentials (16 a clock and multiprocessor) and as much of issue slots: the two limits to balance.
#include "channels.cuh"

using Activation = Float<ACTIVATION_BITS>::type;
using Row = Float<ROW_BITS>::type;

constexpr int STATES = N / LANES, THREADS = CHANNELS * LANES / CHANNELS_PER_LANE;
constexpr int OCTETS = CHANNELS / 8, PIECES = TILE * OCTETS / THREADS, ROW_VALUES = TILE * N / THREADS;
constexpr int GROUP = 32 / LANES, Y_PITCH = CHANNELS + 8;
constexpr int STEP_STRIDE = THREADS / OCTETS;  // between a thread's pieces
constexpr int PATTERNS = OCTETS < 8 ? 8 / OCTETS : 1;  // of slot()
static_assert(STATES * LANES == N && STATES % 2 == 0 && LANES % 2 == 0, "a lane takes its states two by two");
static_assert(PIECES * THREADS == TILE * OCTETS && ROW_VALUES * THREADS == TILE * N && N % ROW_VALUES == 0 &&
                  CHANNELS % (GROUP * CHANNELS_PER_LANE) == 0 && TILE % LANES == 0,
              "threads share evenly");

// log(1 + exp(x)) = max(x, 0) + log1p(v), v = exp(-|x|) <= 1; log1p(v) / v by interpolation at Chebyshev's points,
// within 4e-8 of it: the hardware's logarithm is not close enough where delta is small.
__device__ __forceinline__ float softplus(float x) {
    const float v = exp2_fast(-LOG2E * fabsf(x));
    float series = 0.00512610214f;
    series = fmaf(series, v, -0.0290740647f);
    series = fmaf(series, v, 0.0775160867f);
    series = fmaf(series, v, -0.136022476f);
    series = fmaf(series, v, 0.190768807f);
    series = fmaf(series, v, -0.24835399f);
    series = fmaf(series, v, 0.333181217f);
    series = fmaf(series, v, -0.49999445f);
    series = fmaf(series, v, 0.999999966f);
    return fmaf(v, series, fmaxf(x, 0.0f));
}

// Sums value[i] over the LANES lanes of a channel, for each i; lane l gets the sum of value[l].
__device__ __forceinline__ float sum_transposed(float (&value)[LANES], int lane) {
#pragma unroll
    for (int apart = 1; apart < LANES; apart *= 2) {
        const bool upper = lane & apart;
#pragma unroll
        for (int i = 0; i < LANES / 2 / apart; ++i) {
            const float kept = upper ? value[2 * i + 1] : value[2 * i], sent = upper ? value[2 * i] : value[2 * i + 1];
            value[i] = kept + __shfl_xor_sync(0xffffffffu, sent, apart);
        }
    }
    return value[0];
}

// Where the (delta, delta u) of two steps of a channel lie within the tile's CHANNELS for these steps, in units of
// float4: neither the eight stores of a piece nor a warp's reads of neighbouring channels meet in a bank.
__device__ __forceinline__ int slot(int step_pair, int channel) {
    return channel ^ (channel / 8 ^ OCTETS * step_pair) % 8;
}

// What a lane reads for LANES steps: (delta, delta u) of two steps and (B, C) of two states in each float4.
struct Inputs {
    float4 deltas[LANES / 2][CHANNELS_PER_LANE], rows[LANES][STATES / 2];

    __device__ __forceinline__ void fetch(const float4* pairs, const float4* row,
                                          const int (&slots)[CHANNELS_PER_LANE][PATTERNS], int first_step) {
#pragma unroll
        for (int i = 0; i < LANES / 2; ++i) {
            const int pair = first_step / 2 + i;
#pragma unroll
            for (int j = 0; j < CHANNELS_PER_LANE; ++j)
                deltas[i][j] = pairs[pair * CHANNELS + slots[j][pair % PATTERNS]];
        }
#pragma unroll
        for (int i = 0; i < LANES; ++i)
#pragma unroll
            for (int k = 0; k < STATES / 2; ++k) rows[i][k] = row[(first_step + i) * (N / 2) + k];
    }
};

// u, delta, z (b, t, e) and B, C (b, t, N) with strides in elements over b and t, A (e, N), D, delta_bias (e); out
// (b, t, e); state (b, e, N) or null. ends (b, chunks - 1, e, N) and delta_sums (b, chunks - 1, e) when CHUNKED.
// Grid: (ceil(e / CHANNELS), b, chunks of this launch).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    scan(const Activation* u, const Activation* delta, const Activation* z, const Row* B, const Row* C, const float* A,
         const float* D, const float* delta_bias, float* state, Activation* out, float* ends, float* delta_sums,
         long long t, long long e, long long chunk_steps, long long first_chunk, long long u_b, long long u_t,
         long long delta_b, long long delta_t, long long z_b, long long z_t, long long B_b, long long B_t,
         long long C_b, long long C_t) {
    SHARED_MEMORY(float4, step_pairs);                                          // [2][TILE / 2][CHANNELS], see slot()
    float2* rows = (float2*)(step_pairs + TILE * CHANNELS);                     // [2][TILE][N]: B, C
    float* y_tiles = (float*)(rows + 2 * TILE * N);                             // [2][TILE][Y_PITCH]
    const int thread = threadIdx.x, lane = thread % 32, l = lane % LANES;
    const long long channel0 = (long long)blockIdx.x * CHANNELS, sequence = blockIdx.y;
    const long long chunk = first_chunk + blockIdx.z, start = chunk * chunk_steps;
    const int steps = (int)min(chunk_steps, t - start), tiles = (steps + TILE - 1) / TILE;
    const bool whole = chunk == 0 || first_chunk == 1, last = start + steps == t;

    // this lane's channels and states
    int own[CHANNELS_PER_LANE];
    float decay[CHANNELS_PER_LANE][STATES], h[CHANNELS_PER_LANE][STATES], delta_sum[CHANNELS_PER_LANE];
    const long long earlier = CHUNKED && first_chunk == 1 ? chunk : 0;
    const long long gap = CHUNKED ? (t + chunk_steps - 1) / chunk_steps - 1 : 0;
#pragma unroll
    for (int j = 0; j < CHANNELS_PER_LANE; ++j) {
        own[j] = thread / 32 * GROUP * CHANNELS_PER_LANE + j * GROUP + lane / LANES;
        const long long channel = channel0 + own[j];
        const bool there = channel < e;
        delta_sum[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
            decay[j][i] = there ? LOG2E * A[channel * N + l * STATES + i] : 0.0f;
            h[j][i] = there && chunk == 0 && state ? state[(sequence * e + channel) * N + l * STATES + i] : 0.0f;
        }
        for (long long k = 0; k < earlier && there; ++k) {
            const long long at = (sequence * gap + k) * e + channel;
#pragma unroll
            for (int i = 0; i < STATES; ++i)
                h[j][i] = fmaf(exp2_fast(decay[j][i] * delta_sums[at]), h[j][i], ends[at * N + l * STATES + i]);
        }
    }

    // this thread's pieces of eight channels: what is loaded, and u and z until the tile is finished
    float bias[8], skip[8];
    const int octet = thread % OCTETS, step0 = thread / OCTETS, row_step = thread * ROW_VALUES / N;
    const bool there = channel0 + octet * 8 < e;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        bias[i] = SOFTPLUS && there ? delta_bias[channel0 + octet * 8 + i] : 0.0f;
        skip[i] = there ? D[channel0 + octet * 8 + i] : 0.0f;
    }
    Eight<Activation> u_next[PIECES], delta_next[PIECES], z_next[PIECES], u_kept[3][PIECES], z_kept[3][PIECES];
    float B_next[ROW_VALUES], C_next[ROW_VALUES];
    const Activation *u_from[PIECES], *delta_from[PIECES], *z_from[PIECES];
    Activation* out_to[PIECES];
#pragma unroll
    for (int r = 0; r < PIECES; ++r) {
        const long long at = start + step0 + r * STEP_STRIDE;
        u_from[r] = u + sequence * u_b + at * u_t + channel0 + octet * 8;
        delta_from[r] = delta + sequence * delta_b + at * delta_t + channel0 + octet * 8;
        z_from[r] = z + sequence * z_b + at * z_t + channel0 + octet * 8;
        out_to[r] = out + (sequence * t + at) * e + channel0 + octet * 8;
        u_next[r].clear(), delta_next[r].clear(), z_next[r].clear();
    }
    const Row* B_from = B + sequence * B_b + (start + row_step) * B_t + thread * ROW_VALUES % N;
    const Row* C_from = C + sequence * C_b + (start + row_step) * C_t + thread * ROW_VALUES % N;

    // to be called for one tile after the other, as is `finish`
    auto load = [&](int tile) {
        const int left = steps - tile * TILE;
#pragma unroll
        for (int r = 0; r < PIECES; ++r) {
            if (step0 + r * STEP_STRIDE < left && there) {
                u_next[r].load(u_from[r]);
                delta_next[r].load(delta_from[r]);
                if (whole) z_next[r].load(z_from[r]);
            }
            u_from[r] += TILE * u_t, delta_from[r] += TILE * delta_t, z_from[r] += TILE * z_t;
        }
#pragma unroll
        for (int i = 0; i < ROW_VALUES; ++i) {
            B_next[i] = row_step < left ? to_float(B_from[i]) : 0.0f;
            C_next[i] = row_step < left ? to_float(C_from[i]) : 0.0f;
        }
        B_from += TILE * B_t, C_from += TILE * C_t;
    };

    auto prepare = [&](int tile) {
        const int left = steps - tile * TILE;
#pragma unroll
        for (int r = 0; r < PIECES; ++r) {
            const int step = step0 + r * STEP_STRIDE;
            const bool good = step < left && there;  // else delta 0, which leaves the state as it is
            float4* to = step_pairs + (tile % 2 * (TILE / 2) + step / 2) * CHANNELS;
            const int first = slot(step / 2, octet * 8);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float x = delta_next[r][i];
                if (SOFTPLUS) x = softplus(x + bias[i]);
                x = good ? x : 0.0f;
                ((float2*)(to + (first ^ i)))[step % 2] = make_float2(x, x * u_next[r][i]);
            }
        }
        float2* row = rows + tile % 2 * (TILE * N) + thread * ROW_VALUES;
#pragma unroll
        for (int i = 0; i < ROW_VALUES; ++i) row[i] = make_float2(B_next[i], C_next[i]);
    };

    int own_slots[CHANNELS_PER_LANE][PATTERNS];
#pragma unroll
    for (int j = 0; j < CHANNELS_PER_LANE; ++j)
#pragma unroll
        for (int i = 0; i < PATTERNS; ++i) own_slots[j][i] = slot(i, own[j]);

    auto recur = [&](int tile) {
        const float4* pairs = step_pairs + tile % 2 * (TILE / 2 * CHANNELS);
        const float4* row = (const float4*)(rows + tile % 2 * (TILE * N) + l * STATES);
        float* y = y_tiles + (tile % 2 * TILE + l) * Y_PITCH;
        Inputs now, next;
        now.fetch(pairs, row, own_slots, 0);
#pragma unroll
        for (int first = 0; first < TILE; first += LANES) {
            // before the stores of y, which no load is moved across
            if (first + LANES < TILE) next.fetch(pairs, row, own_slots, first + LANES);
#pragma unroll
            for (int j = 0; j < CHANNELS_PER_LANE; ++j) {
                float sums[LANES];
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    const float4 two = now.deltas[i / 2][j];
                    const float d = i % 2 ? two.z : two.x, du = i % 2 ? two.w : two.y;
#pragma unroll
                    for (int k = 0; k < STATES; ++k) {
                        const float4 both = now.rows[i][k / 2];
                        h[j][k] = fmaf(exp2_fast(d * decay[j][k]), h[j][k], du * (k % 2 ? both.z : both.x));
                        const float c = k % 2 ? both.w : both.y;
                        sums[i] = k ? fmaf(h[j][k], c, sums[i]) : h[j][k] * c;
                    }
                    if (CHUNKED) delta_sum[j] += d;
                }
                y[first * Y_PITCH + own[j]] = sum_transposed(sums, lane);
            }
            now = next;
        }
    };

    auto finish = [&](int tile) {
        const int left = steps - tile * TILE;
#pragma unroll
        for (int r = 0; r < PIECES; ++r) {
            const int step = step0 + r * STEP_STRIDE;
            if (step < left && there) {
                const float4* y = (const float4*)(y_tiles + (tile % 2 * TILE + step) * Y_PITCH + octet * 8);
                const float4 low = y[0], high = y[1];
                float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int i = 0; i < 8; ++i) x[i] = fmaf(skip[i], u_kept[2][r][i], x[i]) * silu(z_kept[2][r][i]);
                store8(out_to[r], x);
            }
            out_to[r] += TILE * e;
        }
    };

    load(0);
    for (int tile = -1; tile <= tiles; ++tile) {
#pragma unroll
        for (int r = 0; r < PIECES; ++r) {
            u_kept[2][r] = u_kept[1][r], u_kept[1][r] = u_kept[0][r], u_kept[0][r] = u_next[r];
            z_kept[2][r] = z_kept[1][r], z_kept[1][r] = z_kept[0][r], z_kept[0][r] = z_next[r];
        }
        if (tile + 1 < tiles) prepare(tile + 1);
        if (tile + 2 < tiles) load(tile + 2);
        if (tile >= 0 && tile < tiles) recur(tile);
        if (tile >= 1 && whole) finish(tile - 1);
        __syncthreads();
    }

    if (last ? !(whole && state) : !CHUNKED || first_chunk == 1) return;
#pragma unroll
    for (int j = 0; j < CHANNELS_PER_LANE; ++j) {
        const long long channel = channel0 + own[j];
        if (channel >= e) continue;
        const long long at = (last ? sequence : sequence * gap + chunk) * e + channel;
#pragma unroll
        for (int i = 0; i < STATES; ++i) (last ? state : ends)[at * N + l * STATES + i] = h[j][i];
        if (!last && l == 0) delta_sums[at] = delta_sum[j];
    }
}
