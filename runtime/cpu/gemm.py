"""Matrix times several tokens: 16 rows are unpacked, once, then multiplied with every token.

    out [n_tok, 16] = x [n_tok, n] . rows [16, n]

A panel holds 16 rows, a lane for each. Integer formats: `quads` int8 [n / 4][16][4] as they are
stored (0 to 15 for Q4_0, 0 to 63 for Q6_K, signed for Q8_0; with AMX, which multiplies bytes with
any sign, less 8 and 32, so that nothing is to be corrected), then scales f32 [n / block][16];
blocks of 32 weights (16 for Q6_K) are summed in integers with the int8 activations, then scaled.
The other formats: f32 [n][16].

Reads rows * n weights from memory, once. What a token gets depends neither on the tokens beside
it nor on how many there are.
"""

from __future__ import annotations

from numba import literally

from ..formats import COMPUTE_TYPES, INTEGER_DOT, GGMLType
from .isa import HAS_AMX, Q8_BIAS
from .jit import Kernel, inline
from .rows import (
    BLOCK,
    F32,
    Q4_0,
    Q6_K,
    Q8_0,
    load1,
    load16,
    pack_stride,
    planes,
)
from .simd import (
    load_f32x16,
    load_i64,
    mul,
    prefetch_far,
    shift_left,
    shift_right_signed,
    store_f32,
    store_f32x16,
    store_i32x16,
    store_i64,
    sub_bytes,
    to_f32,
)
from .tile import (
    TILE,
    TILE_ROWS,
    configure_tiles,
    float_step,
    four_addresses,
    load_4_quads,
    load_4x16,
    load_8_quads,
    load_halves,
    no_totals,
    products_step,
    release_tiles,
    row_addresses,
    signed_step,
    six_bits_even,
    six_bits_odd,
    split_nibbles,
    store_totals,
    tile_config,
    tile_products_4,
    tile_products_8,
    token_addresses,
    transpose,
    two_addresses,
    unsigned_step,
)

PANEL = 16  # rows
_SUMS, _FOLLOWING = 2048, 192  # bytes behind a panel: sums of two AMX tiles, what _following says


