"""Time the quantiser against gguf.quants on the same rows, in turn, medians of several runs.

    python -m powerinfer.tools.bench_quantize [--runs 7]

One core each; then the quantiser on all cores over a whole file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..quantize.encoder import convert_rows, quantize_file
from ..quantize.policy import Policy
from ..runtime.formats import GGMLType
from ..runtime.gguf_writer import GGUFWriter

ROWS, COLS = 4096, 4096


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    x = np.random.default_rng(0).standard_normal((ROWS, COLS)).astype(np.float16)
    raw, n = x.view(np.uint8), x.size / 1e6
    print("| rows 4096 x 4096 from f16, M weights/s | ours, 1 core | gguf.quants, 1 core | ratio |")
    print("|---|---|---|---|")
    for type_ in (GGMLType.Q4_0, GGMLType.Q8_0):
        theirs_type = gguf.GGMLQuantizationType(int(type_))
        convert_rows(GGMLType.F16, raw, type_, "warm-up")
        pairs = [
            (
                _seconds(partial(convert_rows, GGMLType.F16, raw, type_, "x")),
                _seconds(partial(gguf.quants.quantize, x.astype(np.float32), theirs_type)),
            )
            for _ in range(runs)
        ]
        ours, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"| {type_.name} | {n / ours:.0f} | {n / theirs:.0f} | {ratio:.1f} |")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "x.f16.gguf"
        with GGUFWriter(source, "llama") as writer:
            for i in range(8):
                writer.declare(f"blk.{i}.x.weight", GGMLType.F16, x.shape)
            for i in range(8):
                writer.write(f"blk.{i}.x.weight", x)
        target = Path(folder) / "x.q4_0.gguf"
        times = [
            _seconds(lambda: quantize_file(source, target, Policy(GGMLType.Q4_0)))
            for _ in range(runs)
        ]
    rate = 8 * n / statistics.median(times)
    print(f"\na file of 8 such tensors to Q4_0, {os.cpu_count()} cores: {rate:.0f} M weights/s")


if __name__ == "__main__":
    main()
