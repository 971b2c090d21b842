"""Matrix times vectors, and the operators that are little more: embed, out_add, predict, head."""

from __future__ import annotations

import numpy as np

from .block import MATRIX, NORM, layout
from .elementwise import normalise
from .jit import arg, inline, job
from .pool import finish, take, wait
from .rows import SCRATCH, SLACK, fill_zero, pack
from .simd import call_axpys, call_dots, load_f32, load_i32, store_f32, store_u8

ROWS = 16  # rows of a matrix in one task

# A thread's scratch: the end of a row, what its rows came to, a list of rows, and from WORK on
# whatever a job needs.
SUMS = SCRATCH  # float32 [ROWS]
LIST = SUMS + 4 * ROWS  # int32 [ROWS + SLACK]
WORK = -(-(LIST + 4 * (ROWS + SLACK)) // 64) * 64

STORE, ADD = 0, 1


@inline
def n_tasks_of(matrix):
    """Return the number of tasks that a matrix's rows are cut into."""
    return (arg(matrix, MATRIX.rows) + ROWS - 1) // ROWS


@inline
def row_dots(matrix, first, rows, count, x, packed, scratch):
    """Return where float32 [count] lie: rows of a matrix times one token's x, plus their biases.

    `rows`: the address of a list of row numbers, or 0 for the rows from `first` on.
    """
    out, row_bytes = scratch + SUMS, arg(matrix, MATRIX.row_bytes)
    call_dots(
        arg(matrix, MATRIX.dots),
        arg(matrix, MATRIX.data) + first * row_bytes,
        row_bytes,
        arg(matrix, MATRIX.cols),
        rows,
        count,
        x,
        packed,
        scratch,
        out,
    )
    bias = arg(matrix, MATRIX.bias)
    if bias != 0:
        for i in range(count):
            row = np.int64(load_i32(rows + 4 * i)) if rows != 0 else first + i
            store_f32(out + 4 * i, load_f32(out + 4 * i) + load_f32(bias + 4 * row))
    return out


@inline
def matmul_task(matrix, task, n_tok, x, packs, pack_bytes, y, y_cols, how, scratch):
    """y [n_tok, y_cols] = or += x [n_tok, cols] @ matrix [rows, cols]^T + bias, for ROWS rows.

    x float32; `packs`: the same activations packed, `pack_bytes` a token. Reads the rows from
    memory once: they stay in the cache from token to token.
    """
    cols, first = arg(matrix, MATRIX.cols), task * ROWS
    count = min(ROWS, arg(matrix, MATRIX.rows) - first)
    for t in range(n_tok):
        out = row_dots(matrix, first, 0, count, x + t * cols * 4, packs + t * pack_bytes, scratch)
        at = y + 4 * (t * y_cols + first)
        for i in range(count):
            value = load_f32(out + 4 * i)
            if how == ADD:
                value += load_f32(at + 4 * i)
            store_f32(at + 4 * i, value)


# -- embed ------------------------------------------------------------------------------------

EMBED = layout("counts tokens positions offset x one embd:MATRIX table:MATRIX")


@inline
def _add_row(matrix, row, n, one, x):
    size = arg(matrix, MATRIX.row_bytes)
    call_axpys(
        arg(matrix, MATRIX.axpys), arg(matrix, MATRIX.data) + row * size, size, n, 0, 1, one, x
    )


@job
def embed(args, control, epoch, thread):
    """x [n_tok, n_embd] = rows of the embedding, plus those of learned positions if there are."""
    n_tok = load_i32(arg(args, EMBED.counts))
    embd, table = args + 8 * EMBED.embd, args + 8 * EMBED.table
    n = arg(embd, MATRIX.cols)
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        x = arg(args, EMBED.x) + t * n * 4
        row = np.int64(load_i32(arg(args, EMBED.tokens) + 4 * t))
        fill_zero(x, n)
        _add_row(embd, row, n, arg(args, EMBED.one), x)
        if arg(table, MATRIX.data) != 0:
            position = np.int64(load_i32(arg(args, EMBED.positions) + 4 * t))
            _add_row(table, position + arg(args, EMBED.offset), n, arg(args, EMBED.one), x)
        finish(control, 0)
    wait(control, 0, epoch, n_tok)


# -- norm of some tokens, packed --------------------------------------------------------------


@inline
def norm_task(norm, x, n, h, packed, ones):
    """h [n] = norm of x, and its pack (when n is whole blocks); `norm`: words of a NORM."""
    normalise(
        arg(norm, NORM.kind),
        x,
        arg(norm, NORM.weight),
        arg(norm, NORM.bias),
        n,
        load_f32(arg(norm, NORM.eps)),
        h,
    )
    if n % 32 == 0:
        pack(h, n, packed, ones)


FFN_NORM = layout("counts x norm:NORM n_embd h packs pack_bytes ones")


@job
def ffn_norm(args, control, epoch, thread):
    """h [n_tok, n_embd] = norm of x, and packed."""
    n_tok = load_i32(arg(args, FFN_NORM.counts))
    n = arg(args, FFN_NORM.n_embd)
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        norm_task(
            args + 8 * FFN_NORM.norm,
            arg(args, FFN_NORM.x) + t * n * 4,
            n,
            arg(args, FFN_NORM.h) + t * n * 4,
            arg(args, FFN_NORM.packs) + t * arg(args, FFN_NORM.pack_bytes),
            arg(args, FFN_NORM.ones),
        )
        finish(control, 0)
    wait(control, 0, epoch, n_tok)


# -- x += a @ wo ------------------------------------------------------------------------------

OUT = layout("counts a packs pack_bytes ones x scratch scratch_bytes wo:MATRIX")


@job
def out_add(args, control, epoch, thread):
    """x [n_tok, n_embd] += a [n_tok, n_head * head_dim] @ wo^T + bias."""
    n_tok = load_i32(arg(args, OUT.counts))
    wo = args + 8 * OUT.wo
    cols, size = arg(wo, MATRIX.cols), arg(args, OUT.pack_bytes)
    a, packs = arg(args, OUT.a), arg(args, OUT.packs)
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        if cols % 32 == 0:
            pack(a + t * cols * 4, cols, packs + t * size, arg(args, OUT.ones))
        finish(control, 0)
    if not wait(control, 0, epoch, n_tok):
        return
    scratch = arg(args, OUT.scratch) + thread * arg(args, OUT.scratch_bytes)
    n_tasks = n_tasks_of(wo)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        rows = arg(wo, MATRIX.rows)
        matmul_task(wo, task, n_tok, a, packs, size, arg(args, OUT.x), rows, ADD, scratch)
        finish(control, 1)
    wait(control, 1, epoch, n_tasks)


# -- predictor --------------------------------------------------------------------------------

PREDICT = layout(
    "counts rows x packs pack_bytes is_packed ones hidden hidden_packs hidden_pack_bytes scores "
    "mask thresholds n_layer scratch scratch_bytes fc1:MATRIX fc2:MATRIX"
)


@job
def predict(args, control, epoch, thread):
    """scores [n_tok, n_ff] = fc2 . relu(fc1 . x) + bias, mask = scores >= threshold; x: x or h.

    Reads fc1 [rank, n_embd] and fc2 [n_ff, rank] once.
    """
    n_tok = load_i32(arg(args, PREDICT.counts))
    fc1, fc2 = args + 8 * PREDICT.fc1, args + 8 * PREDICT.fc2
    n, rank = arg(fc1, MATRIX.cols), arg(fc1, MATRIX.rows)
    x, hidden = arg(args, PREDICT.x), arg(args, PREDICT.hidden)
    packs, size = arg(args, PREDICT.packs), arg(args, PREDICT.pack_bytes)
    hidden_packs, hidden_size = (
        arg(args, PREDICT.hidden_packs),
        arg(args, PREDICT.hidden_pack_bytes),
    )
    scratch = arg(args, PREDICT.scratch) + thread * arg(args, PREDICT.scratch_bytes)

    n_pack = 0 if arg(args, PREDICT.is_packed) or n % 32 else n_tok
    while True:
        t = take(control, 0, epoch, n_pack)
        if t < 0:
            break
        pack(x + t * n * 4, n, packs + t * size, arg(args, PREDICT.ones))
        finish(control, 0)
    if not wait(control, 0, epoch, n_pack):
        return

    n_tasks = n_tasks_of(fc1)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        matmul_task(fc1, task, n_tok, x, packs, size, hidden, rank, STORE, scratch)
        finish(control, 1)
    if not wait(control, 1, epoch, n_tasks):
        return

    while True:
        t = take(control, 2, epoch, n_tok)
        if t < 0:
            break
        row = hidden + t * rank * 4
        for i in range(rank):
            store_f32(row + 4 * i, max(load_f32(row + 4 * i), np.float32(0)))
        if rank % 32 == 0:
            pack(row, rank, hidden_packs + t * hidden_size, arg(args, PREDICT.ones))
        finish(control, 2)
    if not wait(control, 2, epoch, n_tok):
        return

    n_tasks = n_tasks_of(fc2)
    # One threshold for each sequence, in rows of one for each layer; ours is the first.
    thresholds, stride = arg(args, PREDICT.thresholds), 4 * arg(args, PREDICT.n_layer)
    n_ff = arg(fc2, MATRIX.rows)
    while True:
        task = take(control, 3, epoch, n_tasks)
        if task < 0:
            break
        first = task * ROWS
        count = min(ROWS, n_ff - first)
        for t in range(n_tok):
            packed = hidden_packs + t * hidden_size
            out = row_dots(fc2, first, 0, count, hidden + t * rank * 4, packed, scratch)
            sequence = np.int64(load_i32(arg(args, PREDICT.rows) + 4 * t))
            threshold = load_f32(thresholds + sequence * stride)
            for i in range(count):
                score, at = load_f32(out + 4 * i), t * n_ff + first + i
                store_f32(arg(args, PREDICT.scores) + 4 * at, score)
                store_u8(arg(args, PREDICT.mask) + at, np.uint8(score >= threshold))
        finish(control, 3)
    wait(control, 3, epoch, n_tasks)


# -- head -------------------------------------------------------------------------------------

HEAD = layout(
    "counts outputs x norm:NORM n_embd h packs pack_bytes ones logits scratch scratch_bytes "
    "output:MATRIX"
)


@job
def head(args, control, epoch, thread):
    """logits [n_out, n_vocab] = norm of x of the wanted tokens @ output^T."""
    n_out = load_i32(arg(args, HEAD.counts) + 4)
    n = arg(args, HEAD.n_embd)
    h, packs, size = arg(args, HEAD.h), arg(args, HEAD.packs), arg(args, HEAD.pack_bytes)
    while True:
        i = take(control, 0, epoch, n_out)
        if i < 0:
            break
        t = load_i32(arg(args, HEAD.outputs) + 4 * i)
        norm_task(
            args + 8 * HEAD.norm,
            arg(args, HEAD.x) + t * n * 4,
            n,
            h + i * n * 4,
            packs + i * size,
            arg(args, HEAD.ones),
        )
        finish(control, 0)
    if not wait(control, 0, epoch, n_out):
        return
    scratch = arg(args, HEAD.scratch) + thread * arg(args, HEAD.scratch_bytes)
    output = args + 8 * HEAD.output
    n_tasks = n_tasks_of(output)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        rows = arg(output, MATRIX.rows)
        matmul_task(
            output, task, n_out, h, packs, size, arg(args, HEAD.logits), rows, STORE, scratch
        )
        finish(control, 1)
    wait(control, 1, epoch, n_tasks)
