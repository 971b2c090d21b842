"""The FFN of one token: only the neurons that matter.

    act = activation(decider h) * (up h),  x += sum over neurons of act * (row of down_t)

The decider is the gate, or, in models without one, up (and no factor). Its rows are read for the
predicted neurons, or for all; rows of up and down_t only for those that fire. Several tokens:
ffn_batch.py.

Results do not depend on the number of threads: the list of fired neurons is cut into lanes of equal
length, as many as its length says, each with its own accumulator; they are added up in their order.
Threads may share a lane: each then has some of the columns.

Between the phases of a job threads wait for each other, which costs as much as reading some ten
rows: there are few phases, and what is to be done once, for all, the last task of a phase does.
"""

from __future__ import annotations

import math

import numpy as np

from ..step import FIRED, HALF_FIRED
from .axpy import GROUP
from .block import MATRIX, layout
from .exchange import EXCHANGE, answer, has_come, is_late
from .jit import arg, function, inline, job
from .matmul import (
    ADD,
    LIST,
    MOST,
    ROWS,
    add_to,
    following_task,
    matmul_task,
    n_tasks_of,
    row_dots,
    rows_ahead,
    rows_from,
    rows_per_task,
)
from .pool import finish, take, wait
from .rows import (
    clear_flags,
    fetch_rows,
    fill_zero,
    pack,
    pack_piece,
    pack_stride,
    row_number,
)
from .simd import (
    append_numbers,
    atomic_add,
    atomic_store,
    call_axpys,
    load_f32,
    load_f32x16,
    load_i32,
    load_u8,
    maximum,
    mul,
    splat,
    store_f32,
    store_f32x16,
    store_i32,
    store_u8,
    where_not_below,
)

LANES = 8  # at most, of at least GROUP rows
MIN_COLUMNS = 512  # of a task: rows are cut into pieces of some lines at least
PIECE = 1024  # columns of h that are packed in a task
FEW = 8  # neurons of a list that a task has at least

RELU, FATRELU, DRELU, RELU2, SILU, GELU = range(6)
ACTIVATIONS = {
    "relu": RELU,
    "fatrelu": FATRELU,
    "drelu": DRELU,
    "relu2": RELU2,
    "silu": SILU,
    "gelu": GELU,
}

FFN = layout(
    "counts h packs ones mask has_mask is_dense act rows n_rows fired active n_active values "
    "activation threshold x down_bias lanes arrived totals act_packs wanted scratch "
    "scratch_bytes n_threads is_transposed is_part exchange decider:MATRIX up:MATRIX "
    "down:MATRIX"
)

AUDIT = layout(
    "token h packs activation threshold act truth scratch scratch_bytes n_threads decider:MATRIX "
    "up:MATRIX"
)


@function
def activate(kind, x, threshold):
    """Apply the activation to the decider of one neuron."""
    if kind == SILU:
        return x / (np.float32(1) + np.float32(math.exp(-x)))
    if kind == GELU:
        return np.float32(0.5 * x * (1.0 + math.erf(x * 0.7071067811865476)))
    if kind == FATRELU:
        return np.float32(0) if x < threshold else x
    x = max(x, np.float32(0))
    return x * x if kind == RELU2 else x


@function
def activate16(kind, x, threshold):
    """Apply the activation to 16 numbers in place."""
    if kind in (SILU, GELU):
        for i in range(16):
            store_f32(x + 4 * i, activate(kind, load_f32(x + 4 * i), threshold))
        return
    values, zero = load_f32x16(x), splat(np.float32(0))
    if kind == FATRELU:
        values = where_not_below(values, splat(threshold))
    else:
        values = maximum(values, zero)
        if kind == RELU2:
            values = mul(values, values)
    store_f32x16(x, values)


@function
def list_rows(flags, first, end, rows):
    """List the rows from `first` to `end` - 1 whose bytes `flags` are set; return how many.

    Room for 16 more is needed.
    """
    count, last = 0, first + (end - first) // 16 * 16
    for row in range(first, last, 16):
        count += append_numbers(rows + 4 * count, flags + row, np.int32(row))
    for row in range(last, end):
        store_i32(rows + 4 * count, np.int32(row))
        count += np.int64(load_u8(flags + row) != 0)
    return count


