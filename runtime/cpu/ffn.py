"""The FFN: only the neurons that matter for a token.

    act = activation(decider h) * (up h),  x += sum over neurons of act * (row of down_t)

The decider is the gate, or, in models without one, up (and no factor). Its rows are read for the
predicted neurons, or for all; rows of up and down_t only for those that fire. A token's neurons
are its own, whatever else is in the batch.

Results do not depend on the number of threads: the list of fired neurons is cut into LANES pieces
of equal length, each with its own accumulator, added up in lane order.
"""

from __future__ import annotations

import math

import numpy as np

from ..step import FIRED, HALF_FIRED
from .block import MATRIX, layout
from .jit import arg, inline, job
from .linear import ADD, LIST, ROWS, WORK, matmul_task, n_tasks_of, row_dots
from .pool import finish, take, wait
from .rows import fill_zero, pack
from .simd import (
    add,
    atomic_add,
    call_axpys,
    load_f32,
    load_f32x16,
    load_i32,
    load_u8,
    store_f32,
    store_f32x16,
    store_i32,
    store_u8,
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
    "counts h packs pack_bytes ones mask has_mask is_dense act rows n_rows fired active n_active "
    "values activation threshold x down_bias lanes totals act_packs act_pack_bytes scratch "
    "scratch_bytes is_transposed decider:MATRIX up:MATRIX down:MATRIX"
)

AUDIT = layout(
    "token h packs pack_bytes activation threshold act truth scratch scratch_bytes "
    "decider:MATRIX up:MATRIX"
)


@inline
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


@inline
def _decide(decider, first, rows, count, h, packed, kind, threshold, act, fired, scratch):
    """act = activation(rows of the decider . h), fired = whether that is not 0; both by row."""
    out = row_dots(decider, first, rows, count, h, packed, scratch)
    for i in range(count):
        row = np.int64(load_i32(rows + 4 * i)) if rows != 0 else first + i
        g = activate(kind, load_f32(out + 4 * i), threshold)
        store_f32(act + 4 * row, g)
        store_u8(fired + row, np.uint8(FIRED if g != 0 else 0))


@inline
def _multiply(up, rows, count, h, packed, kind, act, fired, scratch):
    """act *= listed rows of up . h; drelu: a neuron whose up is negative has not fired."""
    out = row_dots(up, 0, rows, count, h, packed, scratch)
    for i in range(count):
        row, u = np.int64(load_i32(rows + 4 * i)), load_f32(out + 4 * i)
        if kind == DRELU:
            u = max(u, np.float32(0))
            if u == 0 and load_u8(fired + row) != 0:
                store_u8(fired + row, np.uint8(HALF_FIRED))
        store_f32(act + 4 * row, load_f32(act + 4 * row) * u)


@inline
def _lane(args, t, n_active, lane, y, scratch):
    """y [n_embd] = the lane's share of the down projection of token t.

    Reads the rows of up and of down for the neurons of the list: up may silence some more (drelu),
    whose rows of down are not read. In the standard layout of down only act is made.
    """
    decider, up, down = args + 8 * FFN.decider, args + 8 * FFN.up, args + 8 * FFN.down
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    act, active = arg(args, FFN.act) + 4 * t * n_ff, arg(args, FFN.active) + 4 * t * n_ff
    fired, values = arg(args, FFN.fired) + t * n_ff, arg(args, FFN.values) + 4 * t * n_ff
    h = arg(args, FFN.h) + 4 * t * n_embd
    packed = arg(args, FFN.packs) + t * arg(args, FFN.pack_bytes)
    first, last = n_active * lane // LANES, n_active * (lane + 1) // LANES
    n, n_fired = first, 0
    for i in range(first, last, ROWS):
        count, rows = min(ROWS, last - i), active + 4 * i
        if arg(up, MATRIX.data) != 0:
            kind = arg(args, FFN.activation)
            _multiply(up, rows, count, h, packed, kind, act, fired, scratch)
        for j in range(i, i + count):
            row = np.int64(load_i32(active + 4 * j))
            has_fired = load_u8(fired + row) == FIRED
            n_fired += np.int64(has_fired)
            if has_fired or arg(args, FFN.is_dense) != 0:  # the control takes all, for nothing
                store_i32(active + 4 * n, np.int32(row))
                store_f32(values + 4 * n, load_f32(act + 4 * row))
                n += 1
    atomic_add(arg(args, FFN.totals) + 24, n_fired)
    fill_zero(y, n_embd)
    if arg(args, FFN.is_transposed) != 0:
        call_axpys(
            arg(down, MATRIX.axpys),
            arg(down, MATRIX.data),
            arg(down, MATRIX.row_bytes),
            n_embd,
            active + 4 * first,
            n - first,
            values + 4 * first,
            y,
        )


