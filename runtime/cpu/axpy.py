"""Sums of rows of weights: y [n] += sum of values [count] * rows; one place per format.

Float formats are added two rows at a time, one after the other, so that y is read and written half
as often. Q4_0 and Q8_0 are added GROUP rows at a time, in integers: what a row's block of 32
weights is multiplied by, its value * d, is rounded to 22 bits of the largest of the group's,

    y [32] += s * sum over the group of k * q
    s = max over the group of |value * d| / K_MAX,  k = rint(value * d / s)

which are as fine as floats; k is three digits, signed bytes, so that integer dot products, as in
rows.py, multiply four rows at once: per weight that is two thirds of what floats take. The sums of
each digit are exact. Bytes: the rows, once.
"""

from __future__ import annotations

import numpy as np

from ..formats import BLOCK_SIZES, COMPUTE_TYPES, GGMLType
from .isa import Q8_BIAS
from .jit import Kernel, inline
from .rows import BF16, F16, F32, Q4_0, Q8_0, fetch_far, load1, load16, row_at, row_number, to_fetch
from .simd import (
    add_i32,
    copy_u16,
    divide,
    dot_bytes,
    dot_nibbles,
    fma,
    fma1,
    four_bytes,
    four_digits,
    high_nibbles,
    largest_magnitude,
    load_4_rows,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i32x16,
    load_i64,
    load_q4_0_scales,
    low_nibbles,
    mul,
    next_digits,
    prefetch,
    scale_i32,
    splat,
    splat_4_bytes,
    splat_i32,
    stack_4k,
    store_f32,
    store_f32x16,
    store_i32x16,
    store_i64,
    sum_4_bytes,
    to_f32,
    to_i32,
)

GROUP = 16  # rows
K_MAX = 127 << 14  # the lower two digits have 7 bits, since dot_bytes takes no -128
_BLOCKS = 16  # of 32 columns each, whose factors are made together
_LEAST = np.float32(1e-30)  # a group's largest factor: below, its reciprocal would overflow

# On the stack, bytes: addresses of rows [GROUP], of rows to be fetched [GROUP], values float32
# [GROUP], the halves of a row's blocks, factors float32 [GROUP, _BLOCKS], s float32 [_BLOCKS]; and
# of each of the three digits of k, the lowest first, those of four rows [GROUP / 4, _BLOCKS, 4] and
# what its sums begin with, int32 [_BLOCKS].
_NEXT = 8 * GROUP
_VALUES = _NEXT + 8 * GROUP
_HALVES = _VALUES + 4 * GROUP
_FACTORS = _HALVES + 64
_SCALES = _FACTORS + 4 * GROUP * _BLOCKS
_DIGITS = _SCALES + 4 * _BLOCKS
_BEGIN = GROUP * _BLOCKS
_SIZE = _BEGIN + 4 * _BLOCKS
assert _DIGITS + 3 * _SIZE <= 4096


@inline
def _k(stack, j, scale):
    """k of row j, int32 x 16."""
    return to_i32(mul(load_f32x16(stack + _FACTORS + 64 * j), scale))


