"""Sums of rows of weights: y [n] += sum of values [count] * rows; one place per format.

Float formats are added two rows at a time, one after the other, so that y is read and written half
as often. Q4_0 and Q8_0 are added GROUP rows at a time, in integers: what a row's block of 32
weights is multiplied by, its value * d, is rounded to 16 bits of the largest of the group's,

    y [32] += s * sum over the group of k * q
    s = max over the group of |value * d| / K_MAX,  k = rint(value * d / s) = 256 * upper + lower

with two signed bytes for k, so that the integer dot products of DOTS multiply four rows at once:
per weight that is a quarter of what floats take. The sums are exact; k is 256 times as fine as the
rounded activations of a dot product (rows.py). Bytes: the rows, once.
"""

from __future__ import annotations

import numpy as np

from ..formats import BLOCK_SIZES, COMPUTE_TYPES, GGMLType
from .isa import Q8_BIAS
from .jit import Kernel, inline
from .rows import BF16, F16, F32, Q4_0, Q8_0, fetch_far, load1, load16, row_at, row_number, to_fetch
from .simd import (
    absolute,
    add_i32,
    byte_of,
    copy_u16,
    divide,
    dot_bytes,
    dot_nibbles,
    fma,
    fma1,
    high_nibbles,
    load_4_rows,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_q4_0_scales,
    low_nibbles,
    maximum,
    mul,
    or_i32,
    prefetch,
    scale_i32,
    shift_left,
    splat,
    splat_4_bytes,
    splat_i32,
    stack_4k,
    store_f32,
    store_f32x16,
    store_i32x16,
    store_i64,
    to_f32,
    to_i32,
)

GROUP = 16  # rows
K_MAX = 127 * 256
_BLOCKS = 16  # of 32 columns each, whose factors are made together
_LEAST = np.float32(1e-30)  # a group's largest factor: below, its reciprocal would overflow

# On the stack, bytes: addresses of rows [GROUP], of rows to be fetched [GROUP], values float32
# [GROUP], the halves of a row's blocks, factors float32 [GROUP, _BLOCKS], upper and lower bytes of
# k for four rows each [GROUP / 4, _BLOCKS, 4], what sums begin with int32 [_BLOCKS], s float32
# [_BLOCKS].
_NEXT = 8 * GROUP
_VALUES = _NEXT + 8 * GROUP
_HALVES = _VALUES + 4 * GROUP
_FACTORS = _HALVES + 64
_UPPER = _FACTORS + 4 * GROUP * _BLOCKS
_LOWER = _UPPER + GROUP * _BLOCKS
_BEGIN = _LOWER + GROUP * _BLOCKS
_SCALES = _BEGIN + 4 * _BLOCKS
assert _SCALES + 4 * _BLOCKS <= 4096


@inline
def _k(stack, j, scale):
    """k of row j, int32 x 16."""
    return to_i32(mul(load_f32x16(stack + _FACTORS + 64 * j), scale))


@inline
def _bytes(k0, k1, k2, k3, shift):
    """Bytes of four int32, those that are `shift` bits up, in one."""
    even = or_i32(
        byte_of(k0, np.int32(shift), np.int32(0)), byte_of(k1, np.int32(shift), np.int32(8))
    )
    return or_i32(
        even,
        or_i32(
            byte_of(k2, np.int32(shift), np.int32(16)), byte_of(k3, np.int32(shift), np.int32(24))
        ),
    )


@inline
def _factors(type_, stack, first, n_blocks, n_rows):
    """Make k, s and what the sums begin with for some blocks of n_rows rows, a multiple of 4."""
    block_bytes = 18 if type_ == Q4_0 else 34
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
        largest = maximum(absolute(factors), largest)
    scale, total = divide(splat(np.float32(K_MAX)), largest), splat_i32(np.int32(0))
    store_f32x16(stack + _SCALES, mul(largest, splat(np.float32(1 / K_MAX))))
    for j in range(0, n_rows, 4):
        k0, k1 = _k(stack, j, scale), _k(stack, j + 1, scale)
        k2, k3 = _k(stack, j + 2, scale), _k(stack, j + 3, scale)
        total = add_i32(total, add_i32(add_i32(k0, k1), add_i32(k2, k3)))
        store_i32x16(stack + _LOWER + 16 * j, _bytes(k0, k1, k2, k3, 0))
        half = splat_i32(np.int32(128))  # the lower byte is signed
        k0, k1, k2, k3 = add_i32(k0, half), add_i32(k1, half), add_i32(k2, half), add_i32(k3, half)
        store_i32x16(stack + _UPPER + 16 * j, _bytes(k0, k1, k2, k3, 8))
    # Nibbles are weights + 8; of bytes see dot_bytes.
    store_i32x16(stack + _BEGIN, scale_i32(total, np.int32(-8 if type_ == Q4_0 else -Q8_BIAS)))


