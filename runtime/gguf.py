"""Checked, memory-mapped reader of GGUF and PWRI files.

Source: the GGUF specification (ggml/docs/gguf.md). Layout of a file:

    magic u32 | version u32 | n_tensors u64 | n_keys u64
    n_keys x    ( key string | value type u32 | value )
    n_tensors x ( name string | n_dims u32 | dims u64 x n_dims | type u32 | offset u64 )
    padding to general.alignment | tensor data, each tensor at its offset from here

A string is a u64 length and its UTF-8 bytes. PWRI (the original PowerInfer) differs in the magic
and in three old type numbers. A file is hostile until checked: every count, length, offset and
type is validated with Python integers before memory is allocated or a view is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .errors import FileFormatError
from .formats import (
    BLOCK_SIZES,
    LEGACY_PWRI_TYPES,
    NUMPY_DTYPES,
    F32Array,
    GGMLType,
    U8Array,
    decode,
    row_bytes,
)
from .paths import regular

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
_LOADERS, _LOADED_AT_ONCE = 4, 1 << 26  # threads, and bytes of a piece, of a file that is loaded
MAX_NAME = 255  # bytes of a key or tensor name; llama.cpp allows 63 for tensors


class ValueType(IntEnum):
    """Types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<B",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
_FLOATS = (ValueType.FLOAT32, ValueType.FLOAT64)
_INTS = tuple(t for t in _SCALARS if t not in _FLOATS and t is not ValueType.BOOL)


@dataclass(frozen=True)
class Value:
    """A metadata value as stored: its type, for arrays the element type, and the value.

    `value` is int, float, bool, str, list[str], or a NumPy array of numbers.
    """

    type: ValueType
    value: Any
    element: ValueType | None = None

    @classmethod
    def of(cls, value: str | int | float | np.ndarray[Any, Any]) -> Value:
        """Return a value in the type that the field uses: u32, f32, text, or an array of f32."""
        if isinstance(value, str):
            return cls(ValueType.STRING, value)
        if isinstance(value, np.ndarray):
            return cls(ValueType.ARRAY, value.astype(np.float32), ValueType.FLOAT32)
        return cls(ValueType.UINT32 if isinstance(value, int) else ValueType.FLOAT32, value)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a file: a checked view of the memory map, never a copy.

    `shape` is in NumPy order, rows first (GGUF stores it reversed); `data` is uint8
    [rows, bytes of a row], where rows is the product of all dimensions but the last.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: U8Array

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return int(self.data.size)

    def row_slice(self, name: str, first: int, last: int) -> Tensor:
        """Return rows [first, last) of a matrix as a tensor of its own, without a copy."""
        return Tensor(name, self.type, (last - first, self.cols), self.data[first:last])

    def float32(self) -> F32Array:
        """Return the whole tensor decoded to float32, in its shape."""
        return decode(self.type, self.data).reshape(self.shape)

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return a typed view, without a copy; ValueError for block formats."""
        if self.type not in NUMPY_DTYPES:
            raise ValueError(f"{self.name} is {self.type.name}, not an array of plain numbers")
        return self.data.reshape(-1).view(NUMPY_DTYPES[self.type]).reshape(self.shape)


_REQUIRED = object()


class Metadata:
    """Keys of a model file (or of one about to be written), with checked getters.

    FileFormatError names the key that is missing, of another type, or out of range.
    """

    def __init__(self, path: Path, metadata: dict[str, Value]) -> None:
        self.path = path
        self.metadata = metadata

    def _refuse(self, what: str) -> NoReturn:
        raise FileFormatError(f"{self.path} is damaged: {what}")

    def _get(self, key: str, types: tuple[ValueType, ...], kind: str, default: Any) -> Any:
        value = self.metadata.get(key)
        if value is None:
            if default is _REQUIRED:
                raise FileFormatError(f"{self.path} lacks the key {key!r}")
            return default
        if value.type not in types:
            self._refuse(f"key {key!r} is {value.type.name}, not {kind}")
        return value.value

    def get_int(
        self, key: str, default: Any = None, low: int = 0, high: int = (1 << 31) - 1
    ) -> int:
        """Return an integer in [low, high]; required when no default is given."""
        default = _REQUIRED if default is None else default
        value = self._get(key, _INTS, "an integer", default)
        if not low <= value <= high:
            self._refuse(f"key {key!r} is {value}, outside {low} to {high}")
        return int(value)

    def get_float(self, key: str, default: float | None = None) -> float:
        """Return a finite number; required when no default is given."""
        value = self._get(key, _FLOATS, "a number", _REQUIRED if default is None else default)
        if not np.isfinite(value):
            self._refuse(f"key {key!r} is {value}")
        return float(value)

    def get_str(self, key: str, default: str | None = None) -> str:
        """Return a string; required when no default is given."""
        default_ = _REQUIRED if default is None else default
        return str(self._get(key, (ValueType.STRING,), "a string", default_))

    def get_bool(self, key: str, default: bool) -> bool:
        return bool(self._get(key, (ValueType.BOOL,), "a boolean", default))

    def get_array(self, key: str, elements: Iterable[ValueType]) -> Any:
        """Return an array whose element type is one of `elements`, or None if there is none."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if value.type is not ValueType.ARRAY or value.element not in tuple(elements):
            expected = " or ".join(e.name for e in elements)
            self._refuse(f"key {key!r} is not an array of {expected}")
        return value.value


