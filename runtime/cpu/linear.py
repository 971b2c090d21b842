"""Matrix times vectors, and the operators that are little more: embed, out_add, predict, head."""

from __future__ import annotations

import numpy as np

from .block import MATRIX, NORM, layout
from .elementwise import normalise
from .gemm import panel_bytes, panel_size
from .jit import arg, function, inline, job
from .pool import finish, take, wait
from .rows import SCRATCH, SLACK, lead, pack, pack_stride, row_number
from .simd import (
    add,
    call_dots,
    call_rows,
    fma,
    fma1,
    load_f32,
    load_f32x16,
    load_i32,
    splat,
    store_at_least,
    store_f32,
    store_f32x16,
    store_u8,
)

ROWS = 16  # rows of a matrix that are taken at a time
GROUP = 32  # tokens that are multiplied with some panels before the next ones are
_TASKS = 8  # for each thread, that a matrix is cut into
_PANELS_BYTES = 480 << 10  # of panels at once: they stay in the second cache

# A thread's scratch: the end of a row, what its rows came to, a list of rows, and from WORK on
# whatever a job needs.
SUMS = SCRATCH  # float32 [ROWS]
LIST = SUMS + 4 * ROWS  # int32 [ROWS + SLACK]
WORK = -(-(LIST + 4 * (ROWS + SLACK)) // 64) * 64

STORE, ADD = 0, 1


def scratch_bytes(n: int, n_tok: int) -> int:
    """Return the scratch that products with rows of n weights need for n_tok tokens."""
    if n_tok == 1:
        return WORK
    return int(WORK + panels_of.py_func(n) * panel_bytes(n) + 68 * GROUP)


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
    most = 16 if n_tok == 1 else panels_of(n)
    return min(max(n_rows // (_TASKS * n_threads * ROWS), 1), most) * ROWS


@inline
def n_tasks_of(matrix, n_threads, n_tok):
    """Return the number of tasks that a matrix's rows are cut into."""
    rows = arg(matrix, MATRIX.rows)
    size = rows_per_task(rows, arg(matrix, MATRIX.cols), n_threads, n_tok)
    return (rows + size - 1) // size


@inline
def rows_ahead(matrix, first, rows):
    """Return (next_w, next_rows) of rows.DOTS for a matrix that is read in order."""
    data, size = arg(matrix, MATRIX.data), arg(matrix, MATRIX.row_bytes)
    if rows != 0:
        return data, rows + 4 * lead(size)
    return data + (first + lead(size)) * size, np.int64(0)


@function
def row_dots(matrix, first, rows, count, ahead, x, packed, scratch):
    """Return where float32 [count] lie: rows of a matrix times one token's x, plus their biases.

    `rows`: the address of a list of row numbers (`first` is 0 then), or 0 for the rows from
    `first` on; at most ROWS. `ahead`: what is prefetched meanwhile, as rows_ahead says.
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


@function
def unpack_panels(matrix, first, rows, count, scratch):
    """Unpack rows of a matrix, listed, or from `first` on, into panels for panel_dots.

    All the panels of a task for many tokens; for one GROUP of them one at a time, which is read
    while the one before is multiplied.
    """
    n, row_bytes = arg(matrix, MATRIX.cols), arg(matrix, MATRIX.row_bytes)
    for i in range(0, count, ROWS):
        call_rows(
            arg(matrix, MATRIX.unpack),
            arg(matrix, MATRIX.data) + (0 if rows != 0 else (first + i) * row_bytes),
            row_bytes,
            n,
            rows + 4 * i if rows != 0 else 0,
            min(ROWS, count - i),
            scratch + WORK + i // ROWS * panel_size(n),
            np.int64(count > ROWS),
        )


@function
def panel_dots(matrix, panel, first, rows, count, x, packs, tokens, n_tok, scratch):
    """Return where float32 [n_tok, ROWS] lie: an unpacked panel times tokens, plus biases.

    `first`, `rows`, `count`: the rows of the panel. `tokens`: the address of a list of token
    numbers, or 0 for the first n_tok of x; at most GROUP.
    """
    n = arg(matrix, MATRIX.cols)
    out = scratch + WORK + panels_of(n) * panel_size(n)
    call_rows(
        arg(matrix, MATRIX.multiply),
        scratch + WORK + panel * panel_size(n),
        n,
        x,
        packs,
        tokens,
        n_tok,
        out,
    )
    bias = arg(matrix, MATRIX.bias)
    if bias != 0:
        for i in range(count):
            row = first + row_number(rows, i)
            value = load_f32(bias + 4 * row)
            for t in range(n_tok):
                at = out + 64 * t + 4 * i
                store_f32(at, load_f32(at) + value)
    return out


@inline
def token_list(n, scratch):
    """Return where a list of up to GROUP tokens may lie, for a matrix of rows of n weights."""
    return scratch + WORK + panels_of(n) * panel_size(n) + 64 * GROUP


@inline
def ready_panel(matrix, first, rows, count, i, group, n_tok, scratch):
    """Return which panel holds rows i to i + ROWS - 1 of a task's, for a group of n_tok tokens.

    `first`, `rows`, `count`: the rows of the task. Several groups need them all unpacked; for one
    they are unpacked one panel at a time, and while it is multiplied the next one is fetched.
    """
    if n_tok > GROUP:
        if i == 0 and group == 0:
            unpack_panels(matrix, first, rows, count, scratch)
        return i // ROWS
    n = min(ROWS, count - i)
    if rows != 0:
        unpack_panels(matrix, 0, rows + 4 * i, n, scratch)
    else:
        unpack_panels(matrix, first + i, 0, n, scratch)
    return 0


@function
def matmul_task(matrix, task, n_threads, n_tok, x, packs, y, y_cols, how, scratch):
    """y [n_tok, y_cols] = or += x [n_tok, cols] @ matrix [rows, cols]^T + bias, for a task's rows.

    x float32; `packs`: the same activations packed.
    """
    n, n_rows = arg(matrix, MATRIX.cols), arg(matrix, MATRIX.rows)
    size = rows_per_task(n_rows, n, n_threads, n_tok)
    start = task * size
    end = min(start + size, n_rows)
    for group in range(0, n_tok, GROUP):
        n_group = min(GROUP, n_tok - group)
        for first in range(start, end, ROWS):
            count = min(ROWS, end - first)
            if n_tok == 1:
                out = row_dots(
                    matrix, first, 0, count, rows_ahead(matrix, first, 0), x, packs, scratch
                )
            else:
                panel = ready_panel(
                    matrix, start, 0, end - start, first - start, group, n_tok, scratch
                )
                at, pack_at = x + 4 * n * group, packs + pack_stride(n) * group
                out = panel_dots(matrix, panel, first, 0, count, at, pack_at, 0, n_group, scratch)
            for t in range(n_group):
                at, source = y + 4 * ((group + t) * y_cols + first), out + 64 * t
                if count == ROWS:
                    values = load_f32x16(source)
                    if how == ADD:
                        values = add(values, load_f32x16(at))
                    store_f32x16(at, values)
                else:
                    for i in range(count):
                        value = load_f32(source + 4 * i)
                        if how == ADD:
                            value += load_f32(at + 4 * i)
                        store_f32(at + 4 * i, value)


# -- embed ------------------------------------------------------------------------------------

EMBED = layout(
    "counts tokens positions offset x scratch scratch_bytes n_threads embd:MATRIX table:MATRIX"
)


@inline
def _widen_row(matrix, row, n, out):
    size = arg(matrix, MATRIX.row_bytes)
    data = arg(matrix, MATRIX.data) + row * size
    call_rows(arg(matrix, MATRIX.widen), data, size, n, 0, 1, out, 0)


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


@function
def add_to(y, x, first, last):
    """y [first:last] += x [first:last], in float32."""
    end = first + (last - first) // 16 * 16
    for i in range(first, end, 16):
        store_f32x16(y + 4 * i, add(load_f32x16(y + 4 * i), load_f32x16(x + 4 * i)))
    for i in range(end, last):
        store_f32(y + 4 * i, load_f32(y + 4 * i) + load_f32(x + 4 * i))


@function
def add_rows(y, width, piece, numbers, values, count):
    """y [width] += sum of values [count] * float32 rows [width], by numbers (0: in order)."""
    stride, column = 4 * width, 0
    while column + 64 <= width:  # 4 vectors at a time: wider pieces were slower to read
        at, w = y + 4 * column, piece + 4 * column
        a, b = load_f32x16(at), load_f32x16(at + 64)
        c, d = load_f32x16(at + 128), load_f32x16(at + 192)
        for i in range(count):
            v = splat(load_f32(values + 4 * i))
            r = w + row_number(numbers, i) * stride
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
            r = piece + 4 * column + row_number(numbers, i) * stride
            total = fma(splat(load_f32(values + 4 * i)), load_f32x16(r), total)
        store_f32x16(y + 4 * column, total)
        column += 16
    while column < width:
        one = load_f32(y + 4 * column)
        for i in range(count):
            r = piece + 4 * column + row_number(numbers, i) * stride
            one = fma1(load_f32(values + 4 * i), load_f32(r), one)
        store_f32(y + 4 * column, one)
        column += 1


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


# -- x += a @ wo ------------------------------------------------------------------------------

OUT = layout("counts a packs ones x scratch scratch_bytes n_threads wo:MATRIX")


@job
def out_add(args, control, epoch, thread):
    """x [n_tok, n_embd] += a [n_tok, n_head * head_dim] @ wo^T + bias."""
    n_tok = np.int64(load_i32(arg(args, OUT.counts)))
    wo = args + 8 * OUT.wo
    cols, rows = arg(wo, MATRIX.cols), arg(wo, MATRIX.rows)
    a, packs = arg(args, OUT.a), arg(args, OUT.packs)
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        if cols % 32 == 0:
            pack(a + t * cols * 4, cols, packs + t * pack_stride(cols), arg(args, OUT.ones))
        finish(control, 0)
    if not wait(control, 0, epoch, n_tok):
        return
    scratch = arg(args, OUT.scratch) + thread * arg(args, OUT.scratch_bytes)
    n_threads = arg(args, OUT.n_threads)
    n_tasks = n_tasks_of(wo, n_threads, n_tok)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        x = arg(args, OUT.x)
        matmul_task(wo, task, n_threads, n_tok, a, packs, x, rows, ADD, scratch)
        finish(control, 1)
    wait(control, 1, epoch, n_tasks)


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

    n_pack = 0 if arg(args, PREDICT.is_packed) or n % 32 else n_tok
    while True:
        t = take(control, 0, epoch, n_pack)
        if t < 0:
            break
        pack(x + t * n * 4, n, packs + t * pack_stride(n), ones)
        finish(control, 0)
    if not wait(control, 0, epoch, n_pack):
        return

    n_tasks = n_tasks_of(fc1, n_threads, n_tok)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        matmul_task(fc1, task, n_threads, n_tok, x, packs, hidden, rank, STORE, scratch)
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
            pack(row, rank, hidden_packs + t * pack_stride(rank), ones)
        finish(control, 2)
    if not wait(control, 2, epoch, n_tok):
        return

    # One threshold for each sequence, in rows of one for each layer; ours is the first.
    thresholds, stride = arg(args, PREDICT.thresholds), 4 * arg(args, PREDICT.n_layer)
    n_ff, scores, mask = arg(fc2, MATRIX.rows), arg(args, PREDICT.scores), arg(args, PREDICT.mask)
    n_tasks, size = n_tasks_of(fc2, n_threads, n_tok), rows_per_task(n_ff, rank, n_threads, n_tok)
    while True:
        task = take(control, 3, epoch, n_tasks)
        if task < 0:
            break
        matmul_task(fc2, task, n_threads, n_tok, hidden, hidden_packs, scores, n_ff, STORE, scratch)
        start, end = task * size, min(task * size + size, n_ff)
        for t in range(n_tok):
            sequence = np.int64(load_i32(arg(args, PREDICT.rows) + 4 * t))
            threshold, at = load_f32(thresholds + sequence * stride), t * n_ff
            for i in range(start, end - 15, 16):
                score = load_f32x16(scores + 4 * (at + i))
                store_at_least(mask + at + i, score, splat(threshold))
            for i in range(start + (end - start) // 16 * 16, end):
                is_taken = load_f32(scores + 4 * (at + i)) >= threshold
                store_u8(mask + at + i, np.uint8(is_taken))
        finish(control, 3)
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
    scratch = arg(args, HEAD.scratch) + thread * arg(args, HEAD.scratch_bytes)
    output = args + 8 * HEAD.output
    n_threads, rows = arg(args, HEAD.n_threads), arg(output, MATRIX.rows)
    n_tasks = n_tasks_of(output, n_threads, n_out)
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        logits = arg(args, HEAD.logits)
        matmul_task(output, task, n_threads, n_out, h, packs, logits, rows, STORE, scratch)
        finish(control, 1)
    wait(control, 1, epoch, n_tasks)
