"""The operators that are little more than a product: embed, ffn_norm, out_add, predict, head."""

from __future__ import annotations

import numpy as np

from .block import MATRIX, NORM, layout
from .elementwise import normalise
from .jit import arg, function, inline, job
from .matmul import (
    ADD,
    STORE,
    WORK,
    add_to,
    first_task,
    following_task,
    matmul,
    matmul_task,
    n_tasks_of,
    rows_per_task,
)
from .pool import finish, take, wait
from .rows import fill_zero, pack, pack_stride
from .simd import (
    call_widen,
    load_f32,
    load_f32x16,
    load_i32,
    splat,
    store_f32,
    store_not_below,
    store_u8,
)

# -- embed ------------------------------------------------------------------------------------

EMBED = layout(
    "counts tokens positions offset x scratch scratch_bytes n_threads embd:MATRIX table:MATRIX"
)


@inline
def _widen_row(matrix, row, n, out):
    size = arg(matrix, MATRIX.row_bytes)
    data = arg(matrix, MATRIX.data) + row * size
    call_widen(arg(matrix, MATRIX.widen), data, size, n, 1, out, 0)


@job
def embed(args, control, epoch, thread):
    """x [n_tok, n_embd] = rows of the embedding, plus those of learned positions if there are."""
    n_tok = load_i32(arg(args, EMBED.counts))
    embd, table = args + 8 * EMBED.embd, args + 8 * EMBED.table
    n = arg(embd, MATRIX.cols)
    position_row = arg(args, EMBED.scratch) + thread * arg(args, EMBED.scratch_bytes) + WORK
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        x = arg(args, EMBED.x) + t * n * 4
        _widen_row(embd, np.int64(load_i32(arg(args, EMBED.tokens) + 4 * t)), n, x)
        if arg(table, MATRIX.data) != 0:
            position = np.int64(load_i32(arg(args, EMBED.positions) + 4 * t))
            _widen_row(table, position + arg(args, EMBED.offset), n, position_row)
            add_to(x, position_row, 0, n)
        finish(control, 0)
    wait(control, 0, epoch, n_tok)


# -- norm of some tokens, packed --------------------------------------------------------------


@function
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


FFN_NORM = layout("counts x norm:NORM n_embd h packs ones")


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
            arg(args, FFN_NORM.packs) + t * pack_stride(n),
            arg(args, FFN_NORM.ones),
        )
        finish(control, 0)
    wait(control, 0, epoch, n_tok)


@function
def pack_tokens(control, epoch, x, n, n_tok, packs, ones):
    """packs = x [n_tok, n] rounded, in phase 0; n not a multiple of 32: none. Like wait()."""
    n_tasks = n_tok if n % 32 == 0 else 0
    while True:
        t = take(control, 0, epoch, n_tasks)
        if t < 0:
            break
        pack(x + t * n * 4, n, packs + t * pack_stride(n), ones)
        finish(control, 0)
    return wait(control, 0, epoch, n_tasks)


# -- x += a @ wo ------------------------------------------------------------------------------

OUT = layout("counts a packs ones x scratch scratch_bytes n_threads wo:MATRIX")


@job
def out_add(args, control, epoch, thread):
    """x [n_tok, n_embd] += a [n_tok, n_head * head_dim] @ wo^T + bias."""
    n_tok = np.int64(load_i32(arg(args, OUT.counts)))
    wo = args + 8 * OUT.wo
    cols, rows = arg(wo, MATRIX.cols), arg(wo, MATRIX.rows)
    a, packs, x = arg(args, OUT.a), arg(args, OUT.packs), arg(args, OUT.x)
    scratch = arg(args, OUT.scratch) + thread * arg(args, OUT.scratch_bytes)
    n_threads = arg(args, OUT.n_threads)
    n_tasks = n_tasks_of(wo, n_threads, n_tok)
    task = first_task(control, 1, epoch, n_tasks, wo, n_threads, n_tok)
    if not pack_tokens(control, epoch, a, cols, n_tok, packs, arg(args, OUT.ones)):
        return
    matmul(control, 1, epoch, task, wo, n_threads, n_tok, a, packs, x, rows, ADD, scratch)


CLEAR = layout("counts x n")


@job
def clear_rows(args, control, epoch, thread):
    """x [n_tok, n] = 0."""
    n_tok, n = np.int64(load_i32(arg(args, CLEAR.counts))), arg(args, CLEAR.n)
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        fill_zero(arg(args, CLEAR.x) + t * n * 4, n)
        finish(control, 0)
    wait(control, 0, epoch, n_tok)


PACK = layout("counts x packs ones n")


@job
def pack_rows(args, control, epoch, thread):
    """packs = x [n_tok, n] rounded, where another backend made x; n not a multiple of 32: none."""
    n_tok = np.int64(load_i32(arg(args, PACK.counts)))
    x, n = arg(args, PACK.x), arg(args, PACK.n)
    pack_tokens(control, epoch, x, n, n_tok, arg(args, PACK.packs), arg(args, PACK.ones))


# -- predictor --------------------------------------------------------------------------------