@inline
def _add_to(y, x, first, last):
    """y [first:last] += x [first:last], in float32."""
    end = first + (last - first) // 16 * 16
    for i in range(first, end, 16):
        store_f32x16(y + 4 * i, add(load_f32x16(y + 4 * i), load_f32x16(x + 4 * i)))
    for i in range(end, last):
        store_f32(y + 4 * i, load_f32(y + 4 * i) + load_f32(x + 4 * i))


@inline
def _by_tokens(args, control, epoch, n_tok, scratch):
    """Phase 3 for many tokens: each is one task, its lanes added up in the same order as ever."""
    n_ff = arg(args + 8 * FFN.decider, MATRIX.rows)
    n_embd = arg(args + 8 * FFN.decider, MATRIX.cols)
    y, down_bias = scratch + WORK, arg(args, FFN.down_bias)
    total = y + 4 * n_embd
    while True:
        t = take(control, 3, epoch, n_tok)
        if t < 0:
            break
        n_active = np.int64(load_i32(arg(args, FFN.n_active) + 4 * t))
        fill_zero(total, n_embd)
        for lane in range(LANES):
            _lane(args, t, n_active, lane, y, scratch)
            _add_to(total, y, 0, n_embd)
        if arg(args, FFN.is_transposed) != 0:
            if down_bias != 0:
                _add_to(total, down_bias, 0, n_embd)
            _add_to(arg(args, FFN.x) + t * n_embd * 4, total, 0, n_embd)
        elif n_ff % 32 == 0:
            packs, size = arg(args, FFN.act_packs), arg(args, FFN.act_pack_bytes)
            pack(arg(args, FFN.act) + t * n_ff * 4, n_ff, packs + t * size, arg(args, FFN.ones))
        finish(control, 3)
    wait(control, 3, epoch, n_tok)


@inline
def _standard_down(args, control, epoch, n_tok, scratch):
    """Phase 4 for the standard layout: act is complete (dense mode), and down a matmul."""
    down, n_embd = args + 8 * FFN.down, arg(args + 8 * FFN.decider, MATRIX.cols)
    n_tasks = n_tasks_of(down)
    while True:
        task = take(control, 4, epoch, n_tasks)
        if task < 0:
            break
        packs, size = arg(args, FFN.act_packs), arg(args, FFN.act_pack_bytes)
        act, x = arg(args, FFN.act), arg(args, FFN.x)
        matmul_task(down, task, n_tok, act, packs, size, x, n_embd, ADD, scratch)
        finish(control, 4)
    wait(control, 4, epoch, n_tasks)


