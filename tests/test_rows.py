"""Row kernels of every format, on rows that end where readable memory ends.

Kernels work on raw addresses, so numba's bounds checks see nothing of them: here a read past the
end of a row meets a page that cannot be read, and ends the process.
"""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from conftest import random_blocks
from powerinfer.runtime.cpu import rows
from powerinfer.runtime.formats import (
    BLOCK_SIZES,
    COMPUTE_TYPES,
    INTEGER_DOT,
    GGMLType,
    decode,
    encode,
    round_activations,
)

FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
TYPES = sorted(COMPUTE_TYPES)


@numba.njit
def dot(type_, w, n, x, packed, scratch):
    return rows.dot(type_, w, n, x, packed, scratch)


@numba.njit
def axpy(type_, w, n, a, y):
    rows.axpy(type_, w, n, a, y)


@numba.njit
def pack(x, n, out, ones):
    rows.pack(x, n, out, ones)


class Guarded:
    """Bytes that end at a page which may be neither read nor written."""

    def __init__(self, n):
        page = mmap.PAGESIZE
        size = -(-n // page) * page
        self._map = mmap.mmap(-1, size + page)
        self._memory = np.frombuffer(self._map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        fence = ctypes.c_void_p(self._memory.ctypes.data + size)
        assert libc.mprotect(fence, ctypes.c_size_t(page), 0) == 0
        self.bytes = self._memory[size - n : size]

    def holding(self, raw):
        self.bytes[:] = raw
        return self.bytes.ctypes.data


def check_rows():
    """Compare dot, axpy and pack with NumPy for all formats and awkward sizes."""
    rng = np.random.default_rng(10)
    for type_ in TYPES:
        block = BLOCK_SIZES[type_][0]
        sizes = (1, 15, 16, 17, 33, 100) if block == 1 else (1, 2, 3, 4, 5, 7, 8, 17)
        for n in (s * block for s in sizes):
            if type_ in FLOATS:
                raw = encode(type_, rng.standard_normal((1, n)).astype(np.float32))
            else:
                raw = random_blocks(type_, 1, n, rng)
            w = decode(type_, raw)[0].astype(np.float64)
            x = rng.standard_normal(n).astype(np.float32)
            y = rng.standard_normal(n).astype(np.float32)
            weights, activations, target = Guarded(raw.size), Guarded(4 * n), Guarded(4 * n)
            packs, scratch, one = Guarded(rows.pack_bytes(n)), Guarded(rows.SCRATCH), Guarded(64)
            row = weights.holding(raw.reshape(-1))
            x_at = activations.holding(x.view(np.uint8))
            if n % 32 == 0:
                pack(x_at, n, packs.bytes.ctypes.data, one.holding(np.ones(64, np.uint8)))
            seen = round_activations(x) if type_ in INTEGER_DOT else x
            value = dot(
                int(type_), row, n, x_at, packs.bytes.ctypes.data, scratch.bytes.ctypes.data
            )
            assert abs(value - w @ seen) <= 1e-6 * np.abs(w * seen).sum() + 1e-30, (type_, n)
            axpy(int(type_), row, n, np.float32(0.7), target.holding(y.view(np.uint8)))
            expected = y + np.float32(0.7) * w
            error = np.abs(target.bytes.view(np.float32) - expected).max()
            assert error <= 1e-6 * np.abs(expected).max(), (type_, n)


def read_past_the_end():
    """What the fence is for: one weight too many."""
    row, x = Guarded(64), np.zeros(17, np.float32)
    dot(int(GGMLType.F32), row.holding(np.zeros(64, np.uint8)), 17, x.ctypes.data, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes")
@pytest.mark.parametrize(("function", "dies"), [("check_rows", False), ("read_past_the_end", True)])
def test_rows(function, dies):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"import test_rows; test_rows.{function}()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == (-11 if dies else 0), result.stderr