@function
def decide(decider, first, rows, count, ahead, h, packed, kind, threshold, act, fired, scratch):
    """act = activation(rows of the decider . h), fired = whether that is not 0; both by row."""
    out = row_dots(decider, first, rows, count, ahead, h, packed, scratch)
    for i in range(count):
        row = first + row_number(rows, i)
        g = activate(kind, load_f32(out + 4 * i), threshold)
        store_f32(act + 4 * row, g)
        store_u8(fired + row, np.uint8(FIRED if g != 0 else 0))


@function
def multiply(up, rows, count, ahead, h, packed, kind, act, fired, scratch):
    """act *= listed rows of up . h; drelu: a neuron whose up is negative has not fired."""
    out = row_dots(up, 0, rows, count, ahead, h, packed, scratch)
    for i in range(count):
        row, u = row_number(rows, i), load_f32(out + 4 * i)
        if kind == DRELU:
            u = max(u, np.float32(0))
            if u == 0 and load_u8(fired + row) != 0:
                store_u8(fired + row, np.uint8(HALF_FIRED))
        store_f32(act + 4 * row, load_f32(act + 4 * row) * u)


@function
def _neurons(args, rows, first, n_rows, scratch):
    """act and fired of up to MOST neurons: of a list, or (rows is 0) of those from `first` on.

    All their rows of the decider, then those of up for the ones that fire: taking turns, a few of
    each, is slower, since memory is quickest at one run through one matrix.
    """
    decider, up = args + 8 * FFN.decider, args + 8 * FFN.up
    h, packed, kind = arg(args, FFN.h), arg(args, FFN.packs), arg(args, FFN.activation)
    act, fired, threshold = arg(args, FFN.act), arg(args, FFN.fired), arg(args, FFN.threshold)
    is_dense, up_data = arg(args, FFN.is_dense) != 0, arg(up, MATRIX.data)
    row_bytes = arg(decider, MATRIX.row_bytes)
    is_alike = arg(up, MATRIX.row_bytes) == row_bytes
    listed, n_listed = scratch + LIST, 0
    if rows != 0:
        data = arg(decider, MATRIX.data)
        fetch_rows(data, row_bytes, rows, min(n_rows, ROWS), row_bytes)
    for i in range(0, n_rows, ROWS):
        count = min(ROWS, n_rows - i)
        start, these = rows_from(first, rows, i)
        ahead = rows_ahead(decider, start, these)
        if is_alike and i + ROWS >= n_rows:
            ahead = (up_data, listed)
        decide(
            decider,
            start,
            these,
            count,
            ahead,
            h,
            packed,
            kind,
            load_f32(threshold),
            act,
            fired,
            scratch,
        )
        for j in range(count):
            row = start + row_number(these, j)
            store_i32(listed + 4 * n_listed, np.int32(row))
            n_listed += np.int64(is_dense or load_u8(fired + row) != 0)
    if up_data != 0:
        for i in range(0, n_listed, ROWS):
            some = listed + 4 * i
            count = min(ROWS, n_listed - i)
            nexts = some + 4 * ROWS if i + ROWS < n_listed else some
            multiply(up, some, count, (up_data, nexts), h, packed, kind, act, fired, scratch)


@function
def list_fired(args, t, n_rows):
    """List the neurons of a token whose rows of down are read, and their act; count what is read.

    n_rows: how many of the decider were.
    """
    n_ff = arg(args + 8 * FFN.decider, MATRIX.rows)
    act, fired, totals = arg(args, FFN.act), arg(args, FFN.fired), arg(args, FFN.totals)
    active, values, n = arg(args, FFN.active), arg(args, FFN.values), 0
    act, fired = act + 4 * n_ff * t, fired + n_ff * t
    active, values = active + 4 * n_ff * t, values + 4 * n_ff * t
    n_up = list_rows(fired, 0, n_ff, active)
    for i in range(n_up):  # drelu: up may have silenced some
        row = row_number(active, i)
        store_i32(active + 4 * n, np.int32(row))
        store_f32(values + 4 * n, load_f32(act + 4 * row))
        n += np.int64(load_u8(fired + row) == FIRED)
    atomic_add(totals, 1)
    atomic_add(totals + 8, n_rows)
    atomic_add(totals + 16, n_up)
    atomic_add(totals + 24, n)
    if arg(args, FFN.is_dense) != 0:  # the control takes all, for nothing
        n = n_ff
        for row in range(n_ff):
            store_i32(active + 4 * row, np.int32(row))
            store_f32(values + 4 * row, load_f32(act + 4 * row))
    store_i32(arg(args, FFN.n_active) + 4 * t, np.int32(n))


