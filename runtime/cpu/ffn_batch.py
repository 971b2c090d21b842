"""The FFN of several tokens: every row is read once for all of them.

The formulas are those of ffn.py, and a token's neurons are its own: rows of the decider are read
where any token wants them, and multiplied with the tokens that want one of their 16; rows of up
likewise for those that fire. Rows of down_t are widened to float32, a piece of columns at a time,
and added to the tokens whose neurons they are, in the order of the neurons.

What a token gets depends neither on the tokens beside it nor on the number of threads.
"""

from __future__ import annotations

import numpy as np

from ..step import FIRED, HALF_FIRED
from .block import MATRIX
from .ffn import DRELU, FFN, activate16, list_rows, pack_act, standard_down
from .isa import HAS_AMX
from .jit import arg, function, inline, job
from .matmul import (
    GROUP,
    ROWS,
    WORK,
    add_rows,
    add_to,
    rows_ahead,
    rows_from,
    rows_per_task,
    tile_dots,
    token_list,
)
from .pool import finish, take, wait
from .rows import clear_flags, fetch_rows, fill_zero, row_number
from .simd import (
    append_numbers,
    append_values,
    atomic_add,
    call_rows,
    count_ones,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_u8,
    mul,
    store_f32,
    store_f32x16,
    store_i32,
    store_i64,
    store_not_zero,
    store_u8,
    where_set,
)

FEW = 16  # tokens: so few that not all rows are wanted, and reading them is what takes long
# Columns of down in one task, whole blocks of weights; and weights of them that are widened at
# once. Of many tokens each uses most rows, which stay in the second cache; of few each uses some,
# and waits for less from the first.
WIDTH, PIECE = 64, 1 << 15
FEW_WIDTH, FEW_PIECE = 512, 1 << 13


def down_bytes(n_tok: int) -> int:
    """Return the scratch that the down projection needs behind matmul.WORK."""
    return 4 * PIECE + 4 * n_tok * max(WIDTH, FEW_WIDTH) + 4 * n_tok


@inline
def _is_wanted(flags, rows, first, count):
    """Whether any of the bytes `flags` is set, of 16 rows, as row_dots takes them."""
    if rows == 0 and count == ROWS:
        return (load_i64(flags + first) | load_i64(flags + first + 8)) != 0
    flag = np.int64(0)
    for i in range(count):
        flag |= np.int64(load_u8(flags + first + row_number(rows, i)))
    return flag != 0


@function
def _dots(args, matrix, flags, start, rows, n_rows, i, group, n_group, scratch):
    """Return (how many tokens of the group, where the products of some rows with them lie).

    Rows as in tile_dots; those tokens that have a flag [n_tok, n_ff] at one of them (0: all);
    token_list says which.
    """
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    n_ff, n = arg(matrix, MATRIX.rows), arg(matrix, MATRIX.cols)
    tokens, wanted = token_list(n, scratch), 0
    first, some = rows_from(start, rows, i)
    for t in range(n_group):
        store_i32(tokens + 4 * wanted, np.int32(t))
        at = flags + (group + t) * n_ff
        if flags == 0 or _is_wanted(at, some, first, min(ROWS, n_rows - i)):
            wanted += 1
    listed = tokens
    if HAS_AMX and n_group > 8 and 2 * wanted > n_group:
        # Tile registers take up to 16 neighbours at a time, in less time than a list takes.
        listed, wanted = 0, n_group
        for t in range(n_group):
            store_i32(tokens + 4 * t, np.int32(t))
    x, packs = arg(args, FFN.h), arg(args, FFN.packs)
    next_w = rows_ahead(matrix, first, 0)[0]
    out = tile_dots(
        matrix, start, rows, n_rows, i, next_w, x, packs, group, listed, wanted, n_tok, scratch
    )
    return wanted, out


