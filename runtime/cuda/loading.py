"""Weights on their way to the device: from a file's blocks into planes, block formats unmixed.

What is on the device is what footprint.py counts: formats as footprint.device_type says, planes as
common.cuh describes them, every array at a multiple of ALIGNMENT in one slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..footprint import BLOCK, device_type, planes
from ..formats import GGMLType, U8Array, decode
from ..gguf import Tensor
from .device import Slab, Uploader

_PIECE = 4 << 20  # bytes of a file that are repacked at once
# Blocks of a file by what goes to which plane. NumPy copies such fields about as fast as memory
# is; slices of bytes, a fifth of that.
_BLOCKS = {
    GGMLType.Q4_0: np.dtype([("d", "V2"), ("q", "V16")]),
    GGMLType.Q8_0: np.dtype([("d", "V2"), ("q", "V32")]),
    GGMLType.Q6_K: np.dtype([("q", "V192"), ("d", "V18")]),
}


@dataclass(frozen=True)
class DeviceMatrix:
    """common.cuh's Matrix: addresses of the planes (d 0: none), and the suffix of its kernels."""

    q: int
    d: int
    rows: int
    cols: int
    suffix: str


def repack(type_: GGMLType, rows: U8Array) -> tuple[U8Array, ...]:
    """Return the planes of some rows of a file's matrix, as bytes."""
    if type_ is GGMLType.Q5_0:
        return _widen_q5_0(rows)
    if type_ in _BLOCKS:
        blocks = rows.reshape(-1).view(_BLOCKS[type_])
        q, d = (np.ascontiguousarray(blocks[name]).view(np.uint8) for name in "qd")
        if type_ is GGMLType.Q6_K:
            d = np.pad(d.reshape(-1, 18), ((0, 0), (0, 2)))  # the next block's scales are aligned
        return q, d
    if device_type(type_) is type_:
        return (rows,)
    return (decode(type_, rows).view(np.uint8),)


def _widen_q5_0(rows: U8Array) -> tuple[U8Array, ...]:
    """Q5_0 as Q8_0: quants of 4 bits and, apart, their fifth; weights 16 below."""
    blocks = rows.reshape(-1, 22)
    nibbles, upper = blocks[:, 6:], np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=1) | upper << 4
    return (q.astype(np.int8) - 16).view(np.uint8), blocks[:, :2]


def device_matrix(
    type_: GGMLType, rows: int, cols: int, take: Callable[[int], int]
) -> DeviceMatrix:
    """Return a matrix of a file's type, unfilled; `take` returns the address of so many bytes."""
    at = [take(size) for size in planes(type_, rows, cols)]
    return DeviceMatrix(
        at[0], at[1] if len(at) > 1 else 0, rows, cols, device_type(type_).name.lower()
    )


class Loader:
    """Takes memory from a slab, and fills it."""

    def __init__(self, slab: Slab, uploader: Uploader) -> None:
        self._slab, self._uploader = slab, uploader

    def take(self, nbytes: int) -> int:
        """Return the address of memory that is zero."""
        return self._slab.take(nbytes)

    def array(self, values: np.ndarray) -> int:
        """Return the address of a copy of some numbers, as they are."""
        address = self.take(values.nbytes)
        self.fill(address, values)
        return address

    def fill(self, address: int, values: np.ndarray) -> None:
        """Copy some numbers, as they are, to an address."""
        self._uploader.upload(address, [np.ascontiguousarray(values).reshape(-1).view(np.uint8)])

    def floats(self, *parts: Tensor | None) -> int:
        """Return the address of float32 vectors, one behind the other; 0 if there are none."""
        there = [tensor.numpy() for tensor in parts if tensor is not None]
        return self.array(np.concatenate(there)) if there else 0

    def matrix(self, *parts: Tensor, blocks: int | None = None) -> DeviceMatrix:
        """Return matrices of one format, one below the other.

        `blocks`: of 64 rows, for the first ones of a single matrix; the rest of the last is zero.
        """
        first = parts[0]
        rows = sum(t.rows for t in parts) if blocks is None else blocks * BLOCK
        made = device_matrix(first.type, rows, first.cols, self.take)
        row = 0
        for tensor in parts:
            self.rows(made, tensor, row, 0, min(tensor.rows, rows - row))
            row += tensor.rows
        return made

    def rows(self, to: DeviceMatrix, tensor: Tensor, at: int, first: int, count: int) -> None:
        """Copy `count` rows of a tensor, from `first` on, to rows `at` and below of a matrix."""
        step = max(_PIECE // tensor.data.shape[1], 1)
        row_bytes = planes(tensor.type, 1, tensor.cols)
        for start in range(first, first + count, step):
            data = tensor.data[start : min(start + step, first + count)]
            parts = repack(tensor.type, data)
            row = at + start - first
            for plane, size, part in zip((to.q, to.d), row_bytes, parts, strict=False):
                self._uploader.upload(plane + row * size, _pieces(part))

    def finish(self) -> None:
        """Wait until all of it has arrived."""
        self._uploader.finish()


def _pieces(part: U8Array) -> Iterator[U8Array]:
    yield np.ascontiguousarray(part)
