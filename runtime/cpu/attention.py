"""Attention: q, k, v with rope, the append to the paged cache, and the softmax over it."""

from __future__ import annotations

import math

import numpy as np

from ..cache import PAGE
from .block import MATRIX, layout
from .elementwise import exp_below, peak_of, rope_head, scale_by
from .gemm import panel_bytes, panel_size
from .jit import arg, function, inline, job
from .linear import norm_task
from .matmul import STORE, WORK, add_rows, add_to, first_task, matmul_task, n_tasks_of, task_data
from .pool import finish, take, wait
from .rows import F16, fill_zero, pack_stride
from .simd import (
    call_axpys,
    call_dots,
    call_multiply,
    call_unpack,
    call_widen,
    load_f32,
    load_f32x16,
    load_i32,
    mul,
    splat,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
    store_i32,
)

QKV = layout(
    "counts positions rows pages pages_cols x norm:NORM n_embd h packs ones q k v "
    "n_head n_head_kv head_dim rope rope_half is_neox k_cache v_cache kv_type "
    "scratch scratch_bytes n_threads wq:MATRIX wk:MATRIX wv:MATRIX"
)


@inline
def _slot(pages, pages_cols, row, position, head, n_head_kv, head_bytes):
    """Return the byte offset in a layer's cache [n_pages][n_head_kv][32][head_dim]."""
    page = np.int64(load_i32(pages + 4 * (row * pages_cols + position // PAGE)))
    return ((page * n_head_kv + head) * PAGE + position % PAGE) * head_bytes


@inline
def _store(kv_type, cache, x, n):
    """Store float32 x [n] in the cache's type."""
    if kv_type == F16:
        for i in range(0, n - 15, 16):
            store_f16x16(cache + 2 * i, load_f32x16(x + 4 * i))
        for i in range(n // 16 * 16, n):
            store_f16(cache + 2 * i, load_f32(x + 4 * i))
    else:
        for i in range(n):
            store_f32(cache + 4 * i, load_f32(x + 4 * i))


@inline
def _part(args, task, n_q, n_k):
    """Return (matrix, where its products go, which of its tasks): q comes first, then k and v."""
    if task < n_q:
        return args + 8 * QKV.wq, arg(args, QKV.q), task
    if task < n_q + n_k:
        return args + 8 * QKV.wk, arg(args, QKV.k), task - n_q
    return args + 8 * QKV.wv, arg(args, QKV.v), task - n_q - n_k


@job
def qkv(args, control, epoch, thread):
    """q, k, v = norm of x @ wq, wk, wv; rope on q and k; k, v into the cache.

    q [n_tok, n_head * head_dim]; one task of the last phase is a token and a kv head.
    """
    n_tok = np.int64(load_i32(arg(args, QKV.counts)))
    n = arg(args, QKV.n_embd)
    h, packs = arg(args, QKV.h), arg(args, QKV.packs)
    wq, wk = args + 8 * QKV.wq, args + 8 * QKV.wk
    scratch = arg(args, QKV.scratch) + thread * arg(args, QKV.scratch_bytes)
    n_threads = arg(args, QKV.n_threads)
    n_q, n_k = n_tasks_of(wq, n_threads, n_tok), n_tasks_of(wk, n_threads, n_tok)
    n_tasks = n_q + 2 * n_k
    task = first_task(control, 1, epoch, n_tasks, wq, n_threads, n_tok)
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        norm_task(
            args + 8 * QKV.norm,
            arg(args, QKV.x) + t * n * 4,
            n,
            h + t * n * 4,
            packs + t * pack_stride(n),
            arg(args, QKV.ones),
        )
        finish(control, 0)
    if not wait(control, 0, epoch, n_tok):
        return

    while task >= 0:
        following = take(control, 1, epoch, n_tasks)
        w, y, part = _part(args, task, n_q, n_k)
        next_w, _, next_part = _part(args, max(following, task), n_q, n_k)
        ahead, rows = task_data(next_w, next_part, n_threads, n_tok), arg(w, MATRIX.rows)
        matmul_task(w, part, ahead, n_threads, n_tok, h, packs, y, rows, STORE, scratch)
        finish(control, 1)
        task = following
    if not wait(control, 1, epoch, n_tasks):
        return

    n_head, n_head_kv = arg(args, QKV.n_head), arg(args, QKV.n_head_kv)
    head_dim, half = arg(args, QKV.head_dim), arg(args, QKV.rope_half)
    kv_type, is_neox = arg(args, QKV.kv_type), arg(args, QKV.is_neox) != 0
    group = n_head // n_head_kv
    head_bytes = head_dim * (2 if kv_type == F16 else 4)
    n_tasks = n_tok * n_head_kv
    while True:
        task = take(control, 2, epoch, n_tasks)
        if task < 0:
            break
        t, head = task // n_head_kv, task % n_head_kv
        position = np.int64(load_i32(arg(args, QKV.positions) + 4 * t))
        row = np.int64(load_i32(arg(args, QKV.rows) + 4 * t))
        table = arg(args, QKV.rope) + position * half * 8
        for i in range(head * group, (head + 1) * group):
            rope_head(arg(args, QKV.q) + 4 * head_dim * (t * n_head + i), table, half, is_neox)
        k = arg(args, QKV.k) + 4 * head_dim * task
        rope_head(k, table, half, is_neox)
        slot = _slot(
            arg(args, QKV.pages),
            arg(args, QKV.pages_cols),
            row,
            position,
            head,
            n_head_kv,
            head_bytes,
        )
        _store(kv_type, arg(args, QKV.k_cache) + slot, k, head_dim)
        _store(
            kv_type, arg(args, QKV.v_cache) + slot, arg(args, QKV.v) + 4 * head_dim * task, head_dim
        )
        finish(control, 2)
    wait(control, 2, epoch, n_tasks)


ATTEND = layout(
    "counts positions rows pages pages_cols q a n_head n_head_kv head_dim scale k_cache v_cache "
    "kv_type dots unpack multiply axpys widen partial n_splits_max scratch scratch_bytes n_threads"
)

BLOCK = 16  # tokens in one task
SPLIT = 256  # earlier tokens in one task, for a token on its own
SCORES = SPLIT + 16  # room for those of one head
_TASKS = 2  # of heads, for each thread, where there are so many
CHUNK = 128  # earlier tokens at a time, for several tokens of a text: whole pages


def attend_bytes(n_head: int, n_head_kv: int, head_dim: int, n_tok: int) -> int:
    """Return the scratch that attend needs behind matmul.WORK."""
    single = 4 * n_head * SCORES
    if n_tok == 1:
        return single
    n_query = BLOCK * n_head // n_head_kv
    out = 64 * (n_query + 15)  # multiply takes tokens in tiles
    several = panel_bytes(head_dim) + out + n_query * (12 + 4 * CHUNK) + 4 * CHUNK * head_dim
    return max(single, several)


@inline
def _partial_size(head_dim):
    """Return the float32 that one head has for one split: its sum, then peak and total."""
    return head_dim + 16


partial_floats = _partial_size.py_func


@inline
def _run(args, cache, row, position, head):
    """Return where a head's rows lie in a cache, from a position to the end of its page."""
    n_head_kv, head_dim = arg(args, ATTEND.n_head_kv), arg(args, ATTEND.head_dim)
    head_bytes = head_dim * (2 if arg(args, ATTEND.kv_type) == F16 else 4)
    pages, pages_cols = arg(args, ATTEND.pages), arg(args, ATTEND.pages_cols)
    return cache + _slot(pages, pages_cols, row, position, head, n_head_kv, head_bytes)


@inline
def _next_run(args, cache, row, position, head, heads, end, then):
    """Return where the run is that is read next: of the next head, or page, or else `then`."""
    if head + 1 < heads[1]:
        return _run(args, cache, row, position, head + 1)
    if position + PAGE < end:
        return _run(args, cache, row, position + PAGE, heads[0])
    return then


@inline
def _partial(args, row, head, split):
    """Return where a sequence's head keeps what came of a split."""
    n = _partial_size(arg(args, ATTEND.head_dim))
    index = row * arg(args, ATTEND.n_head) + head
    return arg(args, ATTEND.partial) + 4 * n * (index * arg(args, ATTEND.n_splits_max) + split)


@inline
def _sum_of(args, t, row, head, split, length):
    """Return where what comes of a split is summed: in `a` itself where there is but one."""
    if length > SPLIT:
        return _partial(args, row, head, split)
    n_head, head_dim = arg(args, ATTEND.n_head), arg(args, ATTEND.head_dim)
    return arg(args, ATTEND.a) + 4 * head_dim * (t * n_head + head)


@inline
def _over_runs(args, is_k, t, heads, row, split, length, then, scores, scratch):
    """scores = q . K, or else what _sum_of says += scores . V, over a split; `then`: read next.

    Page after page, since heads are neighbours in it: long runs are what is read fast.
    """
    n_head, n_head_kv = arg(args, ATTEND.n_head), arg(args, ATTEND.n_head_kv)
    head_dim, group = arg(args, ATTEND.head_dim), n_head // n_head_kv
    head_bytes = head_dim * (2 if arg(args, ATTEND.kv_type) == F16 else 4)
    cache = arg(args, ATTEND.k_cache) if is_k else arg(args, ATTEND.v_cache)
    dots, axpys = arg(args, ATTEND.dots), arg(args, ATTEND.axpys)
    start, end = split * SPLIT, min((split + 1) * SPLIT, length)
    for j in range(start, end, PAGE):
        count = min(PAGE, end - j)
        for head in range(heads[0], heads[1]):
            run = _run(args, cache, row, j, head)
            following = _next_run(args, cache, row, j, head, heads, end, then)
            for i in range(head * group, (head + 1) * group):
                mine = scores + 4 * (SCORES * i + j - start)
                if is_k:
                    q = arg(args, ATTEND.q) + 4 * head_dim * (t * n_head + i)
                    call_dots(
                        dots, run, head_bytes, head_dim, 0, count, following, 0, q, 0, scratch, mine
                    )
                else:
                    a = _sum_of(args, t, row, i, split, length)
                    call_axpys(axpys, run, head_bytes, head_dim, 0, count, following, 0, mine, a)


@function
def _single(args, t, heads, split, scratch):
    """One token and kv heads (first, end) over the SPLIT earlier tokens of a split.

    a, or, where there are several splits, partial = sum of exp(score - peak) * v; peak; total.
    """
    n_head_kv, head_dim = arg(args, ATTEND.n_head_kv), arg(args, ATTEND.head_dim)
    group, scale = arg(args, ATTEND.n_head) // n_head_kv, load_f32(arg(args, ATTEND.scale))
    row = np.int64(load_i32(arg(args, ATTEND.rows) + 4 * t))
    length = np.int64(load_i32(arg(args, ATTEND.positions) + 4 * t)) + 1
    start, n = split * SPLIT, min(SPLIT, length - split * SPLIT)
    first, last = heads[0] * group, heads[1] * group  # of q
    scores = scratch + WORK - 4 * SCORES * first
    v = _run(args, arg(args, ATTEND.v_cache), row, start, heads[0])
    _over_runs(args, True, t, heads, row, split, length, v, scores, scratch)
    for i in range(first, last):
        mine, a = scores + 4 * SCORES * i, _sum_of(args, t, row, i, split, length)
        scale_by(mine, n, scale)
        peak = peak_of(mine, n)
        total = exp_below(mine, n, peak)
        fill_zero(a, head_dim)
        if length > SPLIT:
            store_f32(a + 4 * head_dim, peak)
            store_f32(a + 4 * head_dim + 4, total)
        else:
            scale_by(mine, n, np.float32(1) / total)
    # K of the task that this thread is likely to take next.
    n_heads = heads[1] - heads[0]
    next_head = min(heads[0] + arg(args, ATTEND.n_threads) * n_heads, n_head_kv - 1)
    k = _run(args, arg(args, ATTEND.k_cache), row, start, next_head)
    _over_runs(args, False, t, heads, row, split, length, k, scores, scratch)


@function
def _combine(args, t):
    """a of a token on its own, from its splits: sum of e^(peak - highest) * partial / totals."""
    n_head, head_dim = arg(args, ATTEND.n_head), arg(args, ATTEND.head_dim)
    row = np.int64(load_i32(arg(args, ATTEND.rows) + 4 * t))
    length = np.int64(load_i32(arg(args, ATTEND.positions) + 4 * t)) + 1
    n_splits = (length + SPLIT - 1) // SPLIT
    for i in range(n_head):
        a = arg(args, ATTEND.a) + 4 * head_dim * (t * n_head + i)
        highest = load_f32(_partial(args, row, i, 0) + 4 * head_dim)
        for split in range(1, n_splits):
            highest = max(highest, load_f32(_partial(args, row, i, split) + 4 * head_dim))
        total = np.float32(0)
        fill_zero(a, head_dim)
        for split in range(n_splits):
            part = _partial(args, row, i, split)
            factor = np.float32(math.exp(load_f32(part + 4 * head_dim) - highest))
            total += factor * load_f32(part + 4 * head_dim + 4)
            scale_by(part, head_dim, factor)
            add_to(a, part, 0, head_dim)
        scale_by(a, head_dim, np.float32(1) / total)


@function
def _several(args, first, last, head, scratch):
    """Tokens first to last - 1 of one text, for one kv head: K and V are widened once for all.

    Softmax as it goes: with every CHUNK of earlier tokens the sums so far are scaled to the new
    peak (Milakov and Gimelshein, arXiv 1805.02867).
    """
    n_head, n_head_kv = arg(args, ATTEND.n_head), arg(args, ATTEND.n_head_kv)
    head_dim, scale = arg(args, ATTEND.head_dim), load_f32(arg(args, ATTEND.scale))
    head_bytes = head_dim * (2 if arg(args, ATTEND.kv_type) == F16 else 4)
    row = np.int64(load_i32(arg(args, ATTEND.rows) + 4 * first))
    position = np.int64(load_i32(arg(args, ATTEND.positions) + 4 * first))
    group = n_head // n_head_kv
    n_query, end = (last - first) * group, position + last - first
    panel = scratch + WORK
    out = panel + panel_size(head_dim)  # f32 [n_query][16]
    queries = out + 64 * ((n_query + 15) // 16 * 16)  # i32 [n_query]: which of q [n_tok * n_head]
    peaks = queries + 4 * n_query
    totals = peaks + 4 * n_query
    scores = totals + 4 * n_query  # f32 [n_query][CHUNK]
    values = scores + 4 * CHUNK * n_query  # f32 [CHUNK][head_dim]
    for i in range(n_query):
        query = (first + i // group) * n_head + head * group + i % group
        store_i32(queries + 4 * i, np.int32(query))
        store_f32(peaks + 4 * i, np.float32(-3.0e38))
        store_f32(totals + 4 * i, np.float32(0))
        fill_zero(arg(args, ATTEND.a) + 4 * head_dim * query, head_dim)
    scales = splat(scale)
    for start in range(0, end, CHUNK):
        n = min(CHUNK, end - start)
        for j in range(0, n, 16):
            k = _run(args, arg(args, ATTEND.k_cache), row, start + j, head)
            count = min(16, n - j)
            call_unpack(arg(args, ATTEND.unpack), k, head_bytes, head_dim, count, panel, 1)
            q, multiply = arg(args, ATTEND.q), arg(args, ATTEND.multiply)
            call_multiply(multiply, panel, head_dim, q, 0, queries, n_query, out)
            for i in range(n_query):
                source, target = out + 64 * i, scores + 4 * (CHUNK * i + j)
                store_f32x16(target, mul(load_f32x16(source), scales))
        for j in range(0, n, PAGE):
            v = _run(args, arg(args, ATTEND.v_cache), row, start + j, head)
            count = min(PAGE, n - j)
            to, size = values + 4 * head_dim * j, 4 * head_dim
            call_widen(arg(args, ATTEND.widen), v, head_bytes, head_dim, count, to, size)
        for i in range(n_query):
            n_seen = min(n, position + i // group + 1 - start)
            if n_seen > 0:
                mine = scores + 4 * CHUNK * i
                query = np.int64(load_i32(queries + 4 * i))
                a = arg(args, ATTEND.a) + 4 * head_dim * query
                before = load_f32(peaks + 4 * i)
                peak = max(before, peak_of(mine, n_seen))
                factor = np.float32(math.exp(before - peak))
                total = exp_below(mine, n_seen, peak)
                store_f32(peaks + 4 * i, peak)
                store_f32(totals + 4 * i, load_f32(totals + 4 * i) * factor + total)
                if factor != 1:
                    scale_by(a, head_dim, factor)
                add_rows(a, head_dim, values, mine, n_seen)
    for i in range(n_query):
        a = arg(args, ATTEND.a) + 4 * head_dim * np.int64(load_i32(queries + 4 * i))
        scale_by(a, head_dim, np.float32(1) / load_f32(totals + 4 * i))


@inline
def _run_end(args, t, n_tok):
    """Return the end of the tokens from t on that belong to the same text, within a BLOCK."""
    row, end = load_i32(arg(args, ATTEND.rows) + 4 * t), t + 1
    last = min((t // BLOCK + 1) * BLOCK, n_tok)
    while end < last and load_i32(arg(args, ATTEND.rows) + 4 * end) == row:
        end += 1
    return end


@inline
def _is_alone(args, t, n_tok):
    """Whether a token is the only one of its text: blocks of tokens must not change a bit."""
    rows = arg(args, ATTEND.rows)
    row = load_i32(rows + 4 * t)
    if t > 0 and load_i32(rows + 4 * t - 4) == row:
        return False
    return t + 1 == n_tok or load_i32(rows + 4 * t + 4) != row


@job
def attend(args, control, epoch, thread):
    """a = softmax(q . K * scale) . V for each token over its sequence up to itself.

    A task is a BLOCK of tokens, kv heads with their groups of q heads, and, for texts with one new
    token, a SPLIT of their context, so that a long one occupies all threads. Reads 2 * head_dim
    numbers of the cache for every earlier token, once for all tokens of a text in the block.
    """
    n_tok = np.int64(load_i32(arg(args, ATTEND.counts)))
    n_head_kv = arg(args, ATTEND.n_head_kv)
    scratch = arg(args, ATTEND.scratch) + thread * arg(args, ATTEND.scratch_bytes)
    longest = 0
    for t in range(n_tok):
        longest = max(longest, np.int64(load_i32(arg(args, ATTEND.positions) + 4 * t)) + 1)
    n_splits, n_blocks = (longest + SPLIT - 1) // SPLIT, (n_tok + BLOCK - 1) // BLOCK
    n_heads = max(n_head_kv // (_TASKS * arg(args, ATTEND.n_threads)), 1)
    n_pieces = (n_head_kv + n_heads - 1) // n_heads
    n_tasks = n_blocks * n_pieces * n_splits
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        first, task = task % n_pieces * n_heads, task // n_pieces
        heads = first, min(first + n_heads, n_head_kv)
        # The last blocks have seen most: they go first, so that no thread waits long at the end.
        split, t = task % n_splits, (n_blocks - 1 - task // n_splits) * BLOCK
        block_end = min(t + BLOCK, n_tok)
        while t < block_end:
            end = _run_end(args, t, n_tok)
            if not _is_alone(args, t, n_tok):
                for head in range(heads[0], heads[1] if split == 0 else 0):
                    _several(args, t, end, head, scratch)
            elif np.int64(load_i32(arg(args, ATTEND.positions) + 4 * t)) >= split * SPLIT:
                _single(args, t, heads, split, scratch)
            t = end
        finish(control, 0)
    if not wait(control, 0, epoch, n_tasks):
        return

    n_tasks = n_blocks if n_splits > 1 else 0
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        t, block_end = task * BLOCK, min((task + 1) * BLOCK, n_tok)
        while t < block_end:
            end = _run_end(args, t, n_tok)
            is_long = np.int64(load_i32(arg(args, ATTEND.positions) + 4 * t)) >= SPLIT
            if is_long and _is_alone(args, t, n_tok):
                _combine(args, t)
            t = end
        finish(control, 1)
    wait(control, 1, epoch, n_tasks)
