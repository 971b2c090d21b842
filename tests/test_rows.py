"""Row kernels of every format, on rows that end where readable memory ends.

Kernels work on raw addresses, so numba's bounds checks see nothing of them: here a read past the
end of a row meets a page that cannot be read, and ends the process.
"""

import ctypes
import itertools
import mmap
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from conftest import random_blocks
from powerinfer.runtime.cpu import axpy, rows
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


def call(kernel, *args):
    """Call a compiled kernel by its address, as jobs do."""
    types = [ctypes.c_ssize_t] * len(args)
    ctypes.CFUNCTYPE(None, *types)(kernel.address)(*args)


@numba.njit
def pack(x, n, out, ones):
    rows.pack(x, n, out, ones)


@numba.njit
def pack_piece(x, n, out, ones, first, end):
    rows.pack_piece(x, n, out, ones, first, end)


SUMMED = [GGMLType.Q4_0, GGMLType.Q8_0]  # in integers


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


def check_rows(types=TYPES):
    """Compare dot, axpy and pack with NumPy for all formats and awkward sizes."""
    rng = np.random.default_rng(10)
    for type_ in types:
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
            value, factor = np.zeros(4, np.float32), np.array([0.7], np.float32)
            packed, spare = packs.bytes.ctypes.data, scratch.bytes.ctypes.data
            size, out = raw.size, value.ctypes.data
            call(rows.DOTS[type_], row, size, n, 0, 1, row, 0, x_at, packed, spare, out)
            error = abs(value[0] - w @ seen)
            assert error <= 1e-6 * np.abs(w * seen).sum() + 1e-30, (type_, n)
            y_at = target.holding(y.view(np.uint8))
            call(axpy.AXPYS[type_], row, size, n, 0, 1, row, 0, factor.ctypes.data, y_at)
            expected = y + np.float32(0.7) * w
            error = np.abs(target.bytes.view(np.float32) - expected).max()
            assert error <= 1e-6 * np.abs(expected).max(), (type_, n)


def check_sums(types):
    """Sums of listed rows: several groups and a part of one, whole pieces and ends of rows."""
    rng = np.random.default_rng(12)
    for type_, n, count in itertools.product(types, (32, 544, 2048), (1, 3, 16, 41)):
        raw = random_blocks(type_, 48, n, rng)
        w = decode(type_, raw).astype(np.float64)
        memory, size = Guarded(raw.size), raw.shape[1]
        at = memory.holding(raw.reshape(-1))
        order = rng.permutation(48)[:count]
        listed = np.array([*order, *[0] * 2 * rows.SLACK], np.int32)
        values = (rng.standard_normal(count) * 10 ** rng.uniform(-3, 0, count)).astype(np.float32)
        y = np.zeros(n, np.float32)
        where = listed.ctypes.data
        args = at, size, n, where, count, at, where + 4 * 16, values.ctypes.data, y.ctypes.data
        call(axpy.AXPYS[type_], *args)
        products = values[:, None] * w[order]
        error = np.abs(y - products.sum(axis=0)).max()
        assert error < 2e-6 * np.abs(products).sum(axis=0).max(), (type_, n, count)
        # What is no number is not lost.
        values[rng.integers(count)] = np.nan
        call(axpy.AXPYS[type_], *args)
        assert np.isnan(y).all(), (type_, n, count)


def read_past_the_end():
    """What the fence is for: one weight too many."""
    row, x = Guarded(64), np.zeros(17, np.float32)
    at = row.holding(np.zeros(64, np.uint8))
    call(rows.DOTS[GGMLType.F32], at, 64, 17, 0, 1, at, 0, x.ctypes.data, 0, 0, x.ctypes.data)


def test_packing_in_pieces():
    """The same bytes as in one go."""
    for n in (96, 512, 1088, 2048):
        x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
        one = np.ones(64, np.int8)
        whole, pieces = (np.zeros(rows.pack_bytes(n), np.uint8) for _ in range(2))
        pack(x.ctypes.data, n, whole.ctypes.data, one.ctypes.data)
        for first in (1024, 0, 512, 1536):
            if first < n:
                at = x.ctypes.data, n, pieces.ctypes.data, one.ctypes.data
                pack_piece(*at, first, first + 512)
        assert np.array_equal(whole, pieces)


def test_packing_what_is_not_finite():
    """A block with such a number has a scale that is none; the others are as before."""
    for bad in (np.nan, np.inf, -np.inf):
        for at in range(32, 64):
            x = np.ones(96, np.float32)
            x[at] = bad
            out = np.zeros(rows.pack_bytes(96), np.uint8)
            one = np.ones(64, np.int8)
            pack(x.ctypes.data, 96, out.ctypes.data, one.ctypes.data)
            scales = out[: 4 * 3].view(np.float32)
            assert np.isfinite(scales).tolist() == [True, False, True], (bad, at)


def test_lists_of_rows():
    """Some rows in any order, or all from the first on: the same sums, weighed the same."""
    rng = np.random.default_rng(11)
    for type_ in TYPES:
        n = 2 * max(BLOCK_SIZES[type_][0], 32)
        if type_ in FLOATS:
            raw = encode(type_, rng.standard_normal((9, n)).astype(np.float32))
        else:
            raw = random_blocks(type_, 9, n, rng)
        w = decode(type_, raw).astype(np.float64)
        x, packed = (
            rng.standard_normal(n).astype(np.float32),
            np.zeros(rows.pack_bytes(n), np.uint8),
        )
        pack(x.ctypes.data, n, packed.ctypes.data, np.ones(64, np.int8).ctypes.data)
        seen = round_activations(x) if type_ in INTEGER_DOT else x
        scratch = np.zeros(rows.SCRATCH, np.uint8)
        listed = np.array([7, 0, 3, 3] + [0] * rows.SLACK, np.int32)
        for order, where, count in ((range(9), 0, 9), ([7, 0, 3, 3], listed.ctypes.data, 4)):
            out, y = np.zeros(12, np.float32), np.zeros(n, np.float32)
            values = rng.standard_normal(count).astype(np.float32)
            head = raw.ctypes.data, raw.shape[1], n, where, count, 0, where
            at = x.ctypes.data, packed.ctypes.data, scratch.ctypes.data, out.ctypes.data
            call(rows.DOTS[type_], *head, *at)
            scale = np.abs(w[list(order)] * seen).sum(axis=1).max()
            np.testing.assert_allclose(out[:count], w[list(order)] @ seen, atol=1e-6 * scale)
            call(axpy.AXPYS[type_], *head, values.ctypes.data, y.ctypes.data)
            expected = values @ w[list(order)]
            np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes")
@pytest.mark.parametrize(
    ("call", "dies"),
    [("check_rows()", False), ("check_sums(SUMMED)", False), ("read_past_the_end()", True)],
)
def test_rows(call, dies):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"from test_rows import *; {call}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == (-11 if dies else 0), result.stderr
