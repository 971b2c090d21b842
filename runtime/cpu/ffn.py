"""The FFN of one token: only the neurons that matter.

    act = activation(decider h) * (up h),  x += sum over neurons of act * (row of down_t)

The decider is the gate, or, in models without one, up (and no factor). Its rows are read for the
predicted neurons, or for all; rows of up and down_t only for those that fire. Several tokens:
ffn_batch.py.

Results do not depend on the number of threads: the list of fired neurons is cut into LANES pieces
of equal length, each with its own accumulator, added up in lane order.
"""

from __future__ import annotations

import math

import numpy as np

from ..step import FIRED, HALF_FIRED
from .block import MATRIX, layout
from .jit import arg, function, job
from .matmul import (
    ADD,
    LIST,
    ROWS,
    add_to,
    matmul_task,
    n_tasks_of,
    row_dots,
    rows_ahead,
    rows_per_task,
)
from .pool import finish, take, wait
from .rows import clear_flags, fill_zero, pack, pack_stride, row_number
from .simd import (
    append_numbers,
    atomic_add,
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
    where_at_least,
)

LANES = 16
COLUMNS = 256  # columns in one task of the reduction over lanes

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
    "activation threshold x down_bias lanes totals act_packs wanted place scratch scratch_bytes "
    "n_threads is_transposed is_part width decider:MATRIX up:MATRIX down:MATRIX"
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
        return x if x >= threshold else np.float32(0)
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
        values = where_at_least(values, splat(threshold))
    else:
        values = maximum(values, zero)
        if kind == RELU2:
            values = mul(values, values)
    store_f32x16(x, values)