@function
def _decide(args, rows, start, n_rows, scratch):
    """act = activation(decider . h), fired: for some rows and all tokens.

    `rows`: the address of a list (`start` is 0 then), or 0 for the rows from `start` on.
    """
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    decider = args + 8 * FFN.decider
    n_ff, mask = arg(decider, MATRIX.rows), arg(args, FFN.mask)
    has_mask = arg(args, FFN.has_mask) != 0
    kind, threshold = arg(args, FFN.activation), load_f32(arg(args, FFN.threshold))
    act, fired = arg(args, FFN.act), arg(args, FFN.fired)
    flags, tokens = mask if has_mask else 0, token_list(arg(decider, MATRIX.cols), scratch)
    for group in range(0, n_tok, GROUP):
        n_group = min(GROUP, n_tok - group)
        for i in range(0, n_rows, ROWS):
            count = min(ROWS, n_rows - i)
            first, listed = rows_from(start, rows, i)
            n, out = _dots(args, decider, flags, start, rows, n_rows, i, group, n_group, scratch)
            for k in range(n):
                token = (group + np.int64(load_i32(tokens + 4 * k))) * n_ff
                at = out + 64 * k
                activate16(kind, at, threshold)
                if listed == 0 and count == ROWS:
                    g, where = load_f32x16(at), token + first
                    if has_mask:
                        g = where_set(g, mask + where)
                    store_f32x16(act + 4 * where, g)
                    store_not_zero(fired + where, g)
                else:
                    for j in range(count):  # without branches, which nobody could foretell
                        one, where = load_f32(at + 4 * j), token + first + row_number(listed, j)
                        if has_mask:
                            one = one if load_u8(mask + where) != 0 else np.float32(0)
                        store_f32(act + 4 * where, one)
                        store_u8(fired + where, np.uint8(FIRED if one != 0 else 0))


@function
def _multiply(args, rows, start, n_rows, scratch):
    """act *= up . h for some rows and the tokens for which they fire."""
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    up = args + 8 * FFN.up
    n_ff, kind = arg(up, MATRIX.rows), arg(args, FFN.activation)
    act, fired = arg(args, FFN.act), arg(args, FFN.fired)
    is_dense, tokens = arg(args, FFN.is_dense) != 0, token_list(arg(up, MATRIX.cols), scratch)
    flags = 0 if is_dense else fired
    for group in range(0, n_tok, GROUP):
        n_group = min(GROUP, n_tok - group)
        for i in range(0, n_rows, ROWS):
            count = min(ROWS, n_rows - i)
            first, listed = rows_from(start, rows, i)
            n, out = _dots(args, up, flags, start, rows, n_rows, i, group, n_group, scratch)
            for k in range(n):
                token = (group + np.int64(load_i32(tokens + 4 * k))) * n_ff
                at = out + 64 * k
                if listed == 0 and count == ROWS and kind != DRELU:
                    where = act + 4 * (token + first)
                    store_f32x16(where, mul(load_f32x16(where), load_f32x16(at)))
                else:
                    for j in range(count):
                        where, u = token + first + row_number(listed, j), load_f32(at + 4 * j)
                        has_fired = load_u8(fired + where) != 0
                        if kind == DRELU:
                            u = max(u, np.float32(0))
                            if u == 0 and has_fired:
                                store_u8(fired + where, np.uint8(HALF_FIRED))
                                atomic_add(arg(args, FFN.totals) + 24, -1)
                        g = load_f32(act + 4 * where)
                        store_f32(act + 4 * where, g * u if is_dense or has_fired else g)


