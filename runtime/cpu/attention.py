"""Attention: q, k, v with rope, the append to the paged cache, and the softmax over it."""

from __future__ import annotations

import numpy as np

from ..cache import PAGE
from .block import MATRIX, layout
from .elementwise import rope_head, softmax_numerators
from .jit import arg, inline, job
from .linear import STORE, WORK, matmul_task, n_tasks_of, norm_task
from .pool import finish, take, wait
from .rows import AHEAD, F16, F32, axpy_float, dot_float, fill_zero
from .simd import (
    load_f32,
    load_f32x16,
    load_i32,
    mul,
    splat,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
)

QKV = layout(
    "counts positions rows pages pages_cols x norm:NORM n_embd h packs pack_bytes ones q k v "
    "n_head n_head_kv head_dim rope rope_half is_neox k_cache v_cache kv_type "
    "scratch scratch_bytes wq:MATRIX wk:MATRIX wv:MATRIX"
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


@job
def qkv(args, control, epoch, thread):
    """q, k, v = norm of x @ wq, wk, wv; rope on q and k; k, v into the cache.

    q [n_tok, n_head * head_dim]; one task of the last phase is a token and a kv head.
    """
    n_tok = load_i32(arg(args, QKV.counts))
    n = arg(args, QKV.n_embd)
    h, packs, size = arg(args, QKV.h), arg(args, QKV.packs), arg(args, QKV.pack_bytes)
    while True:
        t = take(control, 0, epoch, n_tok)
        if t < 0:
            break
        norm_task(
            args + 8 * QKV.norm,
            arg(args, QKV.x) + t * n * 4,
            n,
            h + t * n * 4,
            packs + t * size,
            arg(args, QKV.ones),
        )
        finish(control, 0)
    if not wait(control, 0, epoch, n_tok):
        return

    wq, wk, wv = args + 8 * QKV.wq, args + 8 * QKV.wk, args + 8 * QKV.wv
    scratch = arg(args, QKV.scratch) + thread * arg(args, QKV.scratch_bytes)
    n_q, n_k = n_tasks_of(wq), n_tasks_of(wk)
    n_tasks = n_q + 2 * n_k
    while True:
        task = take(control, 1, epoch, n_tasks)
        if task < 0:
            break
        w, y = wq, arg(args, QKV.q)
        if task >= n_q + n_k:
            w, y, task = wv, arg(args, QKV.v), task - n_q - n_k
        elif task >= n_q:
            w, y, task = wk, arg(args, QKV.k), task - n_q
        rows = arg(w, MATRIX.rows)
        matmul_task(w, task, n_tok, h, packs, size, y, rows, STORE, scratch)
        finish(control, 1)
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
    "kv_type scratch scratch_bytes"
)


@inline
def _dot_cached(kv_type, w, n, x):
    if kv_type == F16:
        return dot_float(F16, w, n, x, AHEAD)
    return dot_float(F32, w, n, x, AHEAD)


@inline
def _axpy_cached(kv_type, w, n, a, y):
    if kv_type == F16:
        axpy_float(F16, w, n, a, y, AHEAD)
    else:
        axpy_float(F32, w, n, a, y, AHEAD)


@job
def attend(args, control, epoch, thread):
    """a = softmax(q . K * scale) . V for each token over its sequence up to itself.

    A task is a token and a kv head with its group of q heads. Reads 2 * head_dim numbers of the
    cache for every earlier token; scores [length] lie in the thread's scratch.
    """
    n_tok = load_i32(arg(args, ATTEND.counts))
    n_head, n_head_kv = arg(args, ATTEND.n_head), arg(args, ATTEND.n_head_kv)
    head_dim, kv_type = arg(args, ATTEND.head_dim), arg(args, ATTEND.kv_type)
    k_cache, v_cache = arg(args, ATTEND.k_cache), arg(args, ATTEND.v_cache)
    pages, pages_cols = arg(args, ATTEND.pages), arg(args, ATTEND.pages_cols)
    scale = load_f32(arg(args, ATTEND.scale))
    scratch = arg(args, ATTEND.scratch) + thread * arg(args, ATTEND.scratch_bytes)
    scores = scratch + WORK
    group = n_head // n_head_kv
    head_bytes = head_dim * (2 if kv_type == F16 else 4)
    n_tasks = n_tok * n_head_kv
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        t, head = task // n_head_kv, task % n_head_kv
        row = np.int64(load_i32(arg(args, ATTEND.rows) + 4 * t))
        length = np.int64(load_i32(arg(args, ATTEND.positions) + 4 * t)) + 1
        for i in range(head * group, (head + 1) * group):
            q = arg(args, ATTEND.q) + 4 * head_dim * (t * n_head + i)
            a = arg(args, ATTEND.a) + 4 * head_dim * (t * n_head + i)
            for first in range(0, length, PAGE):
                k = k_cache + _slot(pages, pages_cols, row, first, head, n_head_kv, head_bytes)
                for j in range(first, min(first + PAGE, length)):
                    score = _dot_cached(kv_type, k, head_dim, q) * scale
                    store_f32(scores + 4 * j, score)
                    k += head_bytes
            total = softmax_numerators(scores, length)
            fill_zero(a, head_dim)
            for first in range(0, length, PAGE):
                v = v_cache + _slot(pages, pages_cols, row, first, head, n_head_kv, head_bytes)
                for j in range(first, min(first + PAGE, length)):
                    _axpy_cached(kv_type, v, head_dim, load_f32(scores + 4 * j), a)
                    v += head_bytes
            share = np.float32(1) / total
            shares = splat(share)
            for j in range(0, head_dim - 15, 16):
                store_f32x16(a + 4 * j, mul(load_f32x16(a + 4 * j), shares))
            for j in range(head_dim // 16 * 16, head_dim):
                store_f32(a + 4 * j, load_f32(a + 4 * j) * share)
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)
