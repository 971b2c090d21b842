"""Normalisation, rotary embedding and softmax of single rows, all in float32."""

from __future__ import annotations

import math

import numpy as np

from .jit import inline
from .simd import (
    add,
    fma,
    load_f32,
    load_f32x16,
    max16,
    maximum,
    mul,
    rint,
    splat,
    store_f32,
    store_f32x16,
    sub,
    sum16,
    times_power_of_2,
)

RMS, LAYER = 0, 1
NORMS = {"rms": RMS, "layer": LAYER}


@inline
def _mean(x, n):
    sums = splat(np.float32(0))
    for i in range(0, n - 15, 16):
        sums = add(sums, load_f32x16(x + 4 * i))
    total = sum16(sums)
    for i in range(n // 16 * 16, n):
        total += load_f32(x + 4 * i)
    return total / np.float32(n)


@inline
def normalise(kind, x, weight, bias, n, eps, out):
    """out [n] = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias.

    m is the mean of x for LAYER, 0 for RMS; `bias` is the address 0 where there is none.
    """
    mean = _mean(x, n) if kind == LAYER else np.float32(0)
    means, squares = splat(mean), splat(np.float32(0))
    for i in range(0, n - 15, 16):
        v = sub(load_f32x16(x + 4 * i), means)
        squares = fma(v, v, squares)
    total = sum16(squares)
    for i in range(n // 16 * 16, n):
        total += (load_f32(x + 4 * i) - mean) * (load_f32(x + 4 * i) - mean)
    scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(n) + eps))
    scales = splat(scale)
    for i in range(0, n - 15, 16):
        y = mul(sub(load_f32x16(x + 4 * i), means), scales)
        y = mul(y, load_f32x16(weight + 4 * i))
        if bias != 0:
            y = add(y, load_f32x16(bias + 4 * i))
        store_f32x16(out + 4 * i, y)
    for i in range(n // 16 * 16, n):
        value = (load_f32(x + 4 * i) - mean) * scale * load_f32(weight + 4 * i)
        if bias != 0:
            value += load_f32(bias + 4 * i)
        store_f32(out + 4 * i, value)


@inline
def rope_head(x, table, half, is_neox):
    """Rotate pairs of one head in place: (2i, 2i + 1), or (i, i + half) for neox.

    table: cos [half], sin [half].
    """
    step, apart = (4, 4 * half) if is_neox else (8, 4)
    for i in range(half):
        cos, sin = load_f32(table + 4 * i), load_f32(table + 4 * (half + i))
        at = x + step * i
        a, b = load_f32(at), load_f32(at + apart)
        store_f32(at, a * cos - b * sin)
        store_f32(at + apart, a * sin + b * cos)


@inline
def exp16(x):
    """e^x of 16 numbers <= 0, within 2 units in the last place; 0 below -87.

    x = n ln 2 + r; e^r by a polynomial (Cephes expf), times 2^n.
    """
    x = maximum(x, splat(np.float32(-87.3)))
    n = rint(mul(x, splat(np.float32(1.44269504))))
    # ln 2 in two parts, so that r keeps its last bits.
    r = fma(n, splat(np.float32(-0.693359375)), x)
    r = fma(n, splat(np.float32(2.12194440e-4)), r)
    p = splat(np.float32(1.9875691500e-4))
    p = fma(p, r, splat(np.float32(1.3981999507e-3)))
    p = fma(p, r, splat(np.float32(8.3334519073e-3)))
    p = fma(p, r, splat(np.float32(4.1665795894e-2)))
    p = fma(p, r, splat(np.float32(1.6666665459e-1)))
    p = fma(p, r, splat(np.float32(5.0000001201e-1)))
    one = splat(np.float32(1))
    return times_power_of_2(add(fma(p, mul(r, r), r), one), n)


@inline
def peak_of(x, n):
    """Return the largest of x [n]. x has room for n rounded up to 16, filled with very low ones."""
    low = np.float32(-3.0e38)
    for i in range(n, (n + 15) // 16 * 16):
        store_f32(x + 4 * i, low)
    best = splat(low)
    for i in range(0, n, 16):
        best = maximum(best, load_f32x16(x + 4 * i))
    return max16(best)


@inline
def exp_below(x, n, peak):
    """x [n] = exp(x - peak) in place; returns their sum. Call peak_of first, peak >= its result."""
    peaks, total = splat(peak), splat(np.float32(0))
    for i in range(0, n, 16):
        e = exp16(sub(load_f32x16(x + 4 * i), peaks))
        store_f32x16(x + 4 * i, e)
        if i + 16 <= n:
            total = add(total, e)
    result = sum16(total)
    for i in range(n // 16 * 16, n):
        result += load_f32(x + 4 * i)
    return result


@inline
def scale_by(x, n, factor):
    """x [n] *= factor."""
    factors = splat(factor)
    for i in range(0, n - 15, 16):
        store_f32x16(x + 4 * i, mul(load_f32x16(x + 4 * i), factors))
    for i in range(n // 16 * 16, n):
        store_f32(x + 4 * i, load_f32(x + 4 * i) * factor)
