"""Sums of rows of weights: y [n] += sum of values [count] * rows; one place per format.

Float formats are added two rows at a time, one after the other, so that y is read and written half
as often. Q4_0 and Q8_0 are added GROUP rows at a time, in integers: what a row's block of 32
weights is multiplied by, its value * d, is rounded to 21 bits of the largest of the group's,

    y [32] += s * sum over the group of k * q
    s = max over the group of |value * d| / K_MAX,  k = rint(value * d / s)

which are as fine as floats (14 bits are faster by a quarter, but then activations that lie between
two steps of int8 come out otherwise than on a GPU or among other tokens). k is three digits, signed
bytes, so that integer dot products, as in rows.py, multiply four rows at once, exactly. Of Q4_0 the
low nibbles are multiplied, and the bytes as they are, which hold 16 times the high ones beside the
low ones: their difference is taken once for a group. Sums are modulo 2^32, and less when complete.
Bytes: the rows, once.
"""

from __future__ import annotations

import numpy as np

from ..formats import BLOCK_SIZES, COMPUTE_TYPES, GGMLType
from ..formats import row_bytes as bytes_of
from .isa import Q8_BIAS
from .jit import Kernel, inline
from .quants import load_4_rows, load_q4_0_scales, load_q8_0_scales, splat_4_bytes
from .rows import Q4_0, Q8_0, ask, fetch_far, load1, load16, row_at, row_number
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
    largest_magnitude,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    low_nibbles,
    mul,
    scale_i32,
    shift_left,
    shift_right_signed,
    splat,
    splat_i32,
    stack_4k,
    store_f32,
    store_f32x16,
    store_i32x16,
    store_i64,
    sub_i32,
    to_f32,
    to_i32,
)

GROUP = 16  # rows
K_MAX = 63 << 14  # digits are from -64 to 63: what dot_nibbles takes with whole bytes
_BLOCKS = 16  # of 32 columns each, whose factors are made together
_LEAST = np.float32(1e-30)  # a group's largest factor: below, its reciprocal would overflow

# On the stack, bytes: addresses of rows [GROUP], of rows to be fetched [GROUP], values float32
# [GROUP], the halves of a row's blocks, factors float32 [GROUP, _BLOCKS]; for each block s float32
# and what is added to its sums, int32; and the three digits of k, the lowest first, those of four
# rows together [3, GROUP / 4, _BLOCKS, 4].
_NEXT = 8 * GROUP
_VALUES = _NEXT + 8 * GROUP
_HALVES = _VALUES + 4 * GROUP
_FACTORS = _HALVES + 64
_SCALES = _FACTORS + 4 * GROUP * _BLOCKS
_EXTRA = _SCALES + 4 * _BLOCKS
_DIGITS = _EXTRA + 4 * _BLOCKS
_SIZE = GROUP * _BLOCKS
assert _DIGITS + 3 * _SIZE <= 4096


@inline
def _k(stack, j, scale):
    """k of row j, int32 x 16."""
    return to_i32(mul(load_f32x16(stack + _FACTORS + 64 * j), scale))