class GGUFFile(Metadata):
    """An open GGUF or PWRI file: `metadata` (key -> Value) and `tensors` (name -> Tensor).

    It is mapped into memory, and read as its pages are used; `load`: read whole into memory of our
    own, in large pages where the system has them. `lock`: never swapped out. FileFormatError when
    anything in it is damaged; OSError when it cannot be read or locked.
    """

    def __init__(
        self, path: str | os.PathLike[str], load: bool = False, lock: bool = False
    ) -> None:
        super().__init__(regular(path), {})
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < 24:
                raise FileFormatError(
                    f"{self.path} is not a GGUF file: it has only {self.size} bytes"
                )
            # The map outlives the descriptor; views of it keep it alive.
            self._map = _loaded(file, self.size) if load else _mapped(file)
        self._bytes: U8Array = np.frombuffer(self._map, dtype=np.uint8)
        if lock:
            _lock(self._bytes, self.path)
        self._pos = 0
        self._parse()

    @property
    def data(self) -> U8Array:
        """All bytes behind the head: the tensors and what lies between them."""
        return self._bytes[self.data_offset :]

    @property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    # -- parsing ------------------------------------------------------------------------------

    def _need(self, n: int, what: str) -> int:
        """Return the position of the next `n` bytes and step over them."""
        start = self._pos
        if n > self.size - start:
            self._refuse(f"it ends inside {what}")
        self._pos = start + n
        return start

    def _u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self._map, self._need(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self._map, self._need(8, what))[0])

    def _name(self, what: str) -> str:
        length = self._u64(what)
        if not 0 < length <= MAX_NAME:
            self._refuse(f"{what} has a length of {length}")
        return self._text(length, what)

    def _text(self, length: int, what: str) -> str:
        start = self._need(length, what)
        try:
            return self._map[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"{what} is not UTF-8")

    def _parse(self) -> None:
        magic = self._map[:4]
        self._pos = 4
        if magic not in (b"GGUF", b"PWRI"):
            raise FileFormatError(
                f"{self.path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'"
            )
        self.magic = magic.decode("ascii")
        self.version = self._u32("the version")
        if self.version & 0xFFFF == 0:
            raise FileFormatError(f"{self.path} is big-endian, which is not supported")
        if self.version not in (2, 3):
            raise FileFormatError(
                f"{self.path} has GGUF version {self.version}; versions 2 and 3 can be read"
            )
        n_tensors = self._u64("the header")
        n_keys = self._u64("the header")
        # A key takes at least 8 + 1 + 4 + 1 bytes, a tensor 8 + 1 + 4 + 8 + 4 + 8.
        if n_keys * 14 > self.size - self._pos:
            self._refuse(f"{n_keys} keys cannot fit into it")
        if n_tensors * 33 > self.size - self._pos:
            self._refuse(f"{n_tensors} tensors cannot fit into it")

        for i in range(n_keys):
            key = self._name(f"the name of key {i}")
            if key in self.metadata:
                self._refuse(f"key {key!r} is there twice")
            self.metadata[key] = self._value(key)

        self.alignment = self.get_int("general.alignment", DEFAULT_ALIGNMENT, 1, 1 << 20)
        if self.alignment & (self.alignment - 1):
            self._refuse(f"general.alignment is {self.alignment}, not a power of two")

        infos = [self._tensor_info(i) for i in range(n_tensors)]
        names = [info[0] for info in infos]
        if len(set(names)) != len(names):
            self._refuse("two tensors have the same name")
        self.data_offset = -(-self._pos // self.alignment) * self.alignment
        self.tensors: dict[str, Tensor] = {}
        end_of_last = 0
        for name, type_, shape, offset in sorted(infos, key=lambda info: info[3]):
            self.tensors[name], end_of_last = self._tensor(name, type_, shape, offset, end_of_last)
        self.tensors = {name: self.tensors[name] for name in names}  # in the file's order

    def _value(self, key: str) -> Value:
        type_ = self._value_type(key)
        if type_ is not ValueType.ARRAY:
            return Value(type_, self._scalar(type_, key))
        element = self._value_type(key)
        if element is ValueType.ARRAY:
            self._refuse(f"key {key!r} is an array of arrays")
        count = self._u64(f"key {key!r}")
        if element is ValueType.STRING:
            if count * 8 > self.size - self._pos:
                self._refuse(f"key {key!r} claims {count} strings")
            return Value(type_, self._strings(key, count), element)
        dtype = np.dtype("?" if element is ValueType.BOOL else _SCALARS[element])
        if count * dtype.itemsize > self.size - self._pos:
            self._refuse(f"key {key!r} claims {count} elements")
        start = self._need(count * dtype.itemsize, f"key {key!r}")
        raw = self._bytes[start : start + count * dtype.itemsize]
        if element is ValueType.BOOL and raw.size and raw.max() > 1:
            self._refuse(f"key {key!r} holds a boolean that is neither 0 nor 1")
        return Value(type_, raw.view(dtype), element)

    def _value_type(self, key: str) -> ValueType:
        number = self._u32(f"key {key!r}")
        try:
            return ValueType(number)
        except ValueError:
            self._refuse(f"key {key!r} has the unknown type {number}")

    def _scalar(self, type_: ValueType, key: str) -> Any:
        what = f"key {key!r}"
        if type_ is ValueType.STRING:
            return self._text(self._u64(what), what)
        code = _SCALARS[type_]
        value = struct.unpack_from(code, self._map, self._need(struct.calcsize(code), what))[0]
        if type_ is ValueType.BOOL:
            if value > 1:
                self._refuse(f"{what} is a boolean that is neither 0 nor 1")
            return bool(value)
        return value

    def _strings(self, key: str, count: int) -> list[str]:
        # The one hot loop of the reader: a vocabulary has 32,000 to 256,000 strings.
        data, size, pos = self._map, self.size, self._pos
        unpack = struct.Struct("<Q").unpack_from
        out: list[str] = []
        try:
            for _ in range(count):
                end = pos + 8 + unpack(data, pos)[0]
                if end > size:
                    self._refuse(f"it ends inside key {key!r}")
                out.append(data[pos + 8 : end].decode("utf-8"))
                pos = end
        except UnicodeDecodeError:
            self._refuse(f"key {key!r} holds a string that is not UTF-8")
        except struct.error:
            self._refuse(f"it ends inside key {key!r}")
        self._pos = pos
        return out

    def _tensor_info(self, i: int) -> tuple[str, GGMLType, tuple[int, ...], int]:
        name = self._name(f"the name of tensor {i}")
        n_dims = self._u32(f"tensor {name!r}")
        if not 1 <= n_dims <= MAX_DIMS:
            self._refuse(f"tensor {name!r} has {n_dims} dimensions")
        dims = [self._u64(f"tensor {name!r}") for _ in range(n_dims)]
        number = self._u32(f"tensor {name!r}")
        if self.magic == "PWRI" and number in LEGACY_PWRI_TYPES:
            type_ = LEGACY_PWRI_TYPES[number]
        else:
            try:
                type_ = GGMLType(number)
            except ValueError:
                self._refuse(f"tensor {name!r} has the unknown type {number}")
        return name, type_, tuple(reversed(dims)), self._u64(f"tensor {name!r}")

    def _tensor(
        self, name: str, type_: GGMLType, shape: tuple[int, ...], offset: int, end_of_last: int
    ) -> tuple[Tensor, int]:
        """Return the checked tensor and the offset at which its data ends."""
        if 0 in shape:
            self._refuse(f"tensor {name!r} has a dimension of 0")
        if shape[-1] % BLOCK_SIZES[type_][0]:
            self._refuse(f"tensor {name!r} has rows of {shape[-1]}, not whole {type_.name} blocks")
        if offset % self.alignment:
            self._refuse(f"tensor {name!r} is not aligned to {self.alignment} bytes")
        if offset < end_of_last:
            self._refuse(f"tensor {name!r} overlaps another one")
        n_row_bytes = row_bytes(type_, shape[-1])
        n_rows = 1
        for dim in shape[:-1]:
            n_rows *= dim
        start, nbytes = self.data_offset + offset, n_rows * n_row_bytes
        if start + nbytes > self.size:
            self._refuse(
                f"the data of tensor {name!r} ends at byte {start + nbytes}, "
                f"the file at byte {self.size}"
            )
        data = self._bytes[start : start + nbytes].reshape(n_rows, n_row_bytes)
        return Tensor(name, type_, shape, data), offset + nbytes


def _mapped(file: io.BufferedReader) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _loaded(file: io.BufferedReader, size: int) -> mmap.mmap:
    """Return memory of our own with the file's bytes."""
    # Private: what is shared lies in small pages, which take a third longer to read.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name != "nt" else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    is_shared = hasattr(os, "preadv")  # else a file has one position, for one thread

    def read(start: int) -> None:
        end = min(start + _LOADED_AT_ONCE, size)
        while start < end:
            with view[start:end] as rest:
                if is_shared:
                    n = os.preadv(file.fileno(), [rest], start)
                else:
                    file.seek(start)
                    n = file.readinto(rest)
            if not n:
                raise OSError(f"{file.name} became shorter while it was read")
            start += n

    # One thread spends more time on new pages and on copying than the file takes to come.
    threads = ThreadPoolExecutor(_LOADERS if is_shared else 1)
    with memoryview(memory) as view, threads:
        list(threads.map(read, range(0, size, _LOADED_AT_ONCE)))
    return memory


def _lock(data: U8Array, path: Path) -> None:
    """Keep bytes in memory; OSError, with what to do, if the system does not allow it."""
    if os.name == "nt":
        raise OSError(f"{path}: locking memory is not supported on Windows")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.size)) != 0:
        raise OSError(
            f"{path}: the system does not allow to lock {data.size / 2**20:.0f} MiB of memory "
            "(see ulimit -l)"
        )
