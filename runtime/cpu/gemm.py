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

from ..formats import BLOCK_SIZES, COMPUTE_TYPES, INTEGER_DOT, GGMLType
from .isa import HAS_AMX, Q8_BIAS
from .jit import Kernel, inline
from .rows import BLOCK, F32, Q4_0, Q6_K, Q8_0, load1, load16, pack_stride, planes
from .simd import (
    and_i32,
    load_f16,
    load_f16x16,
    load_i8x16,
    load_i64,
    mul,
    or_i32,
    prefetch,
    shift_left,
    shift_right,
    splat,
    store_f32,
    store_f32x16,
    store_i32x16,
    store_i64,
    sub_bytes,
)
from .tile import (
    TILE,
    TILE_ROWS,
    configure_tiles,
    copy_halves,
    float_step,
    load_4x16,
    no_totals,
    products_step,
    release_tiles,
    row_addresses,
    signed_step_4,
    signed_step_8,
    store_totals,
    tile_config,
    tile_products_4,
    tile_products_8,
    token_addresses,
    transpose,
    unsigned_step_4,
    unsigned_step_8,
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
def _fetch(following, at, step):
    """Ask for the share that bytes `at` to at + step of a row are of all rows that follow.

    One row after the other: prefetchers do not follow 16 runs at once.
    Nothing if `following` is 0.
    """
    if following != 0:
        row_bytes = load_i64(following + 8 * PANEL)
        row = PANEL * at // row_bytes
        within = PANEL * at - row * row_bytes
        for _ in range(0, PANEL * step, 64):
            if within >= row_bytes:
                row, within = row + 1, within - row_bytes
            prefetch(load_i64(following + 8 * min(row, PANEL - 1)) + within)
            within += 64


@inline
def _store_quads(at, quads, zero):
    """Store bytes that are `zero` more than the weights; with AMX the weights themselves."""
    store_i32x16(at, sub_bytes(quads, zero) if HAS_AMX else quads)


@inline
def _unpack_scales(rows, block_bytes, n, panel):
    """Widen the f16 that blocks of 32 begin with."""
    scales = panel + _scales(n)
    halves = scales + 32 * (n // 32)  # widened in place from the front
    for block in range(n // 32):
        copy_halves(rows, block_bytes * block, halves + 32 * block)
    for block in range(n // 32):
        store_f32x16(scales + 64 * block, load_f16x16(halves + 32 * block))


@inline
def _unpack_q4_0(rows, following, n, panel):
    """Block: f16 scale, 16 bytes: weight j in the low, weight j + 16 in the high nibble of j."""
    _unpack_scales(rows, 18, n, panel)
    for block in range(n // 32):
        _fetch(following, 18 * block, 18)
        quads, at = load_4x16(rows, 18 * block + 2), panel + 512 * block
        for i in range(4):
            _store_quads(at + 64 * i, and_i32(quads[i], 0x0F0F0F0F), 8)
            high = and_i32(shift_right(quads[i], 4), 0x0F0F0F0F)
            _store_quads(at + 256 + 64 * i, high, 8)


@inline
def _unpack_q8_0(rows, following, n, panel):
    """Block: f16 scale, 32 signed bytes."""
    _unpack_scales(rows, 34, n, panel)
    for block in range(n // 32):
        _fetch(following, 34 * block, 34)
        for part in range(2):
            quads = load_4x16(rows, 34 * block + 2 + 16 * part)
            for i in range(4):
                store_i32x16(panel + 512 * block + 256 * part + 64 * i, quads[i])


@inline
def _unpack_q6_k(rows, following, n, panel):
    """Block of 256: 128 bytes of low nibbles, 64 of bit pairs, 16 int8 scales, f16 d."""
    scales = panel + _scales(n)
    for block in range(n // 256):
        start = 210 * block
        for line in range(0, 210, 64):
            _fetch(following, start + line, 64)
        for half in range(2):
            # Weights 0-31 and 64-95 share nibbles, 32-63 and 96-127 do; all four share pairs.
            for part in range(2):
                pairs = load_4x16(rows, start + 128 + 32 * half + 16 * part)
                for quarter in range(2):
                    low = load_4x16(rows, start + 64 * half + 32 * quarter + 16 * part)
                    at = panel + 16 * (256 * block + 128 * half + 32 * quarter + 16 * part)
                    for i in range(4):
                        two = and_i32(shift_right(pairs[i], 2 * quarter), 0x03030303)
                        q = or_i32(and_i32(low[i], 0x0F0F0F0F), shift_left(two, 4))
                        _store_quads(at + 64 * i, q, 32)
                        two = and_i32(shift_right(pairs[i], 2 * quarter + 4), 0x03030303)
                        four = and_i32(shift_right(low[i], 4), 0x0F0F0F0F)
                        q = or_i32(four, shift_left(two, 4))
                        _store_quads(at + 16 * 64 + 64 * i, q, 32)
        at = scales + 64 * 16 * block
        for i in range(16):
            d = splat(load_f16(rows[i] + start + 208))
            store_f32x16(at + 64 * i, mul(load_i8x16(rows[i] + start + 192), d))
        transpose(at)


@inline
def _unpack_float(type_, weight_bytes, rows, following, n, panel):
    """Every weight as float32; call it with a constant type."""
    for column in range(0, n - 15, 16):
        _fetch(following, int(weight_bytes * column), int(16 * weight_bytes))
        at = panel + 64 * column
        for i in range(16):
            store_f32x16(at + 64 * i, load16(type_, rows[i], column))
        transpose(at)
    for column in range(n // 16 * 16, n):
        for i in range(16):
            store_f32(panel + 64 * column + 4 * i, load1(type_, rows[i], column))


@inline
def _multiply(type_, n, panel, tokens, following, out):
    """out [tokens, 16] for as many tokens as the tuple holds; call it with a constant type."""
    totals, scales, blocks = no_totals(tokens), panel + _scales(n), planes(n)[5]
    if type_ in (Q4_0, Q8_0):
        for i in range(n // 32):
            step = 34 if type_ == Q8_0 else 18
            _fetch(following, step * i, step)
            x, w, scale = blocks + BLOCK * i, panel + 512 * i, scales + 64 * i
            if type_ == Q8_0 or HAS_AMX:
                factor = Q8_BIAS // 8
                totals = signed_step_8(totals, tokens, w, scale, x, x + 32, x + 36, factor)
            else:
                totals = unsigned_step_8(totals, tokens, w, scale, x, x + 32, x + 36, 1)
    elif type_ == Q6_K:
        for i in range(n // 16):
            _fetch(following, 210 * i // 16, 14)
            x, w, scale = blocks + BLOCK * (i // 2), panel + 256 * i, scales + 64 * i
            at, x_sum = x + i % 2 * 16, x + 40 + i % 2 * 4
            if HAS_AMX:
                factor = Q8_BIAS // 8
                totals = signed_step_4(totals, tokens, w, scale, at, x + 32, x_sum, factor)
            else:
                totals = unsigned_step_4(totals, tokens, w, scale, at, x + 32, x_sum, 4)
    else:
        for column in range(n):
            totals = float_step(totals, tokens, panel + 64 * column, 4 * column)
    store_totals(totals, out)


@inline
def _multiply_tiles(type_, n, panel, tokens, stride, following, sums, out):
    """The same by AMX, for tokens `stride` apart; `sums`: scratch for tile_products."""
    totals, scales, blocks = no_totals(tokens), panel + _scales(n), planes(n)[5]
    if type_ == Q6_K:
        for i in range(n // 32):
            _fetch(following, 210 * i // 8, 27)
            x, scale = blocks + BLOCK * i, scales + 128 * i
            tile_products_4(tokens[0] + x, stride, panel + 512 * i, sums)
            totals = products_step(totals, tokens, sums, scale, x + 32)
            totals = products_step(totals, tokens, sums + 1024, scale + 64, x + 32)
    else:
        for i in range(0, n // 32, 2):
            step = 34 if type_ == Q8_0 else 18
            _fetch(following, step * i, 2 * step)
            x, scale = blocks + BLOCK * i, scales + 64 * i
            tile_products_8(tokens[0] + x, stride, panel + 512 * i, sums)
            totals = products_step(totals, tokens, sums, scale, x + 32)
            if i + 1 < n // 32:
                x += BLOCK
                totals = products_step(totals, tokens, sums + 1024, scale + 64, x + 32)
    store_totals(totals, out)


def _make_unpack(type_):
    block_size, block_bytes = BLOCK_SIZES[GGMLType(type_)]
    weight_bytes = block_bytes / block_size

    def unpack(w, row_bytes, n, rows, count, panel, is_next):
        here = row_addresses(w, row_bytes, rows, count - 1)
        behind = rows + 4 * PANEL if rows != 0 else 0
        next_w = w if rows != 0 else w + PANEL * row_bytes
        ahead = row_addresses(next_w, row_bytes, behind, PANEL - 1)
        following = _following(panel, n)
        for i in range(PANEL):
            store_i64(following + 8 * i, ahead[i])
        store_i64(following + 8 * PANEL, row_bytes)
        if is_next == 0:
            following = 0
        if type_ == Q4_0:
            _unpack_q4_0(here, following, n, panel)
        elif type_ == Q8_0:
            _unpack_q8_0(here, following, n, panel)
        elif type_ == Q6_K:
            _unpack_q6_k(here, following, n, panel)
        else:
            _unpack_float(type_, weight_bytes, here, following, n, panel)
        if is_next != 0:
            store_i64(following, 0)

    return Kernel(unpack, 7, f"unpack_{GGMLType(type_).name}")


def _make_multiply(type_):
    is_integer = type_ in INTEGER_DOT
    config = tuple(tile_config(4 if type_ == Q6_K else 8))

    def multiply(panel, n, x, packs, tokens, n_tok, out):
        start, stride = x, 4 * n
        if is_integer:
            start, stride = packs, pack_stride(n)
        t, following = 0, _following(panel, n)
        if load_i64(following) == 0:
            following = 0
        if HAS_AMX and is_integer and tokens == 0 and n_tok > TILE:
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


# unpack(w, row_bytes, n, rows, count, panel, is_next): `count` (1 to 16) rows into a panel of
# panel_bytes(n); lanes behind them repeat the last one. `rows` as in rows.DOTS. The 16 rows behind
# are prefetched: now if `is_next`, else while the panel is multiplied.
UNPACKS = {int(type_): _make_unpack(int(type_)) for type_ in COMPUTE_TYPES}
# multiply(panel, n, x, packs, tokens, n_tok, out): out f32 [n_tok to a multiple of 16][16] = the
# panel's rows . activations of the tokens listed at `tokens` (0: the first n_tok), f32 `x` [.., n],
# or `packs` where the format is integer.
_FLOAT = _make_multiply(F32)
MULTIPLIES = {
    int(type_): _make_multiply(int(type_)) if type_ in INTEGER_DOT else _FLOAT
    for type_ in COMPUTE_TYPES
}