@inline
def _factors(type_, block_bytes, stack, first, n_blocks):
    """Make k, s and what is added to the sums for some blocks of the rows."""
    largest = splat(_LEAST)
    for j in range(GROUP):
        row = load_i64(stack + 8 * j) + block_bytes * first
        if n_blocks == _BLOCKS:
            scales = load_q4_0_scales(row) if type_ == Q4_0 else load_q8_0_scales(row)
        else:
            for b in range(n_blocks):
                copy_u16(stack + _HALVES + 2 * b, row + block_bytes * b)
            scales = load_f16x16(stack + _HALVES)
        factors = mul(scales, splat(load_f32(stack + _VALUES + 4 * j)))
        store_f32x16(stack + _FACTORS + 64 * j, factors)
        largest = largest_magnitude(factors, largest)
    scale, total = divide(splat(np.float32(K_MAX)), largest), splat_i32(np.int32(0))
    h = splat_i32(np.int32(64))
    store_f32x16(stack + _SCALES, mul(largest, splat(np.float32(1 / K_MAX))))
    for j in range(0, GROUP, 4):
        k0, k1 = _k(stack, j, scale), _k(stack, j + 1, scale)
        k2, k3 = _k(stack, j + 2, scale), _k(stack, j + 3, scale)
        total = add_i32(total, add_i32(add_i32(k0, k1), add_i32(k2, k3)))
        at = stack + _DIGITS + 16 * j
        for _ in range(2):
            k0, k1, k2, k3 = add_i32(k0, h), add_i32(k1, h), add_i32(k2, h), add_i32(k3, h)
            store_i32x16(at, four_digits(k0, k1, k2, k3))
            k0, k1 = shift_right_signed(k0, 7), shift_right_signed(k1, 7)
            k2, k3 = shift_right_signed(k2, 7), shift_right_signed(k3, 7)
            at += _SIZE
        store_i32x16(at, four_bytes(k0, k1, k2, k3))
    # Nibbles are weights + 8; of bytes see dot_bytes.
    store_i32x16(stack + _EXTRA, scale_i32(total, np.int32(-8 if type_ == Q4_0 else -Q8_BIAS)))


@inline
def _add_4_rows(type_, stack, j, quants, at, a, b, c, d, e, f):
    """a, b, c += the first 16 columns of rows j to j + 3 times each digit; d, e, f: of the others.

    Of Q4_0 those of the others and, once more, the first, see above.
    """
    r, s = load_i64(stack + 8 * j) + quants, load_i64(stack + 8 * j + 8) + quants
    t, u = load_i64(stack + 8 * j + 16) + quants, load_i64(stack + 8 * j + 24) + quants
    ka = splat_4_bytes(load_i32(at + 16 * j))
    kb = splat_4_bytes(load_i32(at + _SIZE + 16 * j))
    kc = splat_4_bytes(load_i32(at + 2 * _SIZE + 16 * j))
    x = load_4_rows(r, s, t, u)
    if type_ == Q4_0:
        y = low_nibbles(x)
        a, b, c = dot_nibbles(a, y, ka), dot_nibbles(b, y, kb), dot_nibbles(c, y, kc)
        return a, b, c, dot_nibbles(d, x, ka), dot_nibbles(e, x, kb), dot_nibbles(f, x, kc)
    y = load_4_rows(r + 16, s + 16, t + 16, u + 16)
    a, b, c = dot_bytes(a, x, ka), dot_bytes(b, x, kb), dot_bytes(c, x, kc)
    return a, b, c, dot_bytes(d, y, ka), dot_bytes(e, y, kb), dot_bytes(f, y, kc)


@inline
def _add_piece(type_, block_bytes, stack, first, n_blocks, y):
    """y += some blocks of the rows.

    Of the rows that come later a piece of one is asked for with every block: all at once would be
    more than a core waits for beside its work.
    """
    _factors(type_, block_bytes, stack, first, n_blocks)
    zero = splat_i32(np.int32(0))
    for i in range(n_blocks):
        for j in range(i, GROUP, n_blocks):
            fetch_far(load_i64(stack + _NEXT + 8 * j) + block_bytes * first, block_bytes * n_blocks)
        quants, at = block_bytes * (first + i) + 2, stack + _DIGITS + 4 * i
        a, b, c, d, e, f = _add_4_rows(
            type_, stack, 0, quants, at, zero, zero, zero, zero, zero, zero
        )
        a, b, c, d, e, f = _add_4_rows(type_, stack, 4, quants, at, a, b, c, d, e, f)
        a, b, c, d, e, f = _add_4_rows(type_, stack, 8, quants, at, a, b, c, d, e, f)
        a, b, c, d, e, f = _add_4_rows(type_, stack, 12, quants, at, a, b, c, d, e, f)
        extra = splat_i32(load_i32(stack + _EXTRA + 4 * i))
        a, d = add_i32(a, shift_left(b, 7)), add_i32(d, shift_left(e, 7))
        if type_ == Q4_0:
            d, f = shift_right_signed(sub_i32(d, a), 4), shift_right_signed(sub_i32(f, c), 4)
        a, d = add_i32(a, shift_left(c, 14)), add_i32(d, shift_left(f, 14))
        to, scale = y + 128 * (first + i), splat(load_f32(stack + _SCALES + 4 * i))
        store_f32x16(to, fma(to_f32(add_i32(a, extra)), scale, load_f32x16(to)))
        store_f32x16(to + 64, fma(to_f32(add_i32(d, extra)), scale, load_f32x16(to + 64)))


