"""The FFN of several tokens: every row is read from memory once for all of them.

The formulas are those of ffn.py, and a token's neurons are its own. Rows are taken a piece of a
list at a time, of those that any token wants; each token's own of them are multiplied with it, one
token after the other, while they are in the second cache: neurons that fire seldom are wanted by
few tokens, and of those that fire often a product of 16 rows with 8 tokens at once would have to be
wanted by 3 of them to be less work. Only where all want all rows are they taken at once.

What a token gets depends neither on the tokens beside it nor on the number of threads.
"""

from __future__ import annotations

import numpy as np

from ..step import FIRED, HALF_FIRED
from .block import MATRIX
from .ffn import (
    DRELU,
    FFN,
    activate16,
    add_listed,
    decide,
    list_fired,
    list_rows,
    multiply,
    pack_act,
    standard_down,
)
from .jit import arg, function, inline, job
from .matmul import (
    AT_ONCE,
    GROUP,
    LIST,
    MOST,
    ROWS,
    WORK,
    add_to,
    rows_ahead,
    rows_per_task,
    tile_dots,
)
from .pool import finish, take, wait
from .rows import clear_flags, pack_stride, row_number
from .simd import (
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
)

LEAST = 4 * ROWS  # rows of a list in one task, at least, so that each token has several of them
WIDTH = 1024  # columns of down in one task, whole blocks of weights


def down_bytes(n_embd: int) -> int:
    """Return the scratch that the down projection needs behind matmul.WORK."""
    return 4 * min(WIDTH, n_embd)


@function
def _own_rows(args, is_decider, rows, n_rows, n_behind, scratch):
    """Of a piece of a list of rows, those of the decider, or of up, that each token wants.

    Of the n_behind rows behind the piece as many as it has are asked for.
    """
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    decider, up = args + 8 * FFN.decider, args + 8 * FFN.up
    n_ff, n_embd, own = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols), scratch + LIST
    kind, threshold = arg(args, FFN.activation), load_f32(arg(args, FFN.threshold))
    data = arg(decider, MATRIX.data) if is_decider else arg(up, MATRIX.data)
    first, end = row_number(rows, 0), row_number(rows, n_rows - 1) + 1
    ahead, last = n_rows, n_rows + min(n_behind, n_rows)
    for t in range(n_tok):
        h = arg(args, FFN.h) + 4 * n_embd * t
        packed = arg(args, FFN.packs) + pack_stride(n_embd) * t
        act, fired = arg(args, FFN.act) + 4 * n_ff * t, arg(args, FFN.fired) + n_ff * t
        n = list_rows(arg(args, FFN.mask) + n_ff * t if is_decider else fired, first, end, own)
        for i in range(0, n, AT_ONCE):
            some, count, nexts = own + 4 * i, min(AT_ONCE, n - i), (data, rows + 4 * ahead)
            ahead = min(ahead + count, last)
            if is_decider:
                decide(
                    decider,
                    0,
                    some,
                    count,
                    nexts,
                    h,
                    packed,
                    kind,
                    threshold,
                    act,
                    fired,
                    scratch,
                )
            else:
                multiply(up, some, count, nexts, h, packed, kind, act, fired, scratch)


@inline
def _dots(args, matrix, start, n_rows, i, group, n_group, scratch):
    """Return where the products of some rows with all tokens of a group lie, see tile_dots."""
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    next_w = rows_ahead(matrix, start + i, 0)[0]
    x, packs = arg(args, FFN.h), arg(args, FFN.packs)
    return tile_dots(matrix, start, n_rows, i, next_w, x, packs, group, n_group, n_tok, scratch)


