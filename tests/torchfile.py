"""Writing PyTorch zip files without torch: real ones for tests, and hostile ones."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_STORAGES = {"<f4": b"FloatStorage", "<f2": b"HalfStorage", "<i4": b"IntStorage"}


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(module: bytes, name: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n"


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
    name = storage or _STORAGES[array.dtype.newbyteorder("<").str]
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    pid = _tuple(
        _text("storage"),
        _global(b"torch", name),
        _text(key),
        _text("cpu"),
        _int(array.size if count is None else count),
    )
    args = _tuple(
        pid + b"Q",
        _int(offset),
        _tuple(*map(_int, shape)),
        _tuple(*map(_int, strides)),
        b"\x89",  # requires_grad=False
        _global(b"collections", b"OrderedDict") + b")R",
    )
    return _global(b"torch._utils", b"_rebuild_tensor_v2") + args + b"R"


def write_zip(path: Path, program: bytes, storages: Mapping[str, bytes]) -> Path:
    """Write a PyTorch zip file with the given pickle and raw storages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")
    return path


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write tensors as torch.save({name: tensor}) does."""
    items, storages = b"", {}
    for i, (name, array) in enumerate(tensors.items()):
        items += _text(name) + tensor_opcodes(str(i), array)
        storages[str(i)] = np.ascontiguousarray(array).tobytes()
    return write_zip(path, b"\x80\x02}(" + items + b"u.", storages)
