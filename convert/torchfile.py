"""Writing PyTorch zip files without torch: plain tensors, as torch.save would."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"<f4": b"FloatStorage", "<f2": b"HalfStorage", "<i4": b"IntStorage"}
Array = np.ndarray[Any, Any]


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(module: bytes, name: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n"


def row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a tensor that lies row after row."""
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def tensor_opcodes(
    key: str,
    storage: bytes,
    count: int,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> bytes:
    """Return the pickle opcodes of one tensor over `count` elements of the storage file `key`."""
    where = _tuple(
        _text("storage"), _global(b"torch", storage), _text(key), _text("cpu"), _int(count)
    )
    args = _tuple(
        where + b"Q",
        _int(offset),
        _tuple(*map(_int, shape)),
        _tuple(*map(_int, strides)),
        b"\x89",  # requires_grad=False
        _global(b"collections", b"OrderedDict") + b")R",
    )
    return _global(b"torch._utils", b"_rebuild_tensor_v2") + args + b"R"


def _whole(key: str, array: Array) -> bytes:
    storage = STORAGES[array.dtype.newbyteorder("<").str]
    return tensor_opcodes(key, storage, array.size, 0, array.shape, row_strides(array.shape))


def write_zip(path: Path, program: bytes, storages: Mapping[str, bytes]) -> Path:
    """Write a PyTorch zip file with the given pickle and raw storages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")
    return path


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> Path:
    """Write tensors as torch.save({name: tensor}) does."""
    items, storages = b"", {}
    for i, (name, array) in enumerate(tensors.items()):
        items += _text(name) + _whole(str(i), array)
        storages[str(i)] = np.ascontiguousarray(array).tobytes()
    return write_zip(path, b"\x80\x02}(" + items + b"u.", storages)


def write_tensor(path: Path, array: Array) -> Path:
    """Write one tensor as torch.save(tensor) does."""
    program = b"\x80\x02" + _whole("0", array) + b"."
    return write_zip(path, program, {"0": np.ascontiguousarray(array).tobytes()})
