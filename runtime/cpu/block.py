"""Argument blocks: what a job reads, as named 64-bit words.

    FIELDS = layout("counts x n_embd wq:MATRIX")
    block = build(FIELDS, counts=address, x=address, n_embd=4096, wq=matrix(tensor))

Inside a job `arg(args, FIELDS.x)` is a word, `args + 8 * FIELDS.wq` the address of a sub-block.
A block is built once per layer: what differs from call to call lies in the Step.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from ..gguf import Tensor
from .axpy import AXPYS
from .gemm import FEWS, MULTIPLIES, UNPACKS
from .jit import Kernel
from .rows import DOTS, WIDENS

Block = np.ndarray[tuple[int], np.dtype[np.int64]]

# Words of a weight matrix [rows, cols]: address, the kernels of its format (0: not used here),
# rows, cols, bytes of a row, and the address of its float32 bias (0: none).
MATRIX: Any = namedtuple(
    "Matrix", "data dots few unpack multiply axpys widen rows cols row_bytes bias"
)(*range(11))
# What is done with a matrix: its rows times activations, their sum, or each by itself.
PRODUCTS, SUMS, SINGLES = (DOTS, FEWS, UNPACKS, MULTIPLIES), (AXPYS,), (WIDENS,)
_TABLES = (*PRODUCTS, *SUMS, *SINGLES)
# Words of a norm: its kind, and the addresses of float32 weight, bias (0: none) and epsilon.
NORM: Any = namedtuple("Norm", "kind weight bias eps")(*range(4))
_KINDS = {"MATRIX": len(MATRIX), "NORM": len(NORM)}


def layout(fields: str) -> Any:
    """Return a named tuple of word offsets; `name:MATRIX` takes as many words as a matrix has."""
    offsets, at = {}, 0
    for field in fields.split():
        name, _, kind = field.partition(":")
        offsets[name] = at
        at += _KINDS[kind] if kind else 1
    offsets["words"] = at
    make: Any = namedtuple
    return make("Layout", offsets)(**offsets)


def address(array: np.ndarray[Any, Any] | None) -> int:
    """Return where an array's data lies, 0 for None."""
    return 0 if array is None else int(array.ctypes.data)


def matrix(
    tensor: Tensor | None,
    bias: Tensor | None = None,
    use: tuple[dict[int, Kernel], ...] = PRODUCTS,
) -> list[int]:
    """Return the words of a weight matrix; of None, zeros."""
    if tensor is None:
        return [0] * len(MATRIX)
    kernels = [t[tensor.type].address if t in use and tensor.type in t else 0 for t in _TABLES]
    return [
        address(tensor.data),
        *kernels,
        tensor.rows,
        tensor.cols,
        int(tensor.data.shape[1]),
        address(None if bias is None else bias.data),
    ]


def build(fields: Any, **values: Any) -> Block:
    """Return the filled block; every field must be given, arrays stand for their address."""
    block = np.zeros(fields.words, np.int64)
    missing = set(fields._fields) - set(values) - {"words"}
    assert not missing and len(values) == len(fields) - 1, missing
    for name, value in values.items():
        at = getattr(fields, name)
        if isinstance(value, list):
            block[at : at + len(value)] = value
        else:
            block[at] = address(value) if isinstance(value, np.ndarray) else int(value)
    return block
