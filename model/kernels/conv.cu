// Causal depthwise convolution over a prompt with SiLU, forward only. Definition: causal_conv.py.
//
// A thread takes eight channels over STEPS steps, the W - 1 inputs before the current one in registers: memory-bound,
// (W - 1) / STEPS more is read than there is. The threads of the first steps, who alone read the state, also write it.
#include "channels.cuh"

using Activation = Float<ACTIVATION_BITS>::type;
using Weight = Float<WEIGHT_BITS>::type;
using State = Float<STATE_BITS>::type;
constexpr int PAST = W - 1;

// x (b, t, e) with strides in elements over b and t, state (b, e, W - 1) or null, weight (e, W), bias (e) or null, out
// (b, t, e). Grid: (ceil(e / 8 / THREADS), ceil(t / STEPS), b).
extern "C" __global__ void __launch_bounds__(THREADS)
    conv(const Activation* x, State* state, const Weight* weight, const Weight* bias, Activation* out, long long t,
         long long e, long long x_b, long long x_t) {
    const long long channel = ((long long)blockIdx.x * THREADS + threadIdx.x) * 8, sequence = blockIdx.z;
    const long long start = (long long)blockIdx.y * STEPS;
    if (channel >= e) return;
    x += sequence * x_b + channel;
    out += (sequence * t + start) * e + channel;

    float past[PAST][8];  // the oldest first
#pragma unroll
    for (int k = 0; k < PAST; ++k)
#pragma unroll
        for (int i = 0; i < 8; ++i) past[k][i] = 0.0f;
    if (start) {
#pragma unroll
        for (int k = 0; k < PAST; ++k) {
            Eight<Activation> before;
            before.clear();
            if (start + k >= PAST) before.load(x + (start + k - PAST) * x_t);
#pragma unroll
            for (int i = 0; i < 8; ++i) past[k][i] = before[i];
        }
    } else if (state) {
        state += (sequence * e + channel) * PAST;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int k = 0; k < PAST; ++k) past[k][i] = to_float(state[i * PAST + k]);
#pragma unroll
            for (int k = 0; k < PAST; ++k)  // only places already read: t >= 1
                state[i * PAST + k] = t + k < PAST ? state[i * PAST + t + k]
                                                   : from_float<State>(to_float(x[(t + k - PAST) * x_t + i]));
        }
    }

    float taps[W][8], added[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        added[i] = bias ? to_float(bias[channel + i]) : 0.0f;
#pragma unroll
        for (int k = 0; k < W; ++k) taps[k][i] = to_float(weight[(channel + i) * W + k]);
    }

    const int steps = (int)min((long long)STEPS, t - start);
    x += start * x_t;
    for (int first = 0; first < steps; first += AT_ONCE) {
        Eight<Activation> next[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (first + j < steps) next[j].load(x + (first + j) * x_t);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (first + j >= steps) break;
            float y[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float now = next[j][i];
                float sum = fmaf(taps[PAST][i], now, added[i]);
#pragma unroll
                for (int k = 0; k < PAST; ++k) {
                    sum = fmaf(taps[k][i], past[k][i], sum);
                    past[k][i] = k + 1 < PAST ? past[k + 1][i] : now;
                }
                y[i] = silu(sum);
            }
            store8(out + (first + j) * e, y);
        }
    }
}