@inline
def _axpys_blocks(type_, block_bytes, w, row_bytes, n, rows, count, next_w, next_rows, values, y):
    """Q4_0 and Q8_0."""
    stack = stack_4k()
    for i in range(0, count, GROUP):
        for j in range(GROUP):
            k = min(i + j, count - 1)  # the last row once more, times 0
            row = w + row_number(rows, k) * row_bytes
            store_i64(stack + 8 * j, row)
            store_i64(stack + _NEXT + 8 * j, next_w + row_number(next_rows, k) * row_bytes)
            value = load_f32(values + 4 * k) if i + j < count else np.float32(0)
            store_f32(stack + _VALUES + 4 * j, value)
        whole = n // 32 // _BLOCKS * _BLOCKS
        for first in range(0, whole, _BLOCKS):
            _add_piece(type_, block_bytes, stack, first, _BLOCKS, y)
        if n // 32 > whole:
            _add_piece(type_, block_bytes, stack, whole, n // 32 - whole, y)


@inline
def _axpy2_float(type_, size, v, w, n, a, b, y, far_v, far_w, near_v, near_w):
    """y += a * row v + b * row w; `size`: the bytes of 16 weights."""
    scale_v, scale_w, at = splat(a), splat(b), 0
    for i in range(0, n - 15, 16):
        ask(far_v + at, far_v + at, near_v + at, 1)
        ask(far_w + at, far_w + at, near_w + at, 1)
        total = fma(load16(type_, v, i), scale_v, load_f32x16(y + 4 * i))
        store_f32x16(y + 4 * i, fma(load16(type_, w, i), scale_w, total))
        at += size
    for i in range(n // 16 * 16, n):
        one = fma1(load1(type_, v, i), a, load_f32(y + 4 * i))
        store_f32(y + 4 * i, fma1(load1(type_, w, i), b, one))


@inline
def _axpys_float(type_, size, w, row_bytes, n, rows, count, next_w, next_rows, values, y):
    for i in range(0, count, 2):
        # A last row without a partner is added together with 0 times itself.
        j = min(i + 1, count - 1)
        a = load_f32(values + 4 * i)
        b = load_f32(values + 4 * j) if j > i else np.float32(0)
        v, u = row_at(w, row_bytes, rows, i, count), row_at(w, row_bytes, rows, j, count)
        far_v = row_at(next_w, row_bytes, next_rows, i, count)
        far_u = row_at(next_w, row_bytes, next_rows, j, count)
        near_v = row_at(w, row_bytes, rows, j + 1, count)
        near_u = row_at(w, row_bytes, rows, j + 2, count)
        _axpy2_float(type_, size, v, u, n, a, b, y, far_v, far_u, near_v, near_u)


def _make_axpys(type_):
    size, in_groups = bytes_of(GGMLType(type_), 256) // 16, type_ in (Q4_0, Q8_0)  # of 16 weights
    block_bytes = BLOCK_SIZES[GGMLType(type_)][1]

    def axpys(w, row_bytes, n, rows, count, next_w, next_rows, values, y):
        if in_groups:
            _axpys_blocks(
                type_, block_bytes, w, row_bytes, n, rows, count, next_w, next_rows, values, y
            )
        else:
            _axpys_float(type_, size, w, row_bytes, n, rows, count, next_w, next_rows, values, y)

    return Kernel(axpys, 9, f"axpys_{GGMLType(type_).name}")


# axpys(w, row_bytes, n, rows, count, next_w, next_rows, values, y), arguments as in rows.DOTS.
AXPYS = {int(type_): _make_axpys(int(type_)) for type_ in COMPUTE_TYPES}