@inline
def panel_size(n):
    """Return the bytes of a panel of rows of n weights, in any format."""
    return 64 * ((n + 31) // 32 * 32) + _SUMS + _FOLLOWING


panel_bytes = panel_size.py_func


@inline
def _scales(n):
    """Return the offset of a panel's scales."""
    return 16 * n


@inline
def _following(panel, n):
    """Return where a panel keeps the addresses of the rows that are to be fetched with it.

    The first is 0 where they have been fetched already; behind them are the bytes of a row.
    """
    return panel + panel_size(n) - _FOLLOWING


@inline
def _fetch(following, row, done, n_steps):
    """Ask for the lines of the rows that follow whose turn is in one of n_steps (>= 1).

    One row after the other: prefetchers do not follow 16 runs at once. Returns (row, done), bytes
    of it, for the next step; they begin as (0, 0). Nothing if `following` is 0.
    """
    if following != 0 and row < PANEL:
        at, size = load_i64(following + 8 * row), load_i64(following + 8 * PANEL)
        for _ in range(PANEL * size // (64 * n_steps) + 1):
            prefetch_far(at + done)
            done += 64
            if done >= size:
                prefetch_far(at + size - 1)  # it may begin in the middle of a line
                row, done = row + 1, 0
                if row == PANEL:
                    break
                at = load_i64(following + 8 * row)
    return row, done


@inline
def _store_quads(at, quads, zero):
    """Store bytes that are `zero` more than the weights; with AMX the weights themselves."""
    for i in range(len(quads)):
        store_i32x16(at + 64 * i, sub_bytes(quads[i], zero) if HAS_AMX else quads[i])


@inline
def _block_of_32(type_, rows, block):
    """Return (eight quads, scales) of a block of Q4_0 or Q8_0; call it with a constant type.

    Q4_0: f16 scale, 16 bytes: weight j in the low, weight j + 16 in the high nibble of j.
    Q8_0: f16 scale, 32 signed bytes.
    """
    if type_ == Q4_0:
        return split_nibbles(load_4x16(rows, 18 * block + 2)), load_halves(rows, 18 * block)
    quads = load_4x16(rows, 34 * block + 2) + load_4x16(rows, 34 * block + 18)
    return quads, load_halves(rows, 34 * block)


@inline
def _unpack_32(type_, rows, following, n, panel):
    """Q4_0 and Q8_0."""
    n_blocks, row, done = n // 32, 0, 0
    for block in range(n_blocks):
        row, done = _fetch(following, row, done, n_blocks)
        quads, scale = _block_of_32(type_, rows, block)
        _store_quads(panel + 512 * block, quads, 8 if type_ == Q4_0 else 0)
        store_f32x16(panel + _scales(n) + 64 * block, scale)


@inline
def _unpack_q6_k_block(rows, start, quads_at, scales):
    """Block of 256: 128 bytes of low nibbles, 64 of bit pairs, 16 int8 scales, f16 d.

    `start`: its offset in the rows.
    """
    for half in range(2):
        for part in range(2):
            low = start + 64 * half + 16 * part
            pairs = load_4x16(rows, start + 128 + 32 * half + 16 * part)
            at = quads_at + 2048 * half + 256 * part
            quads = six_bits_even(load_4x16(rows, low), pairs)
            _store_quads(at, quads[:4], 32)
            _store_quads(at + 1024, quads[4:], 32)
            quads = six_bits_odd(load_4x16(rows, low + 32), pairs)
            _store_quads(at + 512, quads[:4], 32)
            _store_quads(at + 1536, quads[4:], 32)
    d, fours = load_halves(rows, start + 208), load_4x16(rows, start + 192)
    for i in range(16):
        scale = shift_right_signed(shift_left(fours[i // 4], 24 - 8 * (i % 4)), 24)
        store_f32x16(scales + 64 * i, mul(to_f32(scale), d))


@inline
def _unpack_q6_k(rows, following, n, panel):
    n_blocks, row, done = n // 256, 0, 0
    for block in range(n_blocks):
        row, done = _fetch(following, row, done, n_blocks)
        scales = panel + _scales(n) + 64 * 16 * block
        _unpack_q6_k_block(rows, 210 * block, panel + 4096 * block, scales)


@inline
def _unpack_float(type_, rows, following, n, panel):
    """Every weight as float32; call it with a constant type."""
    n_steps, row, done = n // 16, 0, 0
    for column in range(0, n - 15, 16):
        row, done = _fetch(following, row, done, n_steps)
        at = panel + 64 * column
        for i in range(16):
            store_f32x16(at + 64 * i, load16(type_, rows[i], column))
        transpose(at)
    for column in range(n // 16 * 16, n):
        for i in range(16):
            store_f32(panel + 64 * column + 4 * i, load1(type_, rows[i], column))


@inline
def _add_32(totals, tokens, quads, is_signed, scale, x):
    """totals + a block of 32 columns; x: where its activations lie in a pack."""
    if is_signed:
        return signed_step(totals, tokens, quads, scale, x, x + 32, x + 36, Q8_BIAS // 8)
    return unsigned_step(totals, tokens, quads, scale, x, x + 32, x + 36, 1)


@inline
def _add_64(totals, tokens, quads_at, scales, x):
    """totals + 64 columns of Q6_K, whose scales are those of 16 each."""
    for i in range(4):
        block, w = x + BLOCK * (i // 2), load_4_quads(quads_at + 256 * i)
        at, x_sum, scale = block + i % 2 * 16, block + 40 + i % 2 * 4, load_f32x16(scales + 64 * i)
        if HAS_AMX:
            factor = Q8_BIAS // 32
            totals = signed_step(totals, tokens, w, scale, at, block + 32, x_sum, factor)
        else:
            totals = unsigned_step(totals, tokens, w, scale, at, block + 32, x_sum, 1)
    return totals


@inline
def _multiply(type_, n, panel, tokens, following, out):
    """out [tokens, 16] for as many tokens as the tuple holds."""
    literally(type_)
    totals, scales, x = no_totals(tokens), panel + _scales(n), planes(n)[5]
    row, done = 0, 0
    if type_ == F32:
        for column in range(n):
            totals = float_step(totals, tokens, panel + 64 * column, 4 * column)
    elif type_ == Q6_K:
        for i in range(n // 64):
            row, done = _fetch(following, row, done, n // 64)
            at, scale = panel + 1024 * i, scales + 256 * i
            totals = _add_64(totals, tokens, at, scale, x + 2 * BLOCK * i)
    else:
        for i in range(n // 32):
            row, done = _fetch(following, row, done, n // 32)
            quads, scale = load_8_quads(panel + 512 * i), load_f32x16(scales + 64 * i)
            is_signed = type_ == Q8_0 or HAS_AMX
            totals = _add_32(totals, tokens, quads, is_signed, scale, x + BLOCK * i)
    store_totals(totals, out)


@inline
def _multiply_few(type_, rows, n, panel, tokens, following, out):
    """The same from rows as they are stored, unpacked into registers or a block at a time."""
    literally(type_)
    totals, x, row, done = no_totals(tokens), planes(n)[5], 0, 0
    if type_ == Q6_K:
        # In one loop: of two the kernel over 2 tokens came out 1.7 times as slow.
        for i in range(n // 64):
            if i % 4 == 0:
                row, done = _fetch(following, row, done, 5 * n // 256)
                _unpack_q6_k_block(rows, 210 * (i // 4), panel, panel + 4096)
            row, done = _fetch(following, row, done, 5 * n // 256)
            at, scale = panel + 1024 * (i % 4), panel + 4096 + 256 * (i % 4)
            totals = _add_64(totals, tokens, at, scale, x + 2 * BLOCK * i)
    else:
        for i in range(n // 32):
            row, done = _fetch(following, row, done, n // 32)
            quads, scale = _block_of_32(type_, rows, i)
            totals = _add_32(totals, tokens, quads, type_ == Q8_0, scale, x + BLOCK * i)
    store_totals(totals, out)


@inline
def _multiply_tiles(type_, n, panel, tokens, stride, following, sums, out):
    """The same by AMX, for tokens `stride` apart; `sums`: scratch for tile_products."""
    literally(type_)
    totals, scales, blocks = no_totals(tokens), panel + _scales(n), planes(n)[5]
    row, done = 0, 0
    if type_ == Q6_K:
        for i in range(n // 32):
            row, done = _fetch(following, row, done, n // 32)
            x, scale = blocks + BLOCK * i, scales + 128 * i
            tile_products_4(tokens[0] + x, stride, panel + 512 * i, sums)
            totals = products_step(totals, tokens, sums, scale, x + 32)
            totals = products_step(totals, tokens, sums + 1024, scale + 64, x + 32)
    else:
        for i in range(0, n // 32, 2):
            row, done = _fetch(following, row, done, (n // 32 + 1) // 2)
            x, scale = blocks + BLOCK * i, scales + 64 * i
            tile_products_8(tokens[0] + x, stride, panel + 512 * i, sums)
            totals = products_step(totals, tokens, sums, scale, x + 32)
            if i + 1 < n // 32:
                x += BLOCK
                totals = products_step(totals, tokens, sums + 1024, scale + 64, x + 32)
    store_totals(totals, out)


@inline
def _note_following(next_w, row_bytes, n, panel):
    """Write down which rows are fetched, the 16 at next_w; return where."""
    following = _following(panel, n)
    for i in range(PANEL):
        store_i64(following + 8 * i, next_w + row_bytes * i)
    store_i64(following + 8 * PANEL, row_bytes)
    return following


def _make_unpack(type_):
    is_block_of_32 = type_ in (Q4_0, Q8_0)

    def unpack(w, row_bytes, n, count, panel, is_next):
        here = row_addresses(w, row_bytes, 0, count - 1)
        noted = _note_following(w + PANEL * row_bytes, row_bytes, n, panel)
        following = noted if is_next != 0 else 0
        if is_block_of_32:
            _unpack_32(type_, here, following, n, panel)
        elif type_ == Q6_K:
            _unpack_q6_k(here, following, n, panel)
        else:
            _unpack_float(type_, here, following, n, panel)
        if is_next != 0:
            store_i64(noted, 0)

    return Kernel(unpack, 6, f"unpack_{GGMLType(type_).name}")


def _make_few(type_):
    def few(w, row_bytes, n, count, next_w, panel, packs, n_tok, out):
        here = row_addresses(w, row_bytes, 0, count - 1)
        following = _note_following(next_w, row_bytes, n, panel)
        stride, t = pack_stride(n), 0
        while t < n_tok:
            left, to, first = n_tok - t, out + 64 * t, packs + t * stride
            if left > 4 and TILE > 4:
                group = token_addresses(first, stride, 0, left - 1)
                _multiply_few(type_, here, n, panel, group, following, to)
                t += TILE
            elif left > 2:
                four = four_addresses(first, stride, 0, left - 1)
                _multiply_few(type_, here, n, panel, four, following, to)
                t += 4
            else:
                two = two_addresses(first, stride, 0, left - 1)
                _multiply_few(type_, here, n, panel, two, following, to)
                t += 2
            following = 0

    return Kernel(few, 9, f"few_{GGMLType(type_).name}")


def _make_multiply(type_):
    is_integer = type_ in INTEGER_DOT
    is_tiled = HAS_AMX and is_integer
    config = tuple(tile_config(4 if type_ == Q6_K else 8))

    def multiply(panel, n, x, packs, tokens, n_tok, out):
        start, stride = x, 4 * n
        if is_integer:
            start, stride = packs, pack_stride(n)
        t, following = 0, _following(panel, n)
        if load_i64(following) == 0:
            following = 0
        if is_tiled and tokens == 0 and n_tok > TILE:
            sums = panel + panel_size(n) - _FOLLOWING - _SUMS
            while n_tok - t > TILE:
                count = min(n_tok - t, 16)
                for i in range(8):
                    store_i64(sums + 8 * i, config[i])
                store_i64(sums + 8 * TILE_ROWS, config[TILE_ROWS] + 0x01010101 * count)
                configure_tiles(sums)
                # Lanes of tokens that there are not come to something that nobody reads.
                first, to = start + t * stride, out + 64 * t
                group = row_addresses(first, stride, 0, count - 1)
                _multiply_tiles(type_, n, panel, group, stride, following, sums, to)
                t, following = t + count, 0
            release_tiles()
        while t < n_tok:
            left = n_tok - t
            listed = tokens + 4 * t if tokens != 0 else 0
            first = start if tokens != 0 else start + t * stride
            group = token_addresses(first, stride, listed, left - 1)
            if left > 2:  # a tile that is not full takes less time than they do one by one
                _multiply(type_, n, panel, group, following, out + 64 * t)
                t += TILE
            else:
                _multiply(type_, n, panel, (group[0],), following, out + 64 * t)
                t += 1
            following = 0

    kind = GGMLType(type_).name if is_integer else "float"
    return Kernel(multiply, 7, f"multiply_{kind}")


# unpack(w, row_bytes, n, count, panel, is_next): `count` (1 to 16) rows from w on into a panel of
# panel_bytes(n); lanes behind them repeat the last one. The 16 rows behind are prefetched: now if
# `is_next`, else while the panel is multiplied.
UNPACKS = {int(type_): _make_unpack(int(type_)) for type_ in COMPUTE_TYPES}
# few(w, row_bytes, n, count, next_w, panel, packs, n_tok, out): both for few tokens of integer
# formats. `panel` is scratch; the 16 rows at next_w are prefetched.
FEWS = {int(type_): _make_few(int(type_)) for type_ in INTEGER_DOT}
# multiply(panel, n, x, packs, tokens, n_tok, out): out f32 [n_tok to a multiple of 16][16] = the
# panel's rows . activations of the tokens listed at `tokens` (0: the first n_tok), f32 `x` [.., n],
# or `packs` where the format is integer.
_FLOAT = _make_multiply(F32)
MULTIPLIES = {
    int(type_): _make_multiply(int(type_)) if type_ in INTEGER_DOT else _FLOAT
    for type_ in COMPUTE_TYPES
}