PREDICT = layout(
    "counts rows x packs is_packed ones hidden hidden_packs scores mask thresholds n_layer "
    "scratch scratch_bytes n_threads fc1:MATRIX fc2:MATRIX"
)


@job
def predict(args, control, epoch, thread):
    """scores [n_tok, n_ff] = fc2 . relu(fc1 . x) + bias, mask = scores >= threshold; x: x or h.

    Reads fc1 [rank, n_embd] and fc2 [n_ff, rank] once.
    """
    n_tok = np.int64(load_i32(arg(args, PREDICT.counts)))
    fc1, fc2 = args + 8 * PREDICT.fc1, args + 8 * PREDICT.fc2
    n, rank = arg(fc1, MATRIX.cols), arg(fc1, MATRIX.rows)
    x, packs, ones = arg(args, PREDICT.x), arg(args, PREDICT.packs), arg(args, PREDICT.ones)
    hidden, hidden_packs = arg(args, PREDICT.hidden), arg(args, PREDICT.hidden_packs)
    scratch = arg(args, PREDICT.scratch) + thread * arg(args, PREDICT.scratch_bytes)
    n_threads = arg(args, PREDICT.n_threads)

    n_pack = 0 if arg(args, PREDICT.is_packed) else n_tok
    n_tasks = n_tasks_of(fc1, n_threads, n_tok)
    task = first_task(control, 1, epoch, n_tasks, fc1, n_threads, n_tok)
    if not pack_tokens(control, epoch, x, n, n_pack, packs, ones):
        return
    if not matmul(
        control, 1, epoch, task, fc1, n_threads, n_tok, x, packs, hidden, rank, STORE, scratch
    ):
        return

    n_tasks = n_tasks_of(fc2, n_threads, n_tok)
    task = first_task(control, 3, epoch, n_tasks, fc2, n_threads, n_tok)
    while True:
        t = take(control, 2, epoch, n_tok)
        if t < 0:
            break
        row = hidden + t * rank * 4
        for i in range(rank):
            store_f32(row + 4 * i, max(load_f32(row + 4 * i), np.float32(0)))
        if rank % 32 == 0:
            pack(row, rank, hidden_packs + t * pack_stride(rank), ones)
        finish(control, 2)
    if not wait(control, 2, epoch, n_tok):
        return

    # One threshold for each sequence, in rows of one for each layer; ours is the first.
    thresholds, stride = arg(args, PREDICT.thresholds), 4 * arg(args, PREDICT.n_layer)
    n_ff, scores, mask = arg(fc2, MATRIX.rows), arg(args, PREDICT.scores), arg(args, PREDICT.mask)
    size = rows_per_task(n_ff, rank, n_threads, n_tok)
    while task >= 0:
        following, next_w = following_task(control, 3, epoch, n_tasks, task, fc2, n_threads, n_tok)
        matmul_task(
            fc2, task, next_w, n_threads, n_tok, hidden, hidden_packs, scores, n_ff, STORE, scratch
        )
        start, end = task * size, min(task * size + size, n_ff)
        for t in range(n_tok):
            sequence = np.int64(load_i32(arg(args, PREDICT.rows) + 4 * t))
            threshold, at = load_f32(thresholds + sequence * stride), t * n_ff
            for i in range(start, end - 15, 16):
                score = load_f32x16(scores + 4 * (at + i))
                store_not_below(mask + at + i, score, splat(threshold))
            for i in range(start + (end - start) // 16 * 16, end):
                is_below = load_f32(scores + 4 * (at + i)) < threshold
                store_u8(mask + at + i, np.uint8(not is_below))
        finish(control, 3)
        task = following
    wait(control, 3, epoch, n_tasks)


# -- head -------------------------------------------------------------------------------------

HEAD = layout(
    "counts outputs x norm:NORM n_embd h packs ones logits scratch scratch_bytes n_threads "
    "output:MATRIX"
)


@job
def head(args, control, epoch, thread):
    """logits [n_out, n_vocab] = norm of x of the wanted tokens @ output^T."""
    n_out = np.int64(load_i32(arg(args, HEAD.counts) + 4))
    n = arg(args, HEAD.n_embd)
    scratch = arg(args, HEAD.scratch) + thread * arg(args, HEAD.scratch_bytes)
    output, n_threads = args + 8 * HEAD.output, arg(args, HEAD.n_threads)
    n_tasks = n_tasks_of(output, n_threads, n_out)
    task = first_task(control, 1, epoch, n_tasks, output, n_threads, n_out)
    h, packs = arg(args, HEAD.h), arg(args, HEAD.packs)
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
            packs + i * pack_stride(n),
            arg(args, HEAD.ones),
        )
        finish(control, 0)
    if not wait(control, 0, epoch, n_out):
        return
    h, packs = arg(args, HEAD.h), arg(args, HEAD.packs)
    logits, rows = arg(args, HEAD.logits), arg(output, MATRIX.rows)
    matmul(
        control, 1, epoch, task, output, n_threads, n_out, h, packs, logits, rows, STORE, scratch
    )