@function
def _all_of_decider(args, start, n_rows, scratch):
    """act = activation(decider . h), fired: for the rows from `start` on and all tokens."""
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    decider, kind = args + 8 * FFN.decider, arg(args, FFN.activation)
    n_ff, threshold = arg(decider, MATRIX.rows), load_f32(arg(args, FFN.threshold))
    act, fired = arg(args, FFN.act), arg(args, FFN.fired)
    for group in range(0, n_tok, GROUP):
        n_group = min(GROUP, n_tok - group)
        for i in range(0, n_rows, ROWS):
            count = min(ROWS, n_rows - i)
            out = _dots(args, decider, start, n_rows, i, group, n_group, scratch)
            for t in range(n_group):
                at, where = out + 64 * t, (group + t) * n_ff + start + i
                activate16(kind, at, threshold)
                if count == ROWS:
                    g = load_f32x16(at)
                    store_f32x16(act + 4 * where, g)
                    store_not_zero(fired + where, g)
                else:
                    for j in range(count):
                        one = load_f32(at + 4 * j)
                        store_f32(act + 4 * (where + j), one)
                        store_u8(fired + where + j, np.uint8(FIRED if one != 0 else 0))


@function
def _all_of_up(args, start, n_rows, scratch):
    """act *= up . h for the rows from `start` on and all tokens."""
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    up, kind = args + 8 * FFN.up, arg(args, FFN.activation)
    n_ff, act, fired = arg(up, MATRIX.rows), arg(args, FFN.act), arg(args, FFN.fired)
    for group in range(0, n_tok, GROUP):
        n_group = min(GROUP, n_tok - group)
        for i in range(0, n_rows, ROWS):
            count = min(ROWS, n_rows - i)
            out = _dots(args, up, start, n_rows, i, group, n_group, scratch)
            for t in range(n_group):
                at, where = out + 64 * t, (group + t) * n_ff + start + i
                if count == ROWS and kind != DRELU:
                    to = act + 4 * where
                    store_f32x16(to, mul(load_f32x16(to), load_f32x16(at)))
                else:
                    for j in range(count):
                        u = load_f32(at + 4 * j)
                        if kind == DRELU:
                            u = max(u, np.float32(0))
                            if u == 0 and load_u8(fired + where + j) != 0:
                                store_u8(fired + where + j, np.uint8(HALF_FIRED))
                        to = act + 4 * (where + j)
                        store_f32(to, load_f32(to) * u)