@inline
def _columns(n_embd, n_threads):
    """Return how many columns of a lane a task has: whole blocks of any format."""
    pieces = max(4 * n_threads // LANES, 1)
    return min(max((n_embd // pieces + 255) // 256 * 256, MIN_COLUMNS), n_embd)


@function
def add_listed(down, rows, values, count, first, width, y):
    """y [width] = sum of values [count] * listed rows of down_t, its columns first to + width."""
    # Columns begin at whole blocks, so that this is exact.
    row_bytes, n_embd = arg(down, MATRIX.row_bytes), arg(down, MATRIX.cols)
    data, nbytes = arg(down, MATRIX.data) + row_bytes * first // n_embd, row_bytes * width // n_embd
    fill_zero(y, width)
    fetch_rows(data, row_bytes, rows, min(count, GROUP), nbytes)
    call_axpys(
        arg(down, MATRIX.axpys),
        data,
        row_bytes,
        width,
        rows,
        count,
        data,
        rows + 4 * GROUP,
        values,
        y,
    )


@function
def _down(args, n_active, lane, n_lanes, first, width):
    """Columns first to first + width of a lane = its neurons' act . down_t.

    Whoever is the last to do so adds the lanes up: x += their sum + down_bias.
    """
    down, active, values = args + 8 * FFN.down, arg(args, FFN.active), arg(args, FFN.values)
    n_embd, lanes = arg(down, MATRIX.cols), arg(args, FFN.lanes)
    bias, x = arg(args, FFN.down_bias), arg(args, FFN.x)
    n_groups = (n_active + GROUP - 1) // GROUP  # whole ones: as many as are added together
    begin = n_groups * lane // n_lanes * GROUP
    end = min(n_groups * (lane + 1) // n_lanes * GROUP, n_active)
    y, rows, values = lanes + 4 * n_embd * lane, active + 4 * begin, values + 4 * begin
    add_listed(down, rows, values, end - begin, first, width, y + 4 * first)
    arrived = arg(args, FFN.arrived) + 64 * (first // MIN_COLUMNS)
    if atomic_add(arrived, 1) == n_lanes - 1:
        atomic_store(arrived, 0)
        for other in range(1, n_lanes):
            add_to(lanes, lanes + 4 * n_embd * other, first, first + width)
        if bias != 0:
            add_to(lanes, bias, first, first + width)
        add_to(x, lanes, first, first + width)


@function
def _answer(exchange):
    """Answer, if this is an exchange, as a last task: nobody goes on before it is done."""
    if exchange != 0:
        answer(exchange)


@job
def ffn(args, control, epoch, thread):
    """x [n_embd] += FFN(h); counts what was read and what fired.

    Phases: 0 list the predicted neurons, 1 decider and up, 2 down; 5 down in the standard layout.
    A part of another backend's FFN has x = that. The other has made the list and h, which is packed
    in phase 0. In an exchange with it the job waits for either, and answers at the end; where
    waiting takes too long it is not done.
    """
    decider, exchange = args + 8 * FFN.decider, arg(args, FFN.exchange)
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    has_mask, is_part = arg(args, FFN.has_mask) != 0, arg(args, FFN.is_part) != 0
    rows, n_rows_at = arg(args, FFN.rows), arg(args, FFN.n_rows)
    scratch = arg(args, FFN.scratch) + thread * arg(args, FFN.scratch_bytes)
    n_threads = arg(args, FFN.n_threads)

    is_packed = is_part and n_embd % 32 == 0
    n_pieces = (n_embd + PIECE - 1) // PIECE if is_packed else 0
    n_tasks = n_pieces + (1 if has_mask else 0)
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        if task < n_pieces:
            if exchange == 0 or has_come(exchange, EXCHANGE.early):
                h, packs, first = arg(args, FFN.h), arg(args, FFN.packs), task * PIECE
                pack_piece(h, n_embd, packs, arg(args, FFN.ones), first, first + PIECE)
        else:
            clear_flags(arg(args, FFN.fired), n_ff)
            if not is_part:
                store_i32(n_rows_at, np.int32(list_rows(arg(args, FFN.mask), 0, n_ff, rows)))
            elif exchange != 0:
                has_come(exchange, EXCHANGE.number)
        finish(control, 0)
    if not wait(control, 0, epoch, n_tasks) or (exchange != 0 and is_late(exchange)):
        return
    n_rows = np.int64(load_i32(n_rows_at)) if has_mask else n_ff

    if has_mask:
        size = min(max(n_rows // (4 * n_threads), FEW), MOST)
    else:
        size = rows_per_task(n_rows, n_embd, n_threads, 1)
    n_tasks = max((n_rows + size - 1) // size, 1)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        first = task * size
        listed = rows + 4 * first if has_mask else 0
        n = min(size, n_rows - first)
        _neurons(args, listed, 0 if has_mask else first, n, scratch)
        if finish(control, 1) == n_tasks - 1:
            list_fired(args, 0, n_rows)
            if is_part:
                fill_zero(arg(args, FFN.x), n_embd)
            if arg(args, FFN.is_transposed) == 0:
                pack_act(args, 0)
            finish(control, 1)
    if not wait(control, 1, epoch, n_tasks + 1):
        return

    if arg(args, FFN.is_transposed) == 0:
        standard_down(args, control, epoch, scratch)
        return
    n_active = np.int64(load_i32(arg(args, FFN.n_active)))
    width, n_lanes = _columns(n_embd, n_threads), min(max(n_active // GROUP, 1), LANES)
    n_pieces = (n_embd + width - 1) // width
    n_tasks = n_lanes * n_pieces
    while True:
        task = take(control, 2, epoch, n_tasks)
        if task < 0:
            break
        first = task % n_pieces * width
        _down(args, n_active, task // n_pieces, n_lanes, first, min(width, n_embd - first))
        if finish(control, 2) == n_tasks - 1:
            _answer(exchange)
            finish(control, 2)
    wait(control, 2, epoch, n_tasks + 1)


@function
def pack_act(args, t):
    """Pack act of one token, for the layout of dense files."""
    n_ff = arg(args + 8 * FFN.decider, MATRIX.rows)
    packs, act = arg(args, FFN.act_packs), arg(args, FFN.act)
    if n_ff % 32 == 0:
        pack(act + 4 * t * n_ff, n_ff, packs + t * pack_stride(n_ff), arg(args, FFN.ones))


@function
def standard_down(args, control, epoch, scratch):
    """x += down . act for the layout of dense files: phase 5."""
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    down, n_threads = args + 8 * FFN.down, arg(args, FFN.n_threads)
    n_embd, act = arg(down, MATRIX.rows), arg(args, FFN.act)
    packs, x = arg(args, FFN.act_packs), arg(args, FFN.x)
    n_tasks = n_tasks_of(down, n_threads, n_tok)
    task = take(control, 5, epoch, n_tasks)
    while task >= 0:
        following, next_w = following_task(control, 5, epoch, n_tasks, task, down, n_threads, n_tok)
        matmul_task(down, task, next_w, n_threads, n_tok, act, packs, x, n_embd, ADD, scratch)
        if finish(control, 5) == n_tasks - 1:
            _answer(arg(args, FFN.exchange))
            finish(control, 5)
        task = following
    wait(control, 5, epoch, n_tasks + 1)


@job
def audit(args, control, epoch, thread):
    """truth [n_ff] = how each neuron fires for the audited token, all of them computed."""
    t = np.int64(load_i32(arg(args, AUDIT.token)))
    decider, up = args + 8 * AUDIT.decider, args + 8 * AUDIT.up
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    h = arg(args, AUDIT.h) + t * n_embd * 4
    packed = arg(args, AUDIT.packs) + t * pack_stride(n_embd)
    threshold, kind = load_f32(arg(args, AUDIT.threshold)), arg(args, AUDIT.activation)
    act, truth = arg(args, AUDIT.act), arg(args, AUDIT.truth)
    scratch = arg(args, AUDIT.scratch) + thread * arg(args, AUDIT.scratch_bytes)
    n_threads = arg(args, AUDIT.n_threads)
    n_tasks = n_tasks_of(decider, n_threads, 1)
    size = rows_per_task(n_ff, n_embd, n_threads, 1)
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        for first in range(task * size, min(task * size + size, n_ff), ROWS):
            count = min(ROWS, n_ff - first)
            ahead = rows_ahead(decider, first, 0)
            decide(decider, first, 0, count, ahead, h, packed, kind, threshold, act, truth, scratch)
            if kind == DRELU:
                listed, n = scratch + LIST, 0
                for row in range(first, first + count):
                    store_i32(listed + 4 * n, np.int32(row))
                    n += np.int64(load_u8(truth + row) != 0)
                ahead = rows_ahead(up, 0, listed)
                multiply(up, listed, n, ahead, h, packed, kind, act, truth, scratch)
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)
