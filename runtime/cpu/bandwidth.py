"""How fast this machine reads memory: the roof over everything that decodes."""

from __future__ import annotations

import time

import numpy as np

from .block import address, build, layout
from .jit import arg, job
from .pool import Pool, finish, program, take, wait
from .simd import load_i32x16, or_i32, prefetch, store_i32x16

SIZE = 512 << 20  # bytes: several times what caches hold
_PIECE = 1 << 18
_READ = layout("data n_tasks out")


@job
def read_all(args, control, epoch, thread):
    """out = all bits of `data` or-ed together; reads _PIECE bytes a task."""
    data, n_tasks, out = arg(args, _READ.data), arg(args, _READ.n_tasks), arg(args, _READ.out)
    while True:
        task = take(control, 0, epoch, n_tasks)
        if task < 0:
            break
        at = data + task * _PIECE
        a, b = load_i32x16(at), load_i32x16(at + 64)
        c, d = load_i32x16(at + 128), load_i32x16(at + 192)
        for i in range(at + 256, at + _PIECE, 256):
            for line in range(0, 256, 64):
                prefetch(i + 4096 + line)
            a, b = or_i32(a, load_i32x16(i)), or_i32(b, load_i32x16(i + 64))
            c, d = or_i32(c, load_i32x16(i + 128)), or_i32(d, load_i32x16(i + 192))
        store_i32x16(out + 64 * task, or_i32(or_i32(a, b), or_i32(c, d)))
        finish(control, 0)
    wait(control, 0, epoch, n_tasks)


class Reader:
    """SIZE bytes of memory to read."""

    def __init__(self) -> None:
        self._data = np.ones(SIZE, np.uint8)  # zeros might all be one page
        self._out = np.zeros(SIZE // _PIECE * 64, np.uint8)
        self._block = build(_READ, data=self._data, n_tasks=SIZE // _PIECE, out=self._out)

    def measure(self, n_threads: int, times: int = 5) -> float:
        """Return the best of some reads of it all, in bytes per second."""
        pool, best = Pool(n_threads), float("inf")
        jobs = program([(read_all.address, address(self._block))])
        for _ in range(times):
            started = time.perf_counter()
            pool.run(jobs)
            best = min(best, time.perf_counter() - started)
        pool.close()
        return SIZE / best
