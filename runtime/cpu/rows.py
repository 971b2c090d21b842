"""Rows of weights: dot products with packed activations, and widening; one place per format.

Packed activations of one token (`pack`), n columns padded to n_pad = a multiple of 512, planes
in this order (all offsets are multiples of 64):

    scales   f32  [n_pad / 32]   amax / 127 of each block of 32
    q8       int8 [n_pad]        natural order                       for Q8_0 and Q6_K rows
    bias8    i32  [n_pad / 4]    -32 * (sum of 4 neighbours)         for Q8_0 and Q6_K rows
    q4       int8 [n_pad]        per 4 blocks: the first 16 of each, then the last 16 of each,
                                 as the nibbles of 4 Q4_0 blocks lie     for Q4_0 rows
    bias4    i32  [n_pad / 8]    -8 * (sum of the 8 that meet in one lane)
    blocks   48 bytes [n_pad / 32]: q8 [32], scale, -8 * (sum of 32), -32 * (sum of the first 16, of
                                    the last 16); all that gemm.py needs, in one place

Rounding: DESIGN.md section 6 (int8 in blocks of 32, half to even), the same as
formats.round_activations. Float formats read the activations as they are.
"""

from __future__ import annotations

import numpy as np

from ..formats import BLOCK_SIZES, COMPUTE_TYPES, SMALLEST_AMAX, GGMLType
from ..formats import row_bytes as bytes_of
from .jit import Kernel, function, inline
from .quants import (
    add_sums,
    dots_q4_0,
    dots_q8_0,
    q4_0_high,
    q4_0_low,
    q6_k_first,
    q6_k_scales,
    q6_k_second,
    scales_q4_0,
    scales_q8_0,
    spread_first,
    spread_fourth,
    spread_second,
    spread_third,
    store_4_rows,
)
from .simd import (
    absolute,
    add,
    and_i32,
    dot_nibbles,
    fma,
    fma1,
    largest_magnitude,
    load_bf16,
    load_bf16x16,
    load_f16,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i8x16,
    load_i8x64,
    load_i32,
    load_i32x16,
    load_u8,
    load_u8x16,
    low_bits,
    max16_magnitude,
    mul,
    or_i32,
    prefetch,
    prefetch_far,
    rint,
    scale_i32,
    shift_left,
    shift_right,
    splat,
    splat_i32,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i32x16,
    store_sums,
    store_u8,
    sub,
    sum16,
    to_f32,
)

F32, F16, BF16 = int(GGMLType.F32), int(GGMLType.F16), int(GGMLType.BF16)
Q8_0, Q4_0 = int(GGMLType.Q8_0), int(GGMLType.Q4_0)
Q4_1, Q5_0, Q5_1 = int(GGMLType.Q4_1), int(GGMLType.Q5_0), int(GGMLType.Q5_1)
Q4_K, Q5_K, Q6_K = int(GGMLType.Q4_K), int(GGMLType.Q5_K), int(GGMLType.Q6_K)

BLOCK = 48  # bytes of one of a pack's blocks
NEAR = 4096  # bytes between a read and its last prefetch; by whole rows, so that lists work
SLACK = 96  # numbers that may be read behind a list of rows: those of a call, and what is near
SCRATCH = 576  # bytes of a thread's scratch that `dots` uses for the ends of four rows


@inline
def planes(n):
    """Return n_pad and the offsets of q8, bias8, q4, bias4, blocks in a pack."""
    n_pad = (n + 511) // 512 * 512
    q8 = n_pad // 8
    return n_pad, q8, q8 + n_pad, q8 + 2 * n_pad, q8 + 3 * n_pad, q8 + 7 * n_pad // 2


@inline
def pack_stride(n):
    """Return the bytes of one token's pack for rows of n."""
    # A line more than the planes, so that the packs of a tile do not meet in the same cache sets.
    return (n + 511) // 512 * 512 // 32 * (4 + 3 * 32 + 16 + BLOCK) + 64


pack_bytes = pack_stride.py_func