@function
def _n_read(args, t):
    """Return how many rows of the decider a token wants."""
    n_ff, mask = arg(args + 8 * FFN.decider, MATRIX.rows), arg(args, FFN.mask)
    if arg(args, FFN.has_mask) == 0:
        return n_ff
    mask, n = mask + t * n_ff, 0
    for row in range(0, n_ff - 7, 8):
        n += count_ones(load_i64(mask + row))
    for row in range(n_ff // 8 * 8, n_ff):
        n += np.int64(load_u8(mask + row))
    return n


@function
def _list_any(args, flags, n_tok):
    """rows = those with a flag [n_tok, n_ff] for any token; return how many."""
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
    return list_rows(wanted, 0, n_ff, arg(args, FFN.rows))


@function
def _down(args, t, first, width, scratch):
    """x [t, first : first + width] += act . down_t + down_bias, of one token."""
    down, y = args + 8 * FFN.down, scratch + WORK
    n_ff, n_embd = arg(down, MATRIX.rows), arg(down, MATRIX.cols)
    rows, values = arg(args, FFN.active) + 4 * n_ff * t, arg(args, FFN.values) + 4 * n_ff * t
    count, bias = np.int64(load_i32(arg(args, FFN.n_active) + 4 * t)), arg(args, FFN.down_bias)
    add_listed(down, rows, values, count, first, width, y)
    if bias != 0:
        add_to(y, bias + 4 * first, 0, width)
    add_to(arg(args, FFN.x) + 4 * (n_embd * t + first), y, 0, width)


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


@function
def _multiply_rows(args, control, phase, epoch, is_own, n_rows, scratch):
    """Take the decider's rows (phase 1), or those of up, by tasks. Like wait().

    is_own: n_rows of a list, of which each token takes its own; else the first n_rows, all of them.
    """
    n_tok, n_threads = np.int64(load_i32(arg(args, FFN.counts))), arg(args, FFN.n_threads)
    n_embd, rows = arg(args + 8 * FFN.decider, MATRIX.cols), arg(args, FFN.rows)
    size = rows_per_task(n_rows, n_embd, n_threads, n_tok)
    if is_own:
        size = min(max(n_rows // (8 * n_threads * ROWS) * ROWS, LEAST), MOST)
    n_tasks = _n_tasks(n_rows, size, n_threads)
    while True:
        task = take(control, phase, epoch, n_tasks)
        if task < 0:
            return wait(control, phase, epoch, n_tasks)
        first, count = _rows_of(task, n_tasks, n_threads, size, n_rows)
        if count > 0:
            if is_own:
                behind = n_rows - first - count
                _own_rows(args, phase == 1, rows + 4 * first, count, behind, scratch)
            elif phase == 1:
                _all_of_decider(args, first, count, scratch)
            else:
                _all_of_up(args, first, count, scratch)
        finish(control, phase)


@job
def ffn_batch(args, control, epoch, thread):
    """x [n_tok, n_embd] += FFN(h); counts what each token read and what fired.

    Phases: 0 list the rows that any token wants, 1 decider, 2 list those that fired for any, 3 up,
    4 list each token's, 5 down by columns; or, in the standard layout of down, 4 pack act, 5 down.
    """
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    decider, n_rows_at = args + 8 * FFN.decider, arg(args, FFN.n_rows)
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    has_mask, is_dense = arg(args, FFN.has_mask) != 0, arg(args, FFN.is_dense) != 0
    scratch = arg(args, FFN.scratch) + thread * arg(args, FFN.scratch_bytes)

    n_tasks = 1 + n_tok
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        if task > 0:
            clear_flags(arg(args, FFN.fired) + (task - 1) * n_ff, n_ff)
        elif has_mask:
            store_i32(n_rows_at, np.int32(_list_any(args, arg(args, FFN.mask), n_tok)))
        finish(control, 0)
    if not wait(control, 0, epoch, n_tasks):
        return

    n_rows = np.int64(load_i32(n_rows_at)) if has_mask else n_ff
    if not _multiply_rows(args, control, 1, epoch, has_mask, n_rows, scratch):
        return

    n_tasks = 0 if is_dense else 1
    while True:
        task = take(control, 2, epoch, n_tasks)
        if task < 0:
            break
        store_i32(n_rows_at + 4, np.int32(_list_any(args, arg(args, FFN.fired), n_tok)))
        finish(control, 2)
    if not wait(control, 2, epoch, n_tasks):
        return

    n_rows = n_ff if is_dense else np.int64(load_i32(n_rows_at + 4))
    n_rows = n_rows if arg(args + 8 * FFN.up, MATRIX.data) != 0 else 0
    if not _multiply_rows(args, control, 3, epoch, not is_dense, n_rows, scratch):
        return

    while True:
        t = take(control, 4, epoch, n_tok)
        if t < 0:
            break
        list_fired(args, t, _n_read(args, t))
        if arg(args, FFN.is_transposed) == 0:
            pack_act(args, t)
        finish(control, 4)
    if not wait(control, 4, epoch, n_tok):
        return
    if arg(args, FFN.is_transposed) == 0:
        standard_down(args, control, epoch, scratch)
        return

    n_tasks = (n_embd + WIDTH - 1) // WIDTH * n_tok
    while True:
        task = take(control, 5, epoch, n_tasks)
        if task < 0:
            break
        first = task // n_tok * WIDTH
        _down(args, task % n_tok, first, min(WIDTH, n_embd - first), scratch)
        finish(control, 5)
    wait(control, 5, epoch, n_tasks)