@function
def _list_token(args, t, is_listed):
    """active [t] = where in the list of rows the token's neurons are, values [t] = their act."""
    n_ff = arg(args + 8 * FFN.decider, MATRIX.rows)
    fired, act = arg(args, FFN.fired) + t * n_ff, arg(args, FFN.act) + 4 * t * n_ff
    active, values = arg(args, FFN.active) + 4 * t * n_ff, arg(args, FFN.values) + 4 * t * n_ff
    is_dense, n, n_up = arg(args, FFN.is_dense) != 0, 0, 0
    for row in range(0, 0 if is_dense else n_ff - 15, 16):
        flags, x = fired + row, load_f32x16(act + 4 * row)
        append_values(values + 4 * n, flags, x)
        n += append_numbers(active + 4 * n, flags, np.int32(row))
    n_up = n
    for row in range(0 if is_dense else n_ff // 16 * 16, n_ff):
        flag = np.int64(load_u8(fired + row) != 0)
        store_i32(active + 4 * n, np.int32(row))
        store_f32(values + 4 * n, load_f32(act + 4 * row))
        n_up += flag
        n += 1 if is_dense else flag
    if is_listed:
        for i in range(n):
            row = np.int64(load_i32(active + 4 * i))
            store_i32(active + 4 * i, load_i32(arg(args, FFN.place) + 4 * row))
    store_i32(arg(args, FFN.n_active) + 4 * t, np.int32(n))
    n_read, mask = n_ff, arg(args, FFN.mask) + t * n_ff
    if arg(args, FFN.has_mask) != 0:
        n_read = 0
        for row in range(0, n_ff - 7, 8):
            n_read += count_ones(load_i64(mask + row))
        for row in range(n_ff // 8 * 8, n_ff):
            n_read += np.int64(load_u8(mask + row))
    totals = arg(args, FFN.totals)
    atomic_add(totals, 1)
    atomic_add(totals + 8, n_read)
    atomic_add(totals + 16, n_up)
    atomic_add(totals + 24, n_up)


@function
def _list_any(args, flags, n_tok):
    """rows = those with a flag [n_tok, n_ff] for any of few tokens; return how many."""
    n_ff, wanted = arg(args + 8 * FFN.decider, MATRIX.rows), arg(args, FFN.wanted)
    for row in range(0, n_ff - 7, 8):
        eight = load_i64(flags + row)
        for t in range(1, n_tok):
            eight |= load_i64(flags + t * n_ff + row)
        store_i64(wanted + row, eight)
    for row in range(n_ff // 8 * 8, n_ff):
        one = load_u8(flags + row)
        for t in range(1, n_tok):
            one |= load_u8(flags + t * n_ff + row)
        store_u8(wanted + row, one)
    return list_rows(wanted, n_ff, arg(args, FFN.rows))


@function
def _down(args, rows, n_rows, first, width, scratch):
    """x [n_tok, first : first + width] += act . down_t + down_bias, over a list of rows, or all."""
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    down = args + 8 * FFN.down
    n_ff, n_embd = arg(down, MATRIX.rows), arg(down, MATRIX.cols)
    row_bytes, bias = arg(down, MATRIX.row_bytes), arg(args, FFN.down_bias)
    # Columns begin at whole blocks, so that this is exact.
    data = arg(down, MATRIX.data) + row_bytes * first // n_embd
    x, y = arg(args, FFN.x) + 4 * first, scratch + WORK
    piece = y + 4 * n_tok * width
    cursors = piece + 4 * PIECE
    for t in range(n_tok):
        store_i32(cursors + 4 * t, np.int32(0))
    fill_zero(y, n_tok * width)
    n_piece = (FEW_PIECE if n_tok <= FEW else PIECE) // width
    for start in range(0, n_rows, n_piece):
        count = min(n_piece, n_rows - start)
        later = min(n_piece, n_rows - start - count)
        listed = rows + 4 * start if rows != 0 else 0
        at = data if rows != 0 else data + start * row_bytes
        call_rows(arg(down, MATRIX.widen), at, row_bytes, width, listed, count, piece, 4 * width)
        for t in range(n_tok):
            cursor = np.int64(load_i32(cursors + 4 * t))
            n_active = np.int64(load_i32(arg(args, FFN.n_active) + 4 * t))
            active, i = arg(args, FFN.active) + 4 * t * n_ff, cursor
            while i < n_active and load_i32(active + 4 * i) < start + count:
                i += 1
            store_i32(cursors + 4 * t, np.int32(i))
            add_rows(
                y + 4 * t * width,
                width,
                piece - 4 * width * start,
                active + 4 * cursor,
                arg(args, FFN.values) + 4 * (t * n_ff + cursor),
                i - cursor,
            )
            if rows != 0:  # a share of the next piece: all is more than a core waits for at once
                begin, end = t * later // n_tok, (t + 1) * later // n_tok
                nexts = rows + 4 * (start + count + begin)
                fetch_rows(data, row_bytes, nexts, end - begin, row_bytes * width // n_embd)
    for t in range(n_tok):
        if bias != 0:
            add_to(y + 4 * t * width, bias + 4 * first, 0, width)
        add_to(x + 4 * t * n_embd, y + 4 * t * width, 0, width)


@inline
def _n_tasks(n_rows, size, n_threads):
    """Return how many tasks of `size` rows there are, as many for each thread."""
    return (n_rows + size * n_threads - 1) // (size * n_threads) * n_threads


@inline
def _rows_of(task, n_tasks, n_threads, size, n_rows):
    """Return (first, count) of a task's rows.

    Those that are at work at the same time lie far apart: neighbours write act and fired into the
    same lines, which take longer to change hands than a row takes to be multiplied.
    """
    place = task % n_threads * (n_tasks // n_threads) + task // n_threads
    first = min(place * size, n_rows)
    return first, min(size, n_rows - first)


@job
def ffn_batch(args, control, epoch, thread):
    """x [n_tok, n_embd] += FFN(h); counts what each token read and what fired.

    Phases: 0 list the rows that any token wants, 1 decider, 2 list those that fired for any, 3 up,
    4 list each token's, 5 down by columns; or, in the standard layout of down, 4 pack act, 5 down.
    Lists of rows are made for FEW tokens only: with more nearly all rows are wanted.
    """
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    decider, up = args + 8 * FFN.decider, args + 8 * FFN.up
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    n_rows_at, is_dense = arg(args, FFN.n_rows), arg(args, FFN.is_dense) != 0
    is_listed = n_tok <= FEW and not is_dense
    is_masked = is_listed and arg(args, FFN.has_mask) != 0
    scratch = arg(args, FFN.scratch) + thread * arg(args, FFN.scratch_bytes)

    n_tasks = 1 + n_tok
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        if task > 0:
            clear_flags(arg(args, FFN.fired) + (task - 1) * n_ff, n_ff)
        elif is_masked:
            store_i32(n_rows_at, np.int32(_list_any(args, arg(args, FFN.mask), n_tok)))
        finish(control, 0)
    if not wait(control, 0, epoch, n_tasks):
        return
    rows = arg(args, FFN.rows) if is_masked else 0
    n_rows = np.int64(load_i32(n_rows_at)) if is_masked else n_ff

    n_threads = arg(args, FFN.n_threads)
    size = rows_per_task(n_rows, n_embd, n_threads, n_tok)
    n_tasks = _n_tasks(n_rows, size, n_threads)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        first, count = _rows_of(task, n_tasks, n_threads, size, n_rows)
        start, listed = rows_from(0, rows, first)
        _decide(args, listed, start, count, scratch)
        finish(control, 1)
    if not wait(control, 1, epoch, n_tasks):
        return

    n_tasks = 1 if is_listed else 0
    while True:
        task = take(control, 2, epoch, n_tasks)
        if task < 0:
            break
        n = _list_any(args, arg(args, FFN.fired), n_tok)
        for i in range(n):
            row = np.int64(load_i32(arg(args, FFN.rows) + 4 * i))
            store_i32(arg(args, FFN.place) + 4 * row, np.int32(i))
        store_i32(n_rows_at + 4, np.int32(n))
        finish(control, 2)
    if not wait(control, 2, epoch, n_tasks):
        return
    rows = arg(args, FFN.rows) if is_listed else 0
    n_rows = np.int64(load_i32(n_rows_at + 4)) if is_listed else n_ff

    size = rows_per_task(n_rows, n_embd, n_threads, n_tok)
    n_tasks = _n_tasks(n_rows, size, n_threads) if arg(up, MATRIX.data) != 0 else 0
    while True:
        task = take(control, 3, epoch, n_tasks)
        if task < 0:
            break
        first, count = _rows_of(task, n_tasks, n_threads, size, n_rows)
        start, listed = rows_from(0, rows, first)
        _multiply(args, listed, start, count, scratch)
        finish(control, 3)
    if not wait(control, 3, epoch, n_tasks):
        return

    while True:
        t = take(control, 4, epoch, n_tok)
        if t < 0:
            break
        _list_token(args, t, is_listed)
        if arg(args, FFN.is_transposed) == 0:
            pack_act(args, t)
        finish(control, 4)
    if not wait(control, 4, epoch, n_tok):
        return
    if arg(args, FFN.is_transposed) == 0:
        standard_down(args, control, epoch, scratch)
        return

    width = FEW_WIDTH if n_tok <= FEW else arg(args, FFN.width)
    n_tasks = (n_embd + width - 1) // width
    while True:
        task = take(control, 5, epoch, n_tasks)
        if task < 0:
            break
        first = task * width
        _down(args, rows, n_rows, first, min(width, n_embd - first), scratch)
        finish(control, 5)
    wait(control, 5, epoch, n_tasks)
