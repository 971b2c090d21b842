"""Rows of a matrix times the activations of one token or of several, and sums of rows.

What operators are made of: they know nothing of formats, whose kernels a MATRIX names.
"""

from __future__ import annotations

import numpy as np

from .block import MATRIX
from .gemm import panel_bytes, panel_size
from .jit import arg, function, inline
from .pool import finish, take, wait
from .rows import SCRATCH, SLACK, fetch_far, pack_stride, row_number
from .simd import (
    add,
    call_dots,
    call_few,
    call_multiply,
    call_unpack,
    fma,
    fma1,
    load_f32,
    load_f32x16,
    splat,
    store_f32,
    store_f32x16,
)
from .tile import TILE

ROWS = 16  # rows of a matrix that are taken at a time
MOST = 16 * ROWS  # rows in a task, of no more than GROUP tokens
GROUP = 32  # tokens that are multiplied with some panels before the next ones are
FIRST = 16384  # bytes of a task that are asked for before it begins, and then ahead
AT_ONCE = 4 * ROWS  # rows that one token is multiplied with in one call, if they are short
_TASKS = 16  # for each thread, that a matrix is cut into
_PANELS_BYTES = 480 << 10  # of panels at once: they stay in the second cache

# A thread's scratch: the end of a row, what its rows came to, a list of rows, and from WORK on
# whatever a job needs.
SUMS = SCRATCH  # float32 [AT_ONCE]
LIST = SUMS + 4 * AT_ONCE  # int32 [LISTED]
LISTED = MOST + SLACK
WORK = -(-(LIST + 4 * LISTED) // 64) * 64

STORE, ADD = 0, 1


def scratch_bytes(n: int, n_tok: int) -> int:
    """Return the scratch that products with rows of n weights need for n_tok tokens."""
    if n_tok == 1:
        return WORK
    return int(WORK + panels_of.py_func(n) * panel_bytes(n) + 64 * GROUP)


@inline
def panels_of(n):
    """Return how many panels of rows of n weights are unpacked at once."""
    return min(max(_PANELS_BYTES // (64 * n), 1), 8)


@inline
def rows_per_task(n_rows, n, n_threads, n_tok):
    """Return how many of n_rows rows of n weights make a task, a multiple of ROWS.

    Long runs, because what is prefetched behind the end of one is read by another thread; but
    enough of them that no thread waits long for the last.
    """
    most = MOST if n_tok <= GROUP else panels_of(n) * ROWS
    return min(max(n_rows // (_TASKS * n_threads * ROWS), 1) * ROWS, most)


@inline
def n_tasks_of(matrix, n_threads, n_tok):
    """Return the number of tasks that a matrix's rows are cut into."""
    rows = arg(matrix, MATRIX.rows)
    size = rows_per_task(rows, arg(matrix, MATRIX.cols), n_threads, n_tok)
    return (rows + size - 1) // size


@inline
def rows_from(first, rows, i):
    """Return (first, rows) of row_dots for some rows without the i before."""
    if rows != 0:
        return first, rows + 4 * i
    return first + i, rows


@inline
def rows_ahead(matrix, first, rows):
    """Return (next_w, next_rows) of rows.DOTS: the next ROWS, of a list or in order."""
    data = arg(matrix, MATRIX.data)
    if rows != 0:
        return data, rows + 4 * ROWS
    return data + (first + ROWS) * arg(matrix, MATRIX.row_bytes), np.int64(0)


@function
def row_dots(matrix, first, rows, count, ahead, x, packed, scratch):
    """Return where float32 [count] lie: rows of a matrix times one token's x, plus their biases.

    `rows`: the address of a list of row numbers (`first` is 0 then), or 0 for the rows from
    `first` on; at most AT_ONCE. `ahead`: what is prefetched meanwhile, as rows_ahead says.
    """
    out, row_bytes = scratch + SUMS, arg(matrix, MATRIX.row_bytes)
    call_dots(
        arg(matrix, MATRIX.dots),
        arg(matrix, MATRIX.data) + first * row_bytes,
        row_bytes,
        arg(matrix, MATRIX.cols),
        rows,
        count,
        ahead[0],
        ahead[1],
        x,
        packed,
        scratch,
        out,
    )
    bias = arg(matrix, MATRIX.bias)
    if bias != 0:
        for i in range(count):
            row = first + row_number(rows, i)
            store_f32(out + 4 * i, load_f32(out + 4 * i) + load_f32(bias + 4 * row))
    return out


@inline
def _out(n, scratch):
    """Return where the products of ROWS rows of n weights with up to GROUP tokens lie."""
    return scratch + WORK + panels_of(n) * panel_size(n)


@inline
def _unpacked(matrix, start, n_rows, i, group, n_tok, scratch):
    """Return where the panel of rows i to i + ROWS - 1 of a task's lies, for tile_dots.

    Several groups need them all unpacked; for one they are unpacked one panel at a time, and while
    it is multiplied the next one is fetched.
    """
    n, row_bytes = arg(matrix, MATRIX.cols), arg(matrix, MATRIX.row_bytes)
    panel, is_kept = scratch + WORK, n_tok > GROUP
    for k in range(i, n_rows if is_kept else i + 1, ROWS):
        if not is_kept or group + i == 0:
            call_unpack(
                arg(matrix, MATRIX.unpack),
                arg(matrix, MATRIX.data) + (start + k) * row_bytes,
                row_bytes,
                n,
                min(ROWS, n_rows - k),
                panel + (k // ROWS * panel_size(n) if is_kept else 0),
                np.int64(is_kept),
            )
    return panel + (i // ROWS * panel_size(n) if is_kept else 0)


@function
def tile_dots(matrix, start, n_rows, i, next_w, x, packs, group, n_group, n_tok, scratch):
    """Return where float32 [n_group, ROWS] lie: some rows times some of n_tok tokens, plus biases.

    `start`, `n_rows`: the rows of a task; those from the i-th on are multiplied, in order. next_w:
    where the rows begin that are fetched meanwhile. `group`: the first of n_group tokens, at most
    GROUP.
    """
    n, row_bytes = arg(matrix, MATRIX.cols), arg(matrix, MATRIX.row_bytes)
    count, out, few = min(ROWS, n_rows - i), _out(n, scratch), arg(matrix, MATRIX.few)
    first = start + i
    x, packs = x + 4 * n * group, packs + pack_stride(n) * group
    if few != 0 and n_tok <= TILE:
        w, panel = arg(matrix, MATRIX.data) + first * row_bytes, scratch + WORK
        call_few(few, w, row_bytes, n, count, next_w, panel, packs, n_group, out)
    else:
        panel = _unpacked(matrix, start, n_rows, i, group, n_tok, scratch)
        call_multiply(arg(matrix, MATRIX.multiply), panel, n, x, packs, 0, n_group, out)
    bias = arg(matrix, MATRIX.bias)
    if bias != 0:
        for k in range(count):
            value = load_f32(bias + 4 * (first + k))
            for t in range(n_group):
                at = out + 64 * t + 4 * k
                store_f32(at, load_f32(at) + value)
    return out


@inline
def task_data(matrix, task, n_threads, n_tok):
    """Return where the rows of a task begin."""
    n, n_rows = arg(matrix, MATRIX.cols), arg(matrix, MATRIX.rows)
    size = rows_per_task(n_rows, n, n_threads, n_tok)
    return arg(matrix, MATRIX.data) + task * size * arg(matrix, MATRIX.row_bytes)


@inline
def first_task(control, phase, epoch, n_tasks, matrix, n_threads, n_tok):
    """Take a task, and ask for its first rows before what they are multiplied with is there."""
    task = take(control, phase, epoch, n_tasks)
    if task >= 0:
        fetch_far(task_data(matrix, task, n_threads, n_tok), FIRST)
    return task


@inline
def following_task(control, phase, epoch, n_tasks, task, matrix, n_threads, n_tok):
    """Take the task after this one before it is done; return it, and which rows to fetch for it."""
    following = take(control, phase, epoch, n_tasks)
    return following, task_data(matrix, max(following, task), n_threads, n_tok)


@function
def matmul(
    control, phase, epoch, task, matrix, n_threads, n_tok, x, packs, y, y_cols, how, scratch
):
    """y [n_tok, y_cols] = or += x @ matrix^T + bias, by tasks; `task` comes from first_task.

    Like wait().
    """
    n_tasks = n_tasks_of(matrix, n_threads, n_tok)
    while task >= 0:
        following, next_w = following_task(
            control, phase, epoch, n_tasks, task, matrix, n_threads, n_tok
        )
        matmul_task(matrix, task, next_w, n_threads, n_tok, x, packs, y, y_cols, how, scratch)
        finish(control, phase)
        task = following
    return wait(control, phase, epoch, n_tasks)


@function
def matmul_task(matrix, task, next_w, n_threads, n_tok, x, packs, y, y_cols, how, scratch):
    """y [n_tok, y_cols] = or += x [n_tok, cols] @ matrix [rows, cols]^T + bias, for a task's rows.

    x float32; `packs`: the same activations packed. next_w: where the task begins that comes next.
    """
    n, row_bytes = arg(matrix, MATRIX.cols), arg(matrix, MATRIX.row_bytes)
    n_rows = arg(matrix, MATRIX.rows)
    size = rows_per_task(n_rows, n, n_threads, n_tok)
    start = task * size
    end = min(start + size, n_rows)
    n_ahead, step = ROWS, ROWS
    if n_tok == 1:  # of short rows more are taken, and asked for in time
        n_ahead = (FIRST + ROWS * row_bytes - 1) // (ROWS * row_bytes) * ROWS
        step = min(n_ahead, AT_ONCE)
    for group in range(0, n_tok, GROUP):
        n_group = min(GROUP, n_tok - group)
        for first in range(start, end, step):
            count = min(step, end - first)
            later = first + n_ahead
            ahead = next_w + (later - end) * row_bytes
            if later < end:
                ahead = arg(matrix, MATRIX.data) + later * row_bytes
            if n_tok == 1:
                out = row_dots(matrix, first, 0, count, (ahead, np.int64(0)), x, packs, scratch)
            else:
                n_task, i = end - start, first - start
                out = tile_dots(
                    matrix, start, n_task, i, ahead, x, packs, group, n_group, n_tok, scratch
                )
            for t in range(n_group):
                at, source = y + 4 * ((group + t) * y_cols + first), out + 64 * t
                for i in range(0, count - 15, 16):
                    values = load_f32x16(source + 4 * i)
                    if how == ADD:
                        values = add(values, load_f32x16(at + 4 * i))
                    store_f32x16(at + 4 * i, values)
                for i in range(count // 16 * 16, count):
                    value = load_f32(source + 4 * i)
                    if how == ADD:
                        value += load_f32(at + 4 * i)
                    store_f32(at + 4 * i, value)


@function
def add_to(y, x, first, last):
    """y [first:last] += x [first:last], in float32."""
    end = first + (last - first) // 16 * 16
    for i in range(first, end, 16):
        store_f32x16(y + 4 * i, add(load_f32x16(y + 4 * i), load_f32x16(x + 4 * i)))
    for i in range(end, last):
        store_f32(y + 4 * i, load_f32(y + 4 * i) + load_f32(x + 4 * i))


@function
def add_rows(y, width, rows, values, count):
    """y [width] += sum of values [count] * float32 rows [width], one after the other."""
    stride, column = 4 * width, 0
    while column + 64 <= width:  # 4 vectors at a time: wider pieces were slower to read
        at, w = y + 4 * column, rows + 4 * column
        a, b = load_f32x16(at), load_f32x16(at + 64)
        c, d = load_f32x16(at + 128), load_f32x16(at + 192)
        for i in range(count):
            v = splat(load_f32(values + 4 * i))
            r = w + i * stride
            a, b = fma(v, load_f32x16(r), a), fma(v, load_f32x16(r + 64), b)
            c, d = fma(v, load_f32x16(r + 128), c), fma(v, load_f32x16(r + 192), d)
        store_f32x16(at, a)
        store_f32x16(at + 64, b)
        store_f32x16(at + 128, c)
        store_f32x16(at + 192, d)
        column += 64
    while column + 16 <= width:
        total = load_f32x16(y + 4 * column)
        for i in range(count):
            r = rows + 4 * column + i * stride
            total = fma(splat(load_f32(values + 4 * i)), load_f32x16(r), total)
        store_f32x16(y + 4 * column, total)
        column += 16
    while column < width:
        one = load_f32(y + 4 * column)
        for i in range(count):
            r = rows + 4 * column + i * stride
            one = fma1(load_f32(values + 4 * i), load_f32(r), one)
        store_f32(y + 4 * column, one)
        column += 1