@inline
def _factors(type_, block_bytes, stack, first, n_blocks, n_rows):
    """Make k, s and what the sums begin with for some blocks of n_rows rows, a multiple of 4."""
    largest = splat(_LEAST)
    for j in range(n_rows):
        row = load_i64(stack + 8 * j) + block_bytes * first
        if type_ == Q4_0 and n_blocks == _BLOCKS:
            scales = load_q4_0_scales(row)
        else:
            for b in range(n_blocks):
                copy_u16(stack + _HALVES + 2 * b, row + block_bytes * b)
            scales = load_f16x16(stack + _HALVES)
        factors = mul(scales, splat(load_f32(stack + _VALUES + 4 * j)))
        store_f32x16(stack + _FACTORS + 64 * j, factors)
        largest = largest_magnitude(factors, largest)
    scale, zero = divide(splat(np.float32(K_MAX)), largest), splat_i32(np.int32(0))
    h = splat_i32(np.int32(64))
    store_f32x16(stack + _SCALES, mul(largest, splat(np.float32(1 / K_MAX))))
    for part in range(3):
        store_i32x16(stack + _DIGITS + _SIZE * part + _BEGIN, zero)
    for j in range(0, n_rows, 4):
        k0, k1 = _k(stack, j, scale), _k(stack, j + 1, scale)
        k2, k3 = _k(stack, j + 2, scale), _k(stack, j + 3, scale)
        for part in range(3):
            at = stack + _DIGITS + _SIZE * part
            quad = four_bytes(k0, k1, k2, k3)
            if part < 2:  # digits are from -64 on
                k0, k1, k2, k3 = add_i32(k0, h), add_i32(k1, h), add_i32(k2, h), add_i32(k3, h)
                quad = four_digits(k0, k1, k2, k3)
                k0, k1 = next_digits(k0), next_digits(k1)
                k2, k3 = next_digits(k2), next_digits(k3)
            store_i32x16(at + 16 * j, quad)
            # Nibbles are weights + 8; of bytes see dot_bytes.
            extra = scale_i32(sum_4_bytes(quad), np.int32(-8 if type_ == Q4_0 else -Q8_BIAS))
            store_i32x16(at + _BEGIN, add_i32(load_i32x16(at + _BEGIN), extra))


@inline
def _dot(type_, total, x, k):
    """total + 16 columns of four rows times a digit of each."""
    return dot_nibbles(total, x, k) if type_ == Q4_0 else dot_bytes(total, x, k)


@inline
def _whole(a, b, c):
    """Put the sums of three digits together: they may be more than an int32 holds."""
    base = splat(np.float32(128))
    return fma(fma(to_f32(c), base, to_f32(b)), base, to_f32(a))


