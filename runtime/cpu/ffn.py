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
from .jit import arg, inline, job, shared
from .linear import ADD, ROWS, TOKENS, matmul_task, n_tasks_of
from .pool import finish, take, wait
from .rows import SCRATCH, axpy, dot, fill_zero, pack
from .simd import (
    add,
    atomic_add,
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
    "activation threshold x down_bias lanes totals act_packs act_pack_bytes scratch scratch_bytes "
    "is_transposed decider:MATRIX up:MATRIX down:MATRIX"
)

AUDIT = layout(
    "token h packs pack_bytes activation threshold truth scratch scratch_bytes "
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
def _product(matrix, row, h, packed, scratch):
    """Return one row of a matrix times h, plus its bias."""
    w = arg(matrix, MATRIX.data) + row * arg(matrix, MATRIX.row_bytes)
    value = dot(arg(matrix, MATRIX.type), w, arg(matrix, MATRIX.cols), h, packed, scratch)
    if arg(matrix, MATRIX.bias) != 0:
        value += load_f32(arg(matrix, MATRIX.bias) + 4 * row)
    return value


@inline
def _neuron(decider, up, row, h, packed, kind, threshold, is_dense, scratch):
    """Return how a neuron fires (0, FIRED, HALF_FIRED), and its activation.

    The row of up is read only if the decider's activation is not 0, or in dense mode.
    """
    g = activate(kind, _product(decider, row, h, packed, scratch), threshold)
    flag = np.uint8(FIRED if g != 0 else 0)
    if arg(up, MATRIX.data) != 0 and (flag != 0 or is_dense != 0):
        u = _product(up, row, h, packed, scratch)
        if kind == DRELU:
            u = max(u, np.float32(0))
            if u == 0 and flag != 0:
                flag = np.uint8(HALF_FIRED)
        g *= u
    return flag, g


@shared
def _lane(down, n_embd, act, active, n_active, lane, y):
    """y [n_embd] = the lane's share of the down projection of one token."""
    fill_zero(y, n_embd)
    type_, data = arg(down, MATRIX.type), arg(down, MATRIX.data)
    row_bytes = arg(down, MATRIX.row_bytes)
    for i in range(n_active * lane // LANES, n_active * (lane + 1) // LANES):
        row = np.int64(load_i32(active + 4 * i))
        axpy(type_, data + row * row_bytes, n_embd, load_f32(act + 4 * row), y)


@inline
def _add_to(y, x, first, last):
    """y [first:last] += x [first:last], in float32."""
    end = first + (last - first) // 16 * 16
    for i in range(first, end, 16):
        store_f32x16(y + 4 * i, add(load_f32x16(y + 4 * i), load_f32x16(x + 4 * i)))
    for i in range(end, last):
        store_f32(y + 4 * i, load_f32(y + 4 * i) + load_f32(x + 4 * i))


@job
def ffn(args, control, epoch, thread):
    """x [n_tok, n_embd] += FFN(h); counts what was read and what fired.

    Phases: 0 list the predicted neurons (one token only), 1 decider and up, 2 list those that
    fired, 3 down by lanes (one token) or by tokens, 4 add the lanes up.
    """
    n_tok = np.int64(load_i32(arg(args, FFN.counts)))
    decider, up, down = args + 8 * FFN.decider, args + 8 * FFN.up, args + 8 * FFN.down
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
        first, last = task * ROWS, min((task + 1) * ROWS, n_rows)
        for block in range(0, n_tok, TOKENS):
            for i in range(first, last):
                row = np.int64(load_i32(rows + 4 * i)) if use_list else i
                for t in range(block, min(block + TOKENS, n_tok)):
                    flag, value = np.uint8(0), np.float32(0)
                    if has_mask == 0 or load_u8(mask + t * n_ff + row) != 0:
                        h_t, packed = h + t * n_embd * 4, packs + t * size
                        flag, value = _neuron(
                            decider, up, row, h_t, packed, kind, threshold, is_dense, scratch
                        )
                    store_f32(act + 4 * (t * n_ff + row), value)
                    # Whether it fired is not whether act is 0: up may be 0.
                    store_u8(fired + t * n_ff + row, flag)
        finish(control, 1)
    if not wait(control, 1, epoch, n_tasks):
        return

    while True:
        t = take(control, 2, epoch, n_tok)
        if t < 0:
            break
        n, n_up, n_fired, n_read = 0, 0, 0, n_rows
        for i in range(n_rows):
            row = np.int64(load_i32(rows + 4 * i)) if use_list else i
            flag = load_u8(fired + t * n_ff + row)
            store_i32(active + 4 * (t * n_ff + n), np.int32(row))
            n_up += np.int64(flag != 0)
            n_fired += np.int64(flag == FIRED)
            # The control takes all rows, for nothing.
            n += 1 if is_dense != 0 else np.int64(flag == FIRED)
        if has_mask != 0 and not use_list:
            n_read = np.int64(0)
            for row in range(n_ff):
                n_read += np.int64(load_u8(mask + t * n_ff + row))
        store_i32(n_active_at + 4 * t, np.int32(n))
        totals = arg(args, FFN.totals)
        atomic_add(totals, 1)
        atomic_add(totals + 8, n_read)
        atomic_add(totals + 16, n_up)
        atomic_add(totals + 24, n_fired)
        finish(control, 2)
    if not wait(control, 2, epoch, n_tok):
        return

    if arg(args, FFN.is_transposed) == 0:
        # The standard layout: act is complete (dense mode), and down [n_embd, n_ff] a matmul.
        act_packs, act_size = arg(args, FFN.act_packs), arg(args, FFN.act_pack_bytes)
        while True:
            t = take(control, 3, epoch, n_tok)
            if t < 0:
                break
            if n_ff % 32 == 0:
                pack(act + t * n_ff * 4, n_ff, act_packs + t * act_size, arg(args, FFN.ones))
            finish(control, 3)
        if not wait(control, 3, epoch, n_tok):
            return
        n_tasks = n_tasks_of(down)
        while True:
            task = take(control, 4, epoch, n_tasks)
            if task < 0:
                break
            matmul_task(down, task, n_tok, act, act_packs, act_size, x, n_embd, ADD, scratch)
            finish(control, 4)
        wait(control, 4, epoch, n_tasks)
        return

    down_bias = arg(args, FFN.down_bias)
    if n_tok > 1:
        y = scratch + SCRATCH
        total = y + 4 * n_embd
        while True:
            t = take(control, 3, epoch, n_tok)
            if t < 0:
                break
            n_active = np.int64(load_i32(n_active_at + 4 * t))
            at = t * n_ff * 4
            _lane(down, n_embd, act + at, active + at, n_active, 0, total)
            for lane in range(1, LANES):
                _lane(down, n_embd, act + at, active + at, n_active, lane, y)
                _add_to(total, y, 0, n_embd)
            if down_bias != 0:
                _add_to(total, down_bias, 0, n_embd)
            _add_to(x + t * n_embd * 4, total, 0, n_embd)
            finish(control, 3)
        wait(control, 3, epoch, n_tok)
        return

    lanes, n_active = arg(args, FFN.lanes), np.int64(load_i32(n_active_at))
    while True:
        lane = take(control, 3, epoch, LANES)
        if lane < 0:
            break
        _lane(down, n_embd, act, active, n_active, lane, lanes + lane * n_embd * 4)
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
    threshold = load_f32(arg(args, AUDIT.threshold))
    scratch = arg(args, AUDIT.scratch) + thread * arg(args, AUDIT.scratch_bytes)
    n_tasks = n_tasks_of(decider)
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        for row in range(task * ROWS, min((task + 1) * ROWS, n_ff)):
            kind = arg(args, AUDIT.activation)
            flag, _ = _neuron(decider, up, row, h, packed, kind, threshold, 0, scratch)
            store_u8(arg(args, AUDIT.truth) + row, flag)
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)
