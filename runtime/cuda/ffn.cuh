// What the FFN kernels share: counters, and what becomes of a neuron's decider and up.
//
// Neuron n lies in storage row slot[n / 64] * 64 + n % 64 of decider, up and down_t; a slot of -1
// means that the CPU has it.
#pragma once
#include "common.cuh"

// Where neuron n, which is resident, lies.
__device__ inline int storage_row(const int* slot, int n) {
    return slot[n / NEURON_BLOCK] * NEURON_BLOCK + n % NEURON_BLOCK;
}

// Columns of the layer's counters: step.py COUNTS.
enum Counter { TOKENS, DECIDER_ROWS, UP_ROWS, DOWN_ROWS };

// Counters are null where nothing is to be counted. Integer sums do not depend on their order.
__device__ inline void count(long long* counters, Counter which, int n) {
    if (counters && n) atomicAdd((unsigned long long*)counters + which, (unsigned long long)n);
}

// The activation of a decider x, as reference.activate has it, NaN included.
__device__ inline float activate(int kind, float x, float threshold) {
    const float positive = x < 0 ? 0 : x;
    switch (kind) {
        case FATRELU: return x < threshold ? 0 : x;
        case RELU2: return positive * positive;
        case SILU: return x / (1 + expf(-x));
        case GELU: return float(double(x * 0.5f) * (1 + erf(double(x / 1.41421356f))));
        default: return positive;  // RELU, DRELU
    }
}

// What a neuron contributes, and what it is in Buffers.fired.
struct Neuron {
    float act;
    unsigned char fired;
};

__device__ inline Neuron with_up(int kind, float act, float up) {
    if (kind != DRELU) return {act * up, FIRED};
    up = up < 0 ? 0 : up;
    return {act * up, up == 0 ? HALF_FIRED : FIRED};
}