@function
def pack_piece(x, n, out, ones, first, end):
    """Round x [first : end] of a float32 x [n] into its planes at `out`.

    n is a multiple of 32, first and end are of 512; end may be beyond n. `ones`: address of 64
    bytes of 1. Reads 4 bytes a number, writes 5.1.
    """
    n_pad, q8, bias8, q4, bias4, blocks = planes(n)
    q8, bias8, q4, bias4, blocks = out + q8, out + bias8, out + q4, out + bias4, out + blocks
    zero, end = splat(np.float32(0)), min(end, n_pad)
    for block in range(first // 32, end // 32):
        low, high, scale = zero, zero, np.float32(0)
        if block * 32 < n:
            low, high = load_f32x16(x + 128 * block), load_f32x16(x + 128 * block + 64)
            amax = max16_magnitude(largest_magnitude(high, absolute(low)))
            if amax < SMALLEST_AMAX:
                amax = np.float32(0)
            scale = amax / np.float32(127)
            inverse = splat(np.float32(0) if amax == 0 else np.float32(127) / amax)
            low, high = rint(mul(low, inverse)), rint(mul(high, inverse))
        store_f32(out + 4 * block, scale)
        store_i8x16(q8 + 32 * block, low)
        store_i8x16(q8 + 32 * block + 16, high)
        store_f32(blocks + BLOCK * block + 32, scale)
        store_i8x16(blocks + BLOCK * block, low)
        store_i8x16(blocks + BLOCK * block + 16, high)
        group = q4 + block // 4 * 128 + block % 4 * 16
        store_i8x16(group, low)
        store_i8x16(group + 64, high)
    one = load_i8x64(ones)
    nothing = scale_i32(load_i32x16(ones), 0)
    for i in range(first // 64, end // 64):
        sums = dot_nibbles(nothing, one, load_i8x64(q8 + 64 * i))
        store_i32x16(bias8 + 64 * i, scale_i32(sums, -32))
        store_sums(scale_i32(sums, -8), blocks + 2 * BLOCK * i + 36, BLOCK)
    for i in range(first // 128, end // 128):
        sums = dot_nibbles(nothing, one, load_i8x64(q4 + 128 * i))
        sums = dot_nibbles(sums, one, load_i8x64(q4 + 128 * i + 64))
        store_i32x16(bias4 + 64 * i, scale_i32(sums, -8))


@function
def pack(x, n, out, ones):
    """Round float32 x [n] into its planes at `out`, see pack_piece."""
    pack_piece(x, n, out, ones, 0, planes(n)[0])


@inline
def ask(far, mid, near, n_lines):
    """Ask for lines of what comes later, of what comes sooner and of what comes next.

    Every line is asked for three times on its way: what is asked for while a core waits for as many
    lines as it can is dropped, without a sign. Into the second cache, which waits for more lines
    than the first, at last into that. A piece with every piece that is read, since too many at once
    hold up what is read meanwhile.
    """
    for line in range(0, 64 * n_lines, 64):
        prefetch_far(far + line)
        prefetch_far(mid + line)
        prefetch(near + line)


@inline
def _four_groups(type_, r, s, t, u, x, bias, q):
    """Return (parts, scales) of a group of each of four rows, see quants.py."""
    if type_ == Q4_0:
        return dots_q4_0(r, s, t, u, bias, q), scales_q4_0(r, s, t, u, x)
    return dots_q8_0(r, s, t, u, bias, q), scales_q8_0(r, s, t, u, x)


@inline
def _dot4_blocks(type_, rows, n, x, scratch, far, mid, near, out):
    """out [4] = the dot products of four rows of Q4_0 or Q8_0; call it with a constant type.

    Q4_0: sum over blocks of d * s * (sum of q4 * q8 - 8 * sum of q8), n / 32 * 18 bytes read a row;
    Q8_0: sum over blocks of d * s * (sum of q8 * q8), n / 32 * 34 bytes.

    Four rows share what they read of x. What comes next is asked for one row after the other: of
    neighbours that is one run of lines, as prefetchers like it (AMD's lose their way in several).
    """
    _, q8, bias8, q4, bias4, _ = planes(n)
    is_q4_0 = type_ == Q4_0
    q, bias, bias_bytes = (x + q4, x + bias4, 64) if is_q4_0 else (x + q8, x + bias8, 128)
    size, n_groups, rest = 72 if is_q4_0 else 136, n // 128, n // 32 % 4
    r, s, t, u = rows
    none = splat_i32(np.int32(0))
    total, parts, scales = splat(np.float32(0)), (none, none, none, none), splat(np.float32(0))
    n_lines, at_a_time = (4 * size + 63) // 64, (n_groups + 3) // 4
    for k in range(4):
        later, sooner, close = far[k], mid[k], near[k]
        for _ in range(at_a_time * k, min(at_a_time * (k + 1), n_groups)):
            ask(later, sooner, close, n_lines)
            # One group is summed up while the next is multiplied.
            before, factors = parts, scales
            parts, scales = _four_groups(type_, r, s, t, u, x, bias, q)
            total = add_sums(total, before, factors)
            r, s, t, u = r + size, s + size, t + size, u + size
            later, sooner, close = later + 4 * size, sooner + 4 * size, close + 4 * size
            x, bias, q = x + 16, bias + bias_bytes, q + 128
    total = add_sums(total, parts, scales)
    if rest:
        ask(later, sooner, close, n_lines)
        nbytes = size // 4 * rest
        r, s = _padded(r, nbytes, size, scratch), _padded(s, nbytes, size, scratch + size)
        t = _padded(t, nbytes, size, scratch + 2 * size)
        u = _padded(u, nbytes, size, scratch + 3 * size)
        parts, scales = _four_groups(type_, r, s, t, u, x, bias, q)
        total = add_sums(total, parts, scales)
    store_4_rows(total, out)


@inline
def _padded(w, nbytes, size, to):
    """Return a copy of the end of a row, which is inside a group, with blocks of zero behind it."""
    for i in range(size):
        store_u8(to + i, load_u8(w + i) if i < nbytes else np.uint8(0))
    return to


@inline
def _q6_k_group(weights, scales, bias, q, total):
    """total + 64 weights of a Q6_K block times their scales, each over 4 lanes."""
    lanes = dot_nibbles(load_i32x16(bias), weights, load_i8x64(q))
    return fma(to_f32(lanes), scales, total)


@inline
def _dot_q6_k(w, n, x, far, mid, near):
    """Sum of d * scale * s * (sum of q6 * q8 - 32 * sum of q8); reads n / 256 * 210 bytes.

    A block of 256: 128 bytes of low nibbles, 64 of high pairs, 16 scales, d.
    """
    _, q, bias, _, _, _ = planes(n)
    q, bias = x + q, x + bias
    even, odd = splat(np.float32(0)), splat(np.float32(0))
    for _ in range(n // 256):
        ask(far, mid, near, 4)  # a line that nobody asks for stops those behind it
        scales = q6_k_scales(w + 192, load_f16(w + 208), x)
        low, high, scale = load_i8x64(w), w + 128, spread_first(scales)
        even = _q6_k_group(q6_k_first(low, high), scale, bias, q, even)
        scale = spread_second(scales)
        even = _q6_k_group(q6_k_second(low, high), scale, bias + 64, q + 64, even)
        low, high, scale = load_i8x64(w + 64), w + 160, spread_third(scales)
        odd = _q6_k_group(q6_k_first(low, high), scale, bias + 128, q + 128, odd)
        scale = spread_fourth(scales)
        odd = _q6_k_group(q6_k_second(low, high), scale, bias + 192, q + 192, odd)
        w, far, mid, near = w + 210, far + 210, mid + 210, near + 210
        x, bias, q = x + 32, bias + 256, q + 256
    return sum16(add(even, odd))


@inline
def load16(type_, w, i):
    """Return weights i to i + 15 (i a multiple of 16) of the row at w as float32.

    One format is chosen where `type_` is a constant. Layouts: formats.py.
    """
    if type_ == F16:
        return load_f16x16(w + 2 * i)
    if type_ == BF16:
        return load_bf16x16(w + 2 * i)
    if type_ == F32:
        return load_f32x16(w + 4 * i)
    if type_ == Q6_K:
        return _load_q6_k(w + i // 256 * 210, i % 256)
    if type_ in (Q4_K, Q5_K):
        return _load_q45_k(type_, w + i // 256 * (144 if type_ == Q4_K else 176), i % 256)
    # Blocks of 32: the first 16 weights are low nibbles, the others high ones.
    shift = i % 32 // 4
    if type_ == Q4_1:
        block = w + i // 32 * 20
        q = and_i32(shift_right(load_u8x16(block + 4), shift), 15)
        return fma(to_f32(q), splat(load_f16(block)), splat(load_f16(block + 2)))
    block = w + i // 32 * (22 if type_ == Q5_0 else 24)
    at = block + (2 if type_ == Q5_0 else 4)
    q = and_i32(shift_right(load_u8x16(at + 4), shift), 15)
    upper = low_bits(load_i32(at) >> np.int32(i % 32))
    q = or_i32(q, shift_left(upper, 4))
    scale = splat(load_f16(block))
    if type_ == Q5_0:
        return mul(sub(to_f32(q), splat(np.float32(16))), scale)
    return fma(to_f32(q), scale, splat(load_f16(block + 2)))


@inline
def _load_q6_k(block, i):
    half, rest = i // 128, i % 128
    quarter, j = rest // 32, rest % 32  # which nibble and bit pair; which byte
    low = load_u8x16(block + 64 * half + j + 32 * (quarter & 1))
    low = and_i32(shift_right(low, quarter // 2 * 4), 15)
    pair = shift_right(load_u8x16(block + 128 + 32 * half + j), 2 * quarter)
    q = or_i32(low, shift_left(and_i32(pair, 3), 4))
    scale = load_f16(block + 208) * np.float32(np.int8(load_u8(block + 192 + i // 16)))
    return mul(sub(to_f32(q), splat(np.float32(32))), splat(scale))


@inline
def _load_q45_k(type_, block, i):
    group, j = i // 32, i % 32
    scales = block + 4
    if group < 4:
        s, m = load_u8(scales + group) & 63, load_u8(scales + group + 4) & 63
    else:
        rest = load_u8(scales + group + 4)
        s = (rest & 15) | (load_u8(scales + group - 4) >> 6) << 4
        m = (rest >> 4) | (load_u8(scales + group) >> 6) << 4
    quants = block + (16 if type_ == Q4_K else 48) + group // 2 * 32 + j
    q = and_i32(shift_right(load_u8x16(quants), group % 2 * 4), 15)
    if type_ == Q5_K:
        upper = and_i32(shift_right(load_u8x16(block + 16 + j), group), 1)
        q = or_i32(q, shift_left(upper, 4))
    low = -load_f16(block + 2) * np.float32(m)
    return fma(to_f32(q), splat(load_f16(block) * np.float32(s)), splat(low))


@inline
def load1(type_, w, i):
    if type_ == F16:
        return load_f16(w + 2 * i)
    if type_ == BF16:
        return load_bf16(w + 2 * i)
    return load_f32(w + 4 * i)


@inline
def _dot_float(type_, size, w, n, x, far, mid, near):
    """Sum of w * x with weights widened to float32; call it with a constant type.

    `size`: the bytes of 32 weights.
    """
    even, odd = splat(np.float32(0)), splat(np.float32(0))
    for i in range(0, n - 31, 32):
        ask(far, mid, near, (size + 63) // 64)
        far, mid, near = far + size, mid + size, near + size
        even = fma(load16(type_, w, i), load_f32x16(x + 4 * i), even)
        odd = fma(load16(type_, w, i + 16), load_f32x16(x + 4 * i + 64), odd)
    total = sum16(add(even, odd))
    for i in range(n // 32 * 32, n):
        total = fma1(load1(type_, w, i), load_f32(x + 4 * i), total)
    return total


@inline
def fill_zero(y, n):
    """y [n] = 0 (float32)."""
    zero = splat(np.float32(0))
    for i in range(0, n - 15, 16):
        store_f32x16(y + 4 * i, zero)
    for i in range(n // 16 * 16, n):
        store_f32(y + 4 * i, np.float32(0))


@inline
def clear_flags(flags, n):
    """flags [n] = 0 (bytes)."""
    fill_zero(flags, n // 4)
    for i in range(n // 4 * 4, n):
        store_u8(flags + i, np.uint8(0))


# -- kernels over several rows ----------------------------------------------------------------
#
# A few for each format, compiled when a model first needs it; jobs call them by the addresses
# in a MATRIX, once for a task, and so know nothing of formats. `rows` is a list of int32 row
# numbers, or 0 for the `count` rows from `w` on. While a row is read another is prefetched: of
# `next_rows`, or from `next_w` on, as many. Behind a list SLACK more numbers must be readable,
# whatever they are: prefetching takes any address.


@inline
def row_number(rows, i):
    """Return the i-th number of a list of rows; without one, i."""
    return np.int64(load_i32(rows + 4 * i)) if rows != 0 else i


@inline
def near_rows(row_bytes, step):
    """Return how many rows, whole steps, lie between what is read and what is `near`, see ask."""
    rows = (NEAR + step * row_bytes - 1) // (step * row_bytes) * step
    return min(rows, 16 - step)


@inline
def fetch_far(row, nbytes):
    """Ask for a whole row of a list that comes later, or for the columns of it that are wanted.

    Into the second cache: it waits for more lines at a time than the first, and rows here and
    there are nothing that the machine foresees.
    """
    for line in range(0, nbytes, 64):
        prefetch_far(row + line)
    prefetch_far(row + nbytes - 1)  # it may begin in the middle of a line


@inline
def fetch_rows(w, row_bytes, rows, count, nbytes):
    """Ask for the first rows of a list, which nothing before has asked for: nbytes of each."""
    for i in range(count):
        fetch_far(w + row_number(rows, i) * row_bytes, nbytes)


@inline
def row_at(w, row_bytes, rows, i, count):
    """Return where the i-th of `count` rows is; behind the last, that one."""
    return w + row_number(rows, min(i, count - 1)) * row_bytes


@inline
def rows_at(w, row_bytes, rows, i, last):
    """Return where the i-th row is and the three behind it; behind the last, that one."""
    if rows == 0:
        at, left = w + i * row_bytes, last - i
        return (
            at,
            at + min(left, 1) * row_bytes,
            at + min(left, 2) * row_bytes,
            at + min(left, 3) * row_bytes,
        )
    return (
        w + row_number(rows, i) * row_bytes,
        w + row_number(rows, min(i + 1, last)) * row_bytes,
        w + row_number(rows, min(i + 2, last)) * row_bytes,
        w + row_number(rows, min(i + 3, last)) * row_bytes,
    )


@inline
def rows_then(w, row_bytes, rows, i, count, next_w, next_rows):
    """Return the same of rows that are only asked for, counted on into the next behind the last."""
    if i < count:
        return rows_at(w, row_bytes, rows, i, i + 3)
    return rows_at(next_w, row_bytes, next_rows, i - count, i - count + 3)


def _make_dots(type_):
    size, in_fours = bytes_of(GGMLType(type_), 256) // 8, type_ in (Q4_0, Q8_0)  # of 32 weights

    def dots(w, row_bytes, n, rows, count, next_w, next_rows, x, packed, scratch, out):
        step = 4 if in_fours else 1
        close = near_rows(row_bytes, step)
        for i in range(0, count, step):
            these, to = rows_at(w, row_bytes, rows, i, count - 1), out + 4 * i
            far = rows_at(next_w, row_bytes, next_rows, i, i + 3)
            mid = rows_then(w, row_bytes, rows, i + 2 * close, count, next_w, next_rows)
            near = rows_then(w, row_bytes, rows, i + close, count, next_w, next_rows)
            if in_fours:
                _dot4_blocks(type_, these, n, packed, scratch, far, mid, near, to)
            elif type_ == Q6_K:
                store_f32(to, _dot_q6_k(these[0], n, packed, far[0], mid[0], near[0]))
            else:
                store_f32(to, _dot_float(type_, size, these[0], n, x, far[0], mid[0], near[0]))

    return Kernel(dots, 11, f"dots_{GGMLType(type_).name}")


def _make_widen(type_):
    block_size, block_bytes = BLOCK_SIZES[GGMLType(type_)]
    is_block_of_32 = type_ in (Q4_0, Q8_0)

    def widen(w, row_bytes, n, count, out, out_bytes):
        for i in range(count):
            at, to = w + i * row_bytes, out + i * out_bytes
            fetch_far(at + 24 * row_bytes, n // block_size * block_bytes)
            if is_block_of_32:
                for block in range(n // 32):
                    source = at + block * block_bytes
                    scale = splat(load_f16(source))
                    if type_ == Q4_0:
                        low, high = q4_0_low(source + 2), q4_0_high(source + 2)
                    else:
                        low, high = load_i8x16(source + 2), load_i8x16(source + 18)
                    store_f32x16(to + 128 * block, mul(low, scale))
                    store_f32x16(to + 128 * block + 64, mul(high, scale))
            else:
                for j in range(0, n - 15, 16):
                    store_f32x16(to + 4 * j, load16(type_, at, j))
                for j in range(n // 16 * 16, n):
                    store_f32(to + 4 * j, load1(type_, at, j))

    return Kernel(widen, 6, f"widen_{GGMLType(type_).name}")


# dots(w, row_bytes, n, rows, count, next_w, next_rows, x, packed, scratch, out): out [count, to a
# multiple of 4] = rows . activations, float32 `x` [n], or `packed` where the format is integer.
DOTS = {int(type_): _make_dots(int(type_)) for type_ in COMPUTE_TYPES}
# widen(w, row_bytes, n, count, out, out_bytes): the rows from w on as float32 [n], out_bytes apart.
# Those behind are asked for.
WIDENS = {int(type_): _make_widen(int(type_)) for type_ in COMPUTE_TYPES}
