// Rounding activations to int8 in blocks of 32, as formats.round_activations defines it.
#pragma once
#include "common.cuh"

// Blocks whose largest magnitude is below it count as zero: 127 divided by less might overflow.
constexpr float SMALLEST_AMAX = 0x1p-100f;

// The warp's 32 numbers, one a lane, become block `block` of `packed`. All lanes must call it.
// Magnitudes are compared as bits, where NaN is above infinity: a damaged model shows in the scale.
__device__ inline void pack_block(float x, const Packed& packed, long long block) {
    int bits = __float_as_int(fabsf(x));
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(ALL_LANES, bits, distance));
    }
    const float amax = __int_as_float(bits);
    const bool is_zero = amax < SMALLEST_AMAX;
    const float inverse = is_zero ? 0 : 127 / amax;
    const int q = int(rintf(x * inverse));  // half to even
    const int sum = warp_sum(q);
    packed.q[block * QK + lane_id()] = (signed char)q;
    if (lane_id() == 0) {
        packed.d[block] = is_zero ? 0 : amax / 127;
        packed.s[block] = sum;
    }
}
