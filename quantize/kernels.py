"""Block encoders in numba: the same bytes as formats.encode, at the speed of memory."""

from __future__ import annotations

import numpy as np

from ..runtime.cpu.jit import inline, nogil
from ..runtime.cpu.rows import load16
from ..runtime.cpu.simd import (
    absolute,
    load_f32,
    max16,
    maximum,
    mul,
    splat,
    store_f16,
    store_f32x16,
    store_u8,
)

_MAX = np.finfo(np.float32).max


@inline
def _scaled(source, x, block, inverse, scratch):
    """scratch [32] = block * inverse."""
    factor = splat(inverse)
    store_f32x16(scratch, mul(load16(source, x, 32 * block), factor))
    store_f32x16(scratch + 64, mul(load16(source, x, 32 * block + 16), factor))


@nogil("int64(intp, intp, int64, intp, intp)")
def encode_q4_0(source, x, n_blocks, out, scratch):
    """Encode n_blocks blocks of 32 floats at `x` into 18 bytes each at `out`.

    `source`: GGMLType F32, F16 or BF16; `scratch`: 128 bytes. Returns the number of blocks that
    hold NaN or infinity (their bytes mean nothing).
    """
    bad = 0
    for block in range(n_blocks):
        low, high = load16(source, x, 32 * block), load16(source, x, 32 * block + 16)
        amax = max16(maximum(absolute(low), absolute(high)))
        store_f32x16(scratch, low)
        store_f32x16(scratch + 64, high)
        # The first value of largest magnitude, with its sign, becomes nibble 0 (= -8).
        peak = np.float32(0)
        finite = np.float32(0)
        for i in range(31, -1, -1):
            value = load_f32(scratch + 4 * i)
            finite += value * np.float32(0)  # NaN if any value is NaN or infinite
            if abs(value) == amax:
                peak = value
        if finite != 0:
            bad += 1
        scale = peak / np.float32(-8)
        inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
        store_f16(out, scale)
        if abs(inverse) > _MAX:
            # The scale is so small that its inverse overflows: gguf.quants stores nibbles of 0.
            for i in range(16):
                store_u8(out + 2 + i, np.uint8(0))
        else:
            _scaled(source, x, block, inverse, scratch)
            for i in range(16):
                # Values lie in [-8, 8]: adding 8.5 and cutting off rounds them to 0..16.
                a = np.int32(load_f32(scratch + 4 * i) + np.float32(8.5))
                b = np.int32(load_f32(scratch + 64 + 4 * i) + np.float32(8.5))
                store_u8(out + 2 + i, np.uint8(min(a, 15) | min(b, 15) << 4))
        out += 18
    return bad


@nogil("int64(intp, intp, int64, intp, intp)")
def encode_q8_0(source, x, n_blocks, out, scratch):
    """Encode n_blocks blocks of 32 floats into 34 bytes each; see encode_q4_0."""
    bad = 0
    for block in range(n_blocks):
        low, high = load16(source, x, 32 * block), load16(source, x, 32 * block + 16)
        amax = max16(maximum(absolute(low), absolute(high)))
        store_f32x16(scratch, low)
        store_f32x16(scratch + 64, high)
        finite = np.float32(0)
        for i in range(32):
            finite += load_f32(scratch + 4 * i) * np.float32(0)
        if finite != 0:
            bad += 1
        scale = amax / np.float32(127)
        inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
        store_f16(out, scale)
        if inverse > _MAX:
            inverse = np.float32(0)  # as above
        _scaled(source, x, block, inverse, scratch)
        for i in range(32):
            value = load_f32(scratch + 4 * i)
            # Half away from zero, as C's roundf. Adding 0.5 would round 0.49999997 up.
            floor = np.int32(abs(value))
            floor += np.int32(np.float32(2) * (abs(value) - np.float32(floor)))
            store_u8(out + 2 + i, np.uint8(floor if value >= 0 else -floor))
        out += 34
    return bad
