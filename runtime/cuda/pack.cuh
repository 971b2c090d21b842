// Rounding activations to int8 in blocks of 32, as formats.round_activations defines it.
#pragma once
#include "common.cuh"

// Blocks whose largest magnitude is below it count as zero: 127 divided by less might overflow.
constexpr float SMALLEST_AMAX = 0x1p-100f;

// Numbers of 32 / N lanes side by side, N (1 or 4) of each, become block `block` of `packed`. All
// lanes of a warp must call it; a block that is not there is not written.
// Magnitudes are compared as bits, where NaN is above infinity: a damaged model shows in the scale.
template <int N>
__device__ inline void pack_block(const float (&x)[N], const Packed& packed, long long block,
                                  bool is_there = true) {
    constexpr int LANES = QK / N;
    int bits = 0;
#pragma unroll
    for (int i = 0; i < N; i++) bits = max(bits, __float_as_int(fabsf(x[i])));
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(ALL_LANES, bits, distance));
    }
    const float amax = __int_as_float(bits);
    const bool is_zero = amax < SMALLEST_AMAX;
    const float inverse = is_zero ? 0 : 127 / amax;
    int sum = 0, bytes = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int q = int(rintf(x[i] * inverse));  // half to even
        sum += q;
        bytes |= (q & 255) << 8 * i;
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    }
    if (!is_there) return;
    signed char* q = packed.q + block * QK + lane_id() % LANES * N;
    if (N == 1) {
        *q = (signed char)bytes;
    } else {
        *(int*)q = bytes;
    }
    if (lane_id() % LANES == 0) {
        packed.d[block] = is_zero ? 0 : amax / 127;
        packed.s[block] = sum;
    }
}