@function
def list_rows(flags, n, rows):
    """List the numbers of the bytes `flags` [n] that are set; return how many."""
    count = 0
    for row in range(0, n - 15, 16):
        count += append_numbers(rows + 4 * count, flags + row, np.int32(row))
    for row in range(n // 16 * 16, n):
        store_i32(rows + 4 * count, np.int32(row))
        count += np.int64(load_u8(flags + row) != 0)
    return count


@function
def _decide(decider, first, rows, count, h, packed, kind, threshold, act, fired, scratch):
    """act = activation(rows of the decider . h), fired = whether that is not 0; both by row."""
    ahead = rows_ahead(decider, first, rows)
    out = row_dots(decider, first, rows, count, ahead, h, packed, scratch)
    for i in range(count):
        row = first + row_number(rows, i)
        g = activate(kind, load_f32(out + 4 * i), threshold)
        store_f32(act + 4 * row, g)
        store_u8(fired + row, np.uint8(FIRED if g != 0 else 0))


@function
def _multiply(up, rows, count, ahead, h, packed, kind, act, fired, scratch):
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
def _lanes(args, n_active, task, n_lanes, scratch):
    """Set the lanes of a task, y [n_embd] each, to their shares of the down projection.

    Reads the rows of up and of down for the neurons of the list: up may silence some more (drelu),
    whose rows of down are not read. In the standard layout of down only act is made.

    ROWS neurons at a time, and while rows of one matrix are multiplied those of the other come.
    """
    decider, up, down = args + 8 * FFN.decider, args + 8 * FFN.up, args + 8 * FFN.down
    n_embd, act, kind = arg(decider, MATRIX.cols), arg(args, FFN.act), arg(args, FFN.activation)
    active, fired, values = arg(args, FFN.active), arg(args, FFN.fired), arg(args, FFN.values)
    h, packed = arg(args, FFN.h), arg(args, FFN.packs)
    up_data, down_data = arg(up, MATRIX.data), arg(down, MATRIX.data)
    down_bytes, is_dense = arg(down, MATRIX.row_bytes), arg(args, FFN.is_dense) != 0
    is_transposed = arg(args, FFN.is_transposed) != 0
    in_turns = up_data != 0 and is_transposed and arg(up, MATRIX.row_bytes) == down_bytes
    first_lane, last_lane = task * n_lanes, min((task + 1) * n_lanes, LANES)
    end = n_active * last_lane // LANES
    for lane in range(first_lane, last_lane):
        y = arg(args, FFN.lanes) + 4 * n_embd * lane
        fill_zero(y, n_embd)
        first, last, n_fired = n_active * lane // LANES, n_active * (lane + 1) // LANES, 0
        for i in range(first, last, ROWS):
            count, rows, weights, n = min(ROWS, last - i), active + 4 * i, values + 4 * i, 0
            next_rows = rows + 4 * count if i + count < end else rows
            if up_data != 0:
                ahead = (down_data, rows) if in_turns else rows_ahead(up, 0, rows)
                _multiply(up, rows, count, ahead, h, packed, kind, act, fired, scratch)
            for j in range(count):
                row = row_number(rows, j)
                has_fired = load_u8(fired + row) == FIRED
                n_fired += np.int64(has_fired)
                if has_fired or is_dense:  # the control takes all, for nothing
                    store_i32(rows + 4 * n, np.int32(row))
                    store_f32(weights + 4 * n, load_f32(act + 4 * row))
                    n += 1
            if is_transposed:
                ahead = (up_data, next_rows) if in_turns else rows_ahead(down, 0, rows)
                call_axpys(
                    arg(down, MATRIX.axpys),
                    down_data,
                    down_bytes,
                    n_embd,
                    rows,
                    n,
                    ahead[0],
                    ahead[1],
                    weights,
                    y,
                )
        atomic_add(arg(args, FFN.totals) + 24, n_fired)


@job
def ffn(args, control, epoch, thread):
    """x [n_embd] += FFN(h); counts what was read and what fired.

    Phases: 0 list the predicted neurons, 1 decider, 2 list those that fired, 3 up and down by
    lanes, 4 add the lanes up; or, in the standard layout of down, 4 pack act, 5 multiply. A part of
    another backend's FFN begins with x = 0 and with h, which that has made, packed: beside 0.
    """
    decider = args + 8 * FFN.decider
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    act, mask, has_mask = arg(args, FFN.act), arg(args, FFN.mask), arg(args, FFN.has_mask) != 0
    rows, fired, active = arg(args, FFN.rows), arg(args, FFN.fired), arg(args, FFN.active)
    n_rows_at, n_active_at = arg(args, FFN.n_rows), arg(args, FFN.n_active)
    kind, is_dense = arg(args, FFN.activation), arg(args, FFN.is_dense) != 0
    threshold = load_f32(arg(args, FFN.threshold))
    scratch = arg(args, FFN.scratch) + thread * arg(args, FFN.scratch_bytes)
    n_threads, x = arg(args, FFN.n_threads), arg(args, FFN.x)

    n_tasks = 2 if arg(args, FFN.is_part) != 0 else 1 if has_mask else 0
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        if task == 0:
            clear_flags(fired, n_ff)
            store_i32(n_rows_at, np.int32(list_rows(mask, n_ff, rows)))
        else:
            fill_zero(x, n_embd)
            if n_embd % 32 == 0:
                pack(arg(args, FFN.h), n_embd, arg(args, FFN.packs), arg(args, FFN.ones))
        finish(control, 0)
    if not wait(control, 0, epoch, n_tasks):
        return
    n_rows = np.int64(load_i32(n_rows_at)) if has_mask else n_ff

    size = rows_per_task(n_rows, n_embd, n_threads, 1)
    if has_mask:  # a list is short, and what is prefetched behind a task is lost
        size *= 2
    n_tasks = (n_rows + size - 1) // size
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        for first in range(task * size, min(task * size + size, n_rows), ROWS):
            _decide(
                decider,
                0 if has_mask else first,
                rows + 4 * first if has_mask else 0,
                min(ROWS, n_rows - first),
                arg(args, FFN.h),
                arg(args, FFN.packs),
                kind,
                threshold,
                act,
                fired,
                scratch,
            )
        finish(control, 1)
    if not wait(control, 1, epoch, n_tasks):
        return

    while True:
        task = take(control, 2, epoch, 1)
        if task < 0:
            break
        n_up = list_rows(fired, n_ff, active)
        if is_dense:
            for row in range(n_ff):
                store_i32(active + 4 * row, np.int32(row))
        store_i32(n_active_at, np.int32(n_ff if is_dense else n_up))
        totals = arg(args, FFN.totals)
        atomic_add(totals, 1)
        atomic_add(totals + 8, n_rows)
        atomic_add(totals + 16, n_up)
        finish(control, 2)
    if not wait(control, 2, epoch, 1):
        return

    lanes, n_active = arg(args, FFN.lanes), np.int64(load_i32(n_active_at))
    n_lanes = max(LANES // (4 * n_threads), 1)  # in a task
    n_tasks = (LANES + n_lanes - 1) // n_lanes
    while True:
        task = take(control, 3, epoch, n_tasks)
        if task < 0:
            break
        _lanes(args, n_active, task, n_lanes, scratch)
        finish(control, 3)
    if not wait(control, 3, epoch, n_tasks):
        return

    if arg(args, FFN.is_transposed) == 0:
        while take(control, 4, epoch, 1) >= 0:
            pack_act(args, 0)
            finish(control, 4)
        if wait(control, 4, epoch, 1):
            standard_down(args, control, epoch, scratch)
        return
    down_bias = arg(args, FFN.down_bias)
    n_tasks = (n_embd + COLUMNS - 1) // COLUMNS
    while True:
        task = take(control, 4, epoch, n_tasks)
        if task < 0:
            break
        first, last = task * COLUMNS, min((task + 1) * COLUMNS, n_embd)
        for lane in range(1, LANES):
            add_to(lanes, lanes + lane * n_embd * 4, first, last)
        if down_bias != 0:
            add_to(lanes, down_bias, first, last)
        add_to(x, lanes, first, last)
        finish(control, 4)
    wait(control, 4, epoch, n_tasks)


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
    while True:
        task = take(control, 5, epoch, n_tasks)
        if task < 0:
            break
        matmul_task(down, task, n_threads, n_tok, act, packs, x, n_embd, ADD, scratch)
        finish(control, 5)
    wait(control, 5, epoch, n_tasks)


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
            _decide(decider, first, 0, count, h, packed, kind, threshold, act, truth, scratch)
            if kind == DRELU:
                listed, n = scratch + LIST, 0
                for row in range(first, first + count):
                    store_i32(listed + 4 * n, np.int32(row))
                    n += np.int64(load_u8(truth + row) != 0)
                ahead = rows_ahead(up, 0, listed)
                _multiply(up, listed, n, ahead, h, packed, kind, act, truth, scratch)
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)
