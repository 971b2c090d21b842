"""How close decoding comes to merely reading the same bytes, in one run.

    python -m powerinfer.tools.bench_rows MODEL [-t 1,2] [-n 9]

Dense rows: one token times a Q4_0 matrix larger than all caches, beside reading as many bytes.
Sparse FFN: the FFNs of some tokens that a model decoded, more than caches hold, run again one
after the other, beside reading the rows that they used (of the decider, of up, of down) in the same
order. In turns; medians over rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backend import Backend
from ..runtime.cache import Sequence
from ..runtime.config import RunOptions
from ..runtime.cpu import ffn, linear, matmul
from ..runtime.cpu.bandwidth import SIZE, Reader, RowReader
from ..runtime.cpu.block import address, build, matrix
from ..runtime.cpu.operators import CPU
from ..runtime.cpu.pool import Pool, program
from ..runtime.cpu.rows import pack_bytes
from ..runtime.engine import Engine
from ..runtime.formats import GGMLType
from ..runtime.gguf import Tensor
from ..runtime.model import Watcher
from ..runtime.step import FIRED

WARM_UP = 4  # tokens before anything is timed
COLS = 4096  # of the dense matrix
TASK = 32  # rows that a thread reads at a time, about as many as of an FFN's


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def dense_rows(n_threads: int, rounds: int) -> tuple[float, float]:
    """Return bytes a second of a product with SIZE bytes of Q4_0 rows, and of a plain read."""
    row_bytes = COLS // 32 * 18
    rows = SIZE // row_bytes
    data = np.random.default_rng(0).integers(0, 255, (rows, row_bytes), np.uint8)
    data.reshape(-1, 18)[:, 1] &= 0x3B  # halves that are finite
    weights = Tensor("w", GGMLType.Q4_0, (rows, COLS), data)
    scratch_bytes = matmul.scratch_bytes(COLS, 1)
    block = build(
        linear.OUT,
        counts=(counts := np.ones(1, np.int32)),
        a=(a := np.ones(COLS, np.float32)),
        packs=(packs := np.zeros(pack_bytes(COLS) + 64, np.uint8)[-pack_bytes(COLS) :]),
        ones=(ones := np.ones(64, np.int8)),
        x=(x := np.zeros(rows, np.float32)),
        scratch=(scratch := np.zeros(n_threads * scratch_bytes, np.uint8)),
        scratch_bytes=scratch_bytes,
        n_threads=n_threads,
        wo=matrix(weights),
    )
    keep = (counts, a, packs, ones, x, scratch)
    pool, reader = Pool(n_threads), Reader(data.reshape(-1))
    jobs = program([(linear.out_add.address, address(block))])
    pool.run(jobs)
    times, rates = [], []
    for _ in range(rounds):
        times.append(_seconds(lambda: pool.run(jobs)))
        rates.append(reader.measure(n_threads, times=1))
    pool.close()
    del keep
    return data.size / statistics.median(times), statistics.median(rates)


class _Recorder(Watcher):
    """Keeps what the FFNs of a pass need to be run again, and which rows they read."""

    def __init__(self) -> None:
        self.ffns: list[np.ndarray] = []  # argument blocks
        self.rows: list[tuple[Tensor, np.ndarray]] = []
        self.keep: list[np.ndarray] = []

    def before_ffn(self, ops: Backend, il: int) -> None:
        assert isinstance(ops, CPU)
        block, b = ops.ffn_block(il).copy(), ops.plan.buffers
        packs = np.zeros(pack_bytes(b.h.shape[1]) + 64, np.uint8)
        packs = packs[-packs.ctypes.data % 64 :][: len(packs) - 64]
        ctypes.memmove(packs.ctypes.data, int(block[ffn.FFN.packs]), len(packs))
        mask, h = b.mask[0].copy(), b.h[0].copy()
        for name, array in (("mask", mask), ("h", h), ("packs", packs)):
            block[getattr(ffn.FFN, name)] = address(array)
            self.keep.append(array)
        self.ffns.append(block)

    def after_ffn(self, ops: Backend, il: int) -> None:
        layer, b = ops.plan.weights.layers[il], ops.plan.buffers
        mask, fired = b.mask[0], b.fired[0]
        decider = np.flatnonzero(mask) if ops.plan.mode == "predicted" else np.arange(len(mask))
        self.rows.append((layer.decider, decider))
        if layer.up is not None:
            self.rows.append((layer.up, np.flatnonzero(fired)))
        assert layer.down_t is not None
        self.rows.append((layer.down_t, np.flatnonzero(fired == FIRED)))


def sparse_ffn(model: Path, n_threads: int, rounds: int) -> tuple[float, float]:
    """Return bytes a second of a model's FFNs at decode, and of reading the same rows."""
    options = RunOptions(threads=n_threads, backend="cpu", adapt=False, context=64)
    with Engine(model, options) as engine:
        recorder, draw = _Recorder(), np.random.default_rng(22)
        sequence, counts = Sequence(), engine.no_counts()
        size = 0
        while size < SIZE:
            with engine.watched(recorder if sequence.length >= WARM_UP else None):
                engine.feed([(sequence, [int(draw.integers(engine.config.n_vocab))])], [0], counts)
            size = sum(len(rows) * tensor.data.shape[1] for tensor, rows in recorder.rows)
        readers = [RowReader(t.data, rows, TASK, n_threads) for t, rows in recorder.rows]
        ffns = program([(ffn.ffn.address, address(block)) for block in recorder.ffns])
        reads, pool = program([reader.job for reader in readers]), Pool(n_threads)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(size / _seconds(lambda: pool.run(ffns)))
            theirs.append(size / _seconds(lambda: pool.run(reads)))
        pool.close()
        engine.release(sequence)
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-t", "--threads", default="1,2")
    parser.add_argument("-n", "--rounds", type=int, default=9, help="of each")
    args = parser.parse_args()
    print("| what | threads | GB/s | reading the same, GB/s | of it |")
    print("|---|---|---|---|---|")
    for n_threads in map(int, args.threads.split(",")):
        for name, (ours, reading) in (
            ("dense Q4_0 rows", dense_rows(n_threads, args.rounds)),
            (f"FFNs of {args.model.name}", sparse_ffn(args.model, n_threads, args.rounds)),
        ):
            rates = f"{ours / 1e9:.1f} | {reading / 1e9:.1f} | {ours / reading:.0%}"
            print(f"| {name} | {n_threads} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