@inline
def _add_group(type_, stack, n, n_rows, y):
    """y [n] += rows whose addresses and values are on the stack; n_rows is a multiple of 4.

    Of the rows that come later a piece of one is asked for with every block: all at once would be
    more than a core waits for beside its work.
    """
    block_bytes = 18 if type_ == Q4_0 else 34
    for first in range(0, n // 32, _BLOCKS):
        n_blocks = min(_BLOCKS, n // 32 - first)
        _factors(type_, stack, first, n_blocks, n_rows)
        for b in range(n_blocks):
            quants, following = block_bytes * (first + b) + 2, load_i64(stack + _NEXT + 8 * b)
            if following != 0:
                fetch_far(following + block_bytes * first, block_bytes * n_blocks)
            upper0 = lower0 = upper1 = lower1 = splat_i32(np.int32(0))
            for j in range(0, n_rows, 4):
                r, s = load_i64(stack + 8 * j) + quants, load_i64(stack + 8 * j + 8) + quants
                t, u = load_i64(stack + 8 * j + 16) + quants, load_i64(stack + 8 * j + 24) + quants
                upper = splat_4_bytes(load_i32(stack + _UPPER + 16 * j + 4 * b))
                lower = splat_4_bytes(load_i32(stack + _LOWER + 16 * j + 4 * b))
                weights = load_4_rows(r, s, t, u)
                if type_ == Q4_0:
                    x0, x1 = low_nibbles(weights), high_nibbles(weights)
                    upper0, lower0 = dot_nibbles(upper0, x0, upper), dot_nibbles(lower0, x0, lower)
                    upper1, lower1 = dot_nibbles(upper1, x1, upper), dot_nibbles(lower1, x1, lower)
                else:
                    x0, x1 = weights, load_4_rows(r + 16, s + 16, t + 16, u + 16)
                    upper0, lower0 = dot_bytes(upper0, x0, upper), dot_bytes(lower0, x0, lower)
                    upper1, lower1 = dot_bytes(upper1, x1, upper), dot_bytes(lower1, x1, lower)
            begin = splat_i32(load_i32(stack + _BEGIN + 4 * b))
            sum0 = add_i32(add_i32(begin, lower0), shift_left(upper0, np.int32(8)))
            sum1 = add_i32(add_i32(begin, lower1), shift_left(upper1, np.int32(8)))
            to, scale = y + 128 * (first + b), splat(load_f32(stack + _SCALES + 4 * b))
            store_f32x16(to, fma(to_f32(sum0), scale, load_f32x16(to)))
            store_f32x16(to + 64, fma(to_f32(sum1), scale, load_f32x16(to + 64)))


@inline
def _axpys_blocks(type_, w, row_bytes, n, rows, count, next_w, next_rows, values, y):
    """Q4_0 and Q8_0."""
    stack = stack_4k()
    for j in range(GROUP):
        store_i64(stack + _NEXT + 8 * j, 0)
    for i in range(0, count, GROUP):
        n_rows = min(GROUP, count - i)
        for j in range(n_rows):
            store_i64(stack + 8 * j, w + row_number(rows, i + j) * row_bytes)
            store_f32(stack + _VALUES + 4 * j, load_f32(values + 4 * (i + j)))
            following = next_w + row_number(next_rows, i + j) * row_bytes
            store_i64(stack + _NEXT + 8 * j, following if rows != 0 else 0)
        while n_rows % 4:  # a row once more, times 0
            store_i64(stack + 8 * n_rows, load_i64(stack))
            store_f32(stack + _VALUES + 4 * n_rows, np.float32(0))
            n_rows += 1
        _add_group(type_, stack, n, n_rows, y)


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
            _axpys_blocks(type_, w, row_bytes, n, rows, count, next_w, next_rows, values, y)
        else:
            nbytes = n // block_size * block_bytes
            _axpys_float(type_, w, row_bytes, n, rows, count, next_w, next_rows, values, y, nbytes)

    return Kernel(axpys, 9, f"axpys_{GGMLType(type_).name}")


# axpys(w, row_bytes, n, rows, count, next_w, next_rows, values, y), arguments as in rows.DOTS.
AXPYS = {int(type_): _make_axpys(int(type_)) for type_ in COMPUTE_TYPES}
