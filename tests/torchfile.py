"""PyTorch zip files that lie, on top of the writer of honest ones."""

from __future__ import annotations

import numpy as np
from powerinfer.convert.torchfile import (
    STORAGES,
    row_strides,
    write_tensor,
    write_tensors,
    write_zip,
)
from powerinfer.convert.torchfile import tensor_opcodes as _opcodes

__all__ = ["tensor_opcodes", "write_tensor", "write_tensors", "write_zip"]


def tensor_opcodes(
    key: str,
    array: np.ndarray,
    *,
    shape: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    count: int | None = None,
    storage: bytes | None = None,
) -> bytes:
    """Return the pickle opcodes of one tensor; the keywords make it lie."""
    name = storage or STORAGES[array.dtype.newbyteorder("<").str]
    shape = array.shape if shape is None else shape
    strides = row_strides(shape) if strides is None else strides
    return _opcodes(key, name, array.size if count is None else count, offset, shape, strides)
