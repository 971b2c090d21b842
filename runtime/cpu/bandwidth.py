"""How fast this machine reads memory: the roof over everything that decodes."""

from __future__ import annotations

import time

import numpy as np

from .block import address, build, layout
from .jit import arg, job
from .pool import Pool, finish, program, take, wait
from .rows import SLACK, fetch_far, near_rows, row_number
from .simd import load_i32x16, or_i32, prefetch, store_i32x16

SIZE = 512 << 20  # bytes: several times what caches hold
_PIECE, _SMALL_PIECE = 1 << 18, 1 << 14
_READ = layout("data piece n_tasks out")


@job
def read_all(args, control, epoch, thread):
    """out = all bits of `data` or-ed together; reads `piece` bytes a task."""
    data, n_tasks, out = arg(args, _READ.data), arg(args, _READ.n_tasks), arg(args, _READ.out)
    piece = arg(args, _READ.piece)
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        at = data + task * piece
        a, b = load_i32x16(at), load_i32x16(at + 64)
        c, d = load_i32x16(at + 128), load_i32x16(at + 192)
        for i in range(at + 256, at + piece, 256):
            for line in range(0, 256, 64):
                prefetch(i + 4096 + line)
            a, b = or_i32(a, load_i32x16(i)), or_i32(b, load_i32x16(i + 64))
            c, d = or_i32(c, load_i32x16(i + 128)), or_i32(d, load_i32x16(i + 192))
        store_i32x16(out + 64 * task, or_i32(or_i32(a, b), or_i32(c, d)))
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)


class Reader:
    """Memory to read: `data` (uint8 [n], at most SIZE bytes of it), or SIZE bytes of our own."""

    def __init__(self, data: np.ndarray | None = None) -> None:
        # Ours: not zeros, which might all be one page.
        self._data = np.ones(SIZE, np.uint8) if data is None else data[:SIZE]
        piece = _PIECE if len(self._data) >= 64 * _PIECE else _SMALL_PIECE
        n_tasks = len(self._data) // piece
        self.size = n_tasks * piece
        self._out = np.zeros(n_tasks * 64, np.uint8)
        self._block = build(_READ, data=self._data, piece=piece, n_tasks=n_tasks, out=self._out)

    def measure(self, n_threads: int, times: int = 5) -> float:
        """Return the best of some reads of it all, in bytes per second (0 for no bytes)."""
        pool, best = Pool(n_threads), float("inf")
        jobs = program([(read_all.address, address(self._block))])
        for _ in range(times):
            started = time.perf_counter()
            pool.run(jobs)
            best = min(best, time.perf_counter() - started)
        pool.close()
        return self.size / best


_READ_ROWS = layout("data row_bytes rows n_rows size out")


@job
def read_rows(args, control, epoch, thread):
    """out = all bits of listed rows or-ed together; reads n_rows * row_bytes."""
    data, row_bytes = arg(args, _READ_ROWS.data), arg(args, _READ_ROWS.row_bytes)
    rows, n_rows = arg(args, _READ_ROWS.rows), arg(args, _READ_ROWS.n_rows)
    size, out = arg(args, _READ_ROWS.size), arg(args, _READ_ROWS.out)
    n_tasks, near = (n_rows + size - 1) // size, near_rows(row_bytes, 4)
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        bits = load_i32x16(out + 64 * thread)
        for i in range(task * size, min(task * size + size, n_rows)):
            at = data + row_number(rows, i) * row_bytes
            # Three times, like rows.ask: once, they come at 16 GB/s to a core, not at 28.
            for ahead in (4 * near, 2 * near, near):
                fetch_far(data + row_number(rows, i + ahead) * row_bytes, row_bytes)
            for line in range(0, row_bytes, 64):
                bits = or_i32(bits, load_i32x16(at + min(line, row_bytes - 64)))
        store_i32x16(out + 64 * thread, bits)
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)


class RowReader:
    """Reads the listed rows of a matrix `data` (uint8 [rows, 64 bytes or more]), `size` a task.

    `job` is for Pool.run.
    """

    def __init__(self, data: np.ndarray, rows: np.ndarray, size: int, n_threads: int) -> None:
        self._rows = np.concatenate([rows, np.zeros(SLACK)]).astype(np.int32)
        self.bits = np.zeros(64 * n_threads, np.uint8)  # of all that was read, or-ed together
        self._block = build(
            _READ_ROWS,
            data=data,
            row_bytes=data.shape[1],
            rows=self._rows,
            n_rows=len(rows),
            size=size,
            out=self.bits,
        )
        self.job = read_rows.address, address(self._block)