@inline
def _add_group(type_, block_bytes, stack, n, n_rows, y):
    """y [n] += rows whose addresses and values are on the stack; n_rows is a multiple of 4.

    Of the rows that come later a piece of one is asked for with every block: all at once would be
    more than a core waits for beside its work.
    """
    for first in range(0, n // 32, _BLOCKS):
        n_blocks = min(_BLOCKS, n // 32 - first)
        _factors(type_, block_bytes, stack, first, n_blocks, n_rows)
        for b in range(n_blocks):
            for j in range(b, GROUP, n_blocks):
                following = load_i64(stack + _NEXT + 8 * j)
                if following != 0:
                    fetch_far(following + block_bytes * first, block_bytes * n_blocks)
            quants = block_bytes * (first + b) + 2
            at = stack + _DIGITS + 4 * b
            a0 = a1 = splat_i32(load_i32(at + _BEGIN))
            b0 = b1 = splat_i32(load_i32(at + _SIZE + _BEGIN))
            c0 = c1 = splat_i32(load_i32(at + 2 * _SIZE + _BEGIN))
            for j in range(0, n_rows, 4):
                r, s = load_i64(stack + 8 * j) + quants, load_i64(stack + 8 * j + 8) + quants
                t, u = load_i64(stack + 8 * j + 16) + quants, load_i64(stack + 8 * j + 24) + quants
                ka = splat_4_bytes(load_i32(at + 16 * j))
                kb = splat_4_bytes(load_i32(at + _SIZE + 16 * j))
                kc = splat_4_bytes(load_i32(at + 2 * _SIZE + 16 * j))
                weights = load_4_rows(r, s, t, u)
                if type_ == Q4_0:
                    x0, x1 = low_nibbles(weights), high_nibbles(weights)
                else:
                    x0, x1 = weights, load_4_rows(r + 16, s + 16, t + 16, u + 16)
                a0, b0, c0 = (
                    _dot(type_, a0, x0, ka),
                    _dot(type_, b0, x0, kb),
                    _dot(type_, c0, x0, kc),
                )
                a1, b1, c1 = (
                    _dot(type_, a1, x1, ka),
                    _dot(type_, b1, x1, kb),
                    _dot(type_, c1, x1, kc),
                )
            to, scale = y + 128 * (first + b), splat(load_f32(stack + _SCALES + 4 * b))
            store_f32x16(to, fma(_whole(a0, b0, c0), scale, load_f32x16(to)))
            store_f32x16(to + 64, fma(_whole(a1, b1, c1), scale, load_f32x16(to + 64)))


@inline
def _axpys_blocks(type_, block_bytes, w, row_bytes, n, rows, count, next_w, next_rows, values, y):
    """Q4_0 and Q8_0."""
    stack = stack_4k()
    for i in range(0, count, GROUP):
        n_rows = min(GROUP, count - i)
        for j in range(n_rows, GROUP):
            store_i64(stack + _NEXT + 8 * j, 0)
        for j in range(n_rows):
            store_i64(stack + 8 * j, w + row_number(rows, i + j) * row_bytes)
            store_f32(stack + _VALUES + 4 * j, load_f32(values + 4 * (i + j)))
            following = next_w + row_number(next_rows, i + j) * row_bytes
            store_i64(stack + _NEXT + 8 * j, following if rows != 0 else 0)
        while n_rows % 4:  # a row once more, times 0
            store_i64(stack + 8 * n_rows, load_i64(stack))
            store_f32(stack + _VALUES + 4 * n_rows, np.float32(0))
            n_rows += 1
        _add_group(type_, block_bytes, stack, n, n_rows, y)


@inline
def _axpy2_float(type_, v, w, n, a, b, y, ahead_v, ahead_w):
    scale_v, scale_w = splat(a), splat(b)
    for i in range(0, n - 15, 16):
        if type_ <= F16 or type_ == BF16:
            prefetch(v + (4 if type_ == F32 else 2) * i + ahead_v)
            prefetch(w + (4 if type_ == F32 else 2) * i + ahead_w)
        total = fma(load16(type_, v, i), scale_v, load_f32x16(y + 4 * i))
        store_f32x16(y + 4 * i, fma(load16(type_, w, i), scale_w, total))
    for i in range(n // 16 * 16, n):
        one = fma1(load1(type_, v, i), a, load_f32(y + 4 * i))
        store_f32(y + 4 * i, fma1(load1(type_, w, i), b, one))


@inline
def _axpys_float(type_, w, row_bytes, n, rows, count, next_w, next_rows, values, y, nbytes):
    for i in range(0, count, 2):
        # A last row without a partner is added together with 0 times itself.
        j = min(i + 1, count - 1)
        a = load_f32(values + 4 * i)
        b = load_f32(values + 4 * j) if j > i else np.float32(0)
        v, u = row_at(w, row_bytes, rows, i, count), row_at(w, row_bytes, rows, j, count)
        next_v, next_u = to_fetch(w, row_bytes, rows, i, j, count, next_w, next_rows, nbytes)
        _axpy2_float(type_, v, u, n, a, b, y, next_v - v, next_u - u)


def _make_axpys(type_):
    block_size, block_bytes = BLOCK_SIZES[GGMLType(type_)]

    def axpys(w, row_bytes, n, rows, count, next_w, next_rows, values, y):
        if type_ in (Q4_0, Q8_0):
            _axpys_blocks(
                type_, block_bytes, w, row_bytes, n, rows, count, next_w, next_rows, values, y
            )
        else:
            nbytes = n // block_size * block_bytes
            _axpys_float(type_, w, row_bytes, n, rows, count, next_w, next_rows, values, y, nbytes)

    return Kernel(axpys, 9, f"axpys_{GGMLType(type_).name}")


# axpys(w, row_bytes, n, rows, count, next_w, next_rows, values, y), arguments as in rows.DOTS.
AXPYS = {int(type_): _make_axpys(int(type_)) for type_ in COMPUTE_TYPES}
