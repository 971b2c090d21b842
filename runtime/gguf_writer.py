"""Streaming writer of GGUF files on top of the gguf package; files appear only when complete."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import ModelError, RequestError
from .formats import GGMLType, row_bytes
from .gguf import Value, ValueType


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed onto it on success, removed otherwise.

    A link's target is replaced, not the link. RequestError if `path` is there and is no file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is not a regular file: choose another output")
    # Short, so that any name which the file may have leaves room for it.
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def not_onto(source: Path, target: Path) -> None:
    """Refuse (RequestError) to write `target` where it is the very file that is being read."""
    if target.exists() and target.samefile(source):
        raise RequestError(f"{target} is the input itself: choose another output")


def check_target(target: Path, is_gguf: bool = True) -> None:
    """Refuse what could not be written in the end: RequestError, before any work is done."""
    if not target.parent.is_dir():
        raise RequestError(f"{target.parent} is not a directory: choose another output")
    if target.exists() and not target.is_file():
        raise RequestError(f"{target} is not a regular file: choose another output")
    if is_gguf and target.is_file():
        _check_is_gguf(target)


def _check_is_gguf(path: Path) -> None:
    if path.stat().st_size:
        with open(path, "rb") as file:
            if file.read(4) not in (b"GGUF", b"PWRI"):
                # A slip of the hand must not cost somebody a checkpoint.
                raise RequestError(f"{path} is there and is no GGUF file: not overwritten")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


class GGUFWriter:
    """Write a GGUF v3 file tensor by tensor, on top of gguf.GGUFWriter.

    Use as a context manager: `add` keys, `declare` every tensor, then `write` their rows in the
    declared order, in pieces of any size. The file appears under its name only when complete.
    """

    def __init__(self, path: str | os.PathLike[str], arch: str, magic: bytes = b"GGUF") -> None:
        import gguf  # 0.1 s; only commands that write need it

        self.path = Path(path)
        if self.path.is_file():
            _check_is_gguf(self.path)
        self._gguf: Any = gguf.GGUFWriter(None, arch)
        self._value_type = gguf.GGUFValueType
        self._tensor_type = gguf.GGMLQuantizationType
        self._magic = magic
        self._declared: list[tuple[str, int]] = []  # (name, bytes)
        self._left = 0  # bytes still to come of the tensor being written
        self._file: Any = None

    def __enter__(self) -> GGUFWriter:
        self._stack = contextlib.ExitStack()
        self._temporary = self._stack.enter_context(replacing(self.path))
        # Closing may fail too (a full disk shows only then): inside the renaming, not after it.
        self._stack.callback(self._gguf.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._start()
            if self._declared:
                raise RuntimeError(f"tensor {self._declared[0][0]} was never written")
            self._file.seek(0)
            self._file.write(self._magic)

    def add(self, key: str, value: Value) -> None:
        """Add a key; general.architecture is there already and cannot be added."""
        if value.type is ValueType.ARRAY and len(value.value) == 0:
            return  # gguf cannot write an empty array, and nobody misses one
        strings = value.value if value.element is ValueType.STRING else [value.value]
        if not all(_is_unicode(s) for s in strings if isinstance(s, str)):
            raise ModelError(f"{key} would hold text that is not valid Unicode")
        data = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
        element = None if value.element is None else self._value_type(int(value.element))
        self._gguf.add_key_value(key, data, self._value_type(int(value.type)), element)

    def declare(self, name: str, type_: GGMLType, shape: tuple[int, ...]) -> None:
        """Announce a tensor; `shape` in NumPy order. ValueError if rows are not whole blocks."""
        nbytes = row_bytes(type_, shape[-1]) * int(np.prod(shape[:-1], dtype=np.int64))
        self._gguf.add_tensor_info(
            name, shape, np.dtype(np.float32), nbytes, self._tensor_type(int(type_))
        )
        self._declared.append((name, nbytes))

    def _start(self) -> None:
        if self._file is None:
            self._gguf.write_header_to_file(self._temporary)
            self._gguf.write_kv_data_to_file()
            self._gguf.write_ti_data_to_file()
            self._file = self._gguf.fout[0]
            self._gguf.write_padding(self._file, self._file.tell())

    def write(self, name: str, data: np.ndarray[Any, Any]) -> None:
        """Append raw rows to tensor `name`, which must be the next one not yet complete."""
        self._start()
        expected, nbytes = self._declared[0]
        if name != expected:
            raise RuntimeError(f"tensor {name} written where {expected} was declared")
        self._left = self._left or nbytes
        raw = np.ascontiguousarray(data)
        if raw.nbytes > self._left:
            raise RuntimeError(f"tensor {name} is longer than declared")
        self._file.write(raw.reshape(-1).view(np.uint8).data)
        self._left -= raw.nbytes
        if self._left == 0:
            self._gguf.write_padding(self._file, nbytes)
            del self._declared[0]