@job
def ffn(args, control, epoch, thread):
    """x [n_tok, n_embd] += FFN(h); counts what was read and what fired.

    Phases: 0 list the predicted neurons (one token only), 1 decider, 2 list those that fired,
    3 up and down by lanes (one token) or by tokens, 4 add the lanes up.
    """
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    decider = args + 8 * FFN.decider
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    h, packs, size = arg(args, FFN.h), arg(args, FFN.packs), arg(args, FFN.pack_bytes)
    act, mask, has_mask = arg(args, FFN.act), arg(args, FFN.mask), arg(args, FFN.has_mask)
    rows, fired, active = arg(args, FFN.rows), arg(args, FFN.fired), arg(args, FFN.active)
    n_rows_at, n_active_at = arg(args, FFN.n_rows), arg(args, FFN.n_active)
    kind, is_dense = arg(args, FFN.activation), arg(args, FFN.is_dense)
    threshold = load_f32(arg(args, FFN.threshold))
    scratch = arg(args, FFN.scratch) + thread * arg(args, FFN.scratch_bytes)
    x = arg(args, FFN.x)

    # A list is worth making only for one token: for many, nearly every row serves one of them.
    use_list = has_mask != 0 and n_tok == 1
    while True:
        task = take(control, 0, epoch, 1 if use_list else 0)
        if task < 0:
            break
        n = 0
        for row in range(n_ff):
            store_i32(rows + 4 * n, np.int32(row))
            n += np.int64(load_u8(mask + row))
        store_i32(n_rows_at, np.int32(n))
        finish(control, 0)
    if not wait(control, 0, epoch, 1 if use_list else 0):
        return
    n_rows = np.int64(load_i32(n_rows_at)) if use_list else n_ff

    n_tasks = (n_rows + ROWS - 1) // ROWS
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        first, count = task * ROWS, min(ROWS, n_rows - task * ROWS)
        for t in range(n_tok):
            listed, n = np.int64(0), count
            if use_list:
                listed = rows + 4 * first
            elif has_mask != 0:
                listed, n = scratch + LIST, 0
                for row in range(first, first + count):
                    store_i32(listed + 4 * n, np.int32(row))
                    store_u8(fired + t * n_ff + row, np.uint8(0))
                    n += np.int64(load_u8(mask + t * n_ff + row))
            _decide(
                decider,
                0 if has_mask != 0 else first,
                listed,
                n,
                h + t * n_embd * 4,
                packs + t * size,
                kind,
                threshold,
                act + 4 * t * n_ff,
                fired + t * n_ff,
                scratch,
            )
        finish(control, 1)
    if not wait(control, 1, epoch, n_tasks):
        return

    while True:
        t = take(control, 2, epoch, n_tok)
        if t < 0:
            break
        n, n_up, n_read = 0, 0, n_rows
        for i in range(n_rows):
            row = np.int64(load_i32(rows + 4 * i)) if use_list else i
            flag = np.int64(load_u8(fired + t * n_ff + row) != 0)
            store_i32(active + 4 * (t * n_ff + n), np.int32(row))
            n_up += flag
            n += 1 if is_dense != 0 else flag
        if has_mask != 0 and not use_list:
            n_read = np.int64(0)
            for row in range(n_ff):
                n_read += np.int64(load_u8(mask + t * n_ff + row))
        store_i32(n_active_at + 4 * t, np.int32(n))
        totals = arg(args, FFN.totals)
        atomic_add(totals, 1)
        atomic_add(totals + 8, n_read)
        atomic_add(totals + 16, n_up)
        finish(control, 2)
    if not wait(control, 2, epoch, n_tok):
        return

    if n_tok > 1 or arg(args, FFN.is_transposed) == 0:
        _by_tokens(args, control, epoch, n_tok, scratch)
        if arg(args, FFN.is_transposed) == 0:
            _standard_down(args, control, epoch, n_tok, scratch)
        return

    down_bias = arg(args, FFN.down_bias)
    lanes, n_active = arg(args, FFN.lanes), np.int64(load_i32(n_active_at))
    while True:
        lane = take(control, 3, epoch, LANES)
        if lane < 0:
            break
        _lane(args, 0, n_active, lane, lanes + lane * n_embd * 4, scratch)
        finish(control, 3)
    if not wait(control, 3, epoch, LANES):
        return
    n_tasks = (n_embd + COLUMNS - 1) // COLUMNS
    while True:
        task = take(control, 4, epoch, n_tasks)
        if task < 0:
            break
        first, last = task * COLUMNS, min((task + 1) * COLUMNS, n_embd)
        for lane in range(1, LANES):
            _add_to(lanes, lanes + lane * n_embd * 4, first, last)
        if down_bias != 0:
            _add_to(lanes, down_bias, first, last)
        _add_to(x, lanes, first, last)
        finish(control, 4)
    wait(control, 4, epoch, n_tasks)


@job
def audit(args, control, epoch, thread):
    """truth [n_ff] = how each neuron fires for the audited token, all of them computed."""
    t = np.int64(load_i32(arg(args, AUDIT.token)))
    decider, up = args + 8 * AUDIT.decider, args + 8 * AUDIT.up
    n_ff, n_embd = arg(decider, MATRIX.rows), arg(decider, MATRIX.cols)
    h = arg(args, AUDIT.h) + t * n_embd * 4
    packed = arg(args, AUDIT.packs) + t * arg(args, AUDIT.pack_bytes)
    threshold, kind = load_f32(arg(args, AUDIT.threshold)), arg(args, AUDIT.activation)
    act, truth = arg(args, AUDIT.act), arg(args, AUDIT.truth)
    scratch = arg(args, AUDIT.scratch) + thread * arg(args, AUDIT.scratch_bytes)
    n_tasks = n_tasks_of(decider)
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        first, count = task * ROWS, min(ROWS, n_ff - task * ROWS)
        _decide(decider, first, 0, count, h, packed, kind, threshold, act, truth, scratch)
        if kind == DRELU:
            listed, n = scratch + LIST, 0
            for row in range(first, first + count):
                store_i32(listed + 4 * n, np.int32(row))
                n += np.int64(load_u8(truth + row) != 0)
            _multiply(up, listed, n, h, packed, kind, act, truth, scratch)
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)
