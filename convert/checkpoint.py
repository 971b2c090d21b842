"""Reading Hugging Face checkpoints: safetensors and PyTorch .bin/.pt, memory-mapped.

A PyTorch file is a zip of raw storages and a pickle that says how tensors lie in them. That
pickle is never unpickled: its opcodes are read one by one, and only the few that build plain
tensors are understood (CVE-2025-32434, CVE-2026-24747 show what happens otherwise).
"""

from __future__ import annotations

import json
import lzma
import mmap
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ..runtime.errors import FileFormatError, shown
from ..runtime.formats import F32Array
from ..runtime.paths import regular

MAX_JSON = 100 << 20  # bytes, as safetensors' own cap on its header
MAX_PICKLE = 64 << 20
_BF16 = "bf16"  # NumPy has no such dtype: those arrays are uint16 and marked

_SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": _BF16}
_TORCH_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": _BF16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a checkpoint: a view of the mapped file, decoded when it is asked for."""

    array: np.ndarray[Any, Any]  # bfloat16 is kept as uint16
    is_bf16: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def float32(self, index: Any = ...) -> F32Array:
        """Return `array[index]` as float32; only that part is read."""
        part = self.array[index]
        if self.is_bf16:
            return (part.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return part.astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; FileFormatError if it is anything else."""
    if regular(path).stat().st_size > MAX_JSON:
        raise FileFormatError(f"{path} is too large")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers without end
        raise FileFormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FileFormatError(f"{path} does not hold a JSON object")
    return data


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the checkpoint in `folder`, by name, without reading its data.

    Safetensors are preferred to .bin, a single file to an index of shards. FileFormatError for
    damaged files, FileNotFoundError when there is no checkpoint or a shard is missing.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).exists():
            return read_tensors(folder / single)
        if (folder / index).exists():
            return _open_shards(folder, folder / index)
    raise FileNotFoundError(
        f"{folder} holds no checkpoint (model.safetensors or pytorch_model.bin, or their index)"
    )


def _open_shards(folder: Path, index: Path) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{index} has no weight_map")
    shards: dict[str, dict[str, Stored]] = {}
    tensors: dict[str, Stored] = {}
    for name, file in weight_map.items():
        # A shard lies beside its index: a path that leads elsewhere is an attack.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise FileFormatError(f"{index} names the shard {file!r}, which is not a file name")
        if file not in shards:
            if not (folder / file).exists():
                raise FileNotFoundError(f"the shard {folder / file} is missing")
            shards[file] = read_tensors(folder / file)
        if name not in shards[file]:
            raise FileFormatError(f"{folder / file} lacks {name}, which {index.name} promises")
        tensors[name] = shards[file][name]
    return tensors


def read_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of one .safetensors, .bin or .pt file, by name ('' for a bare one)."""
    regular(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _map(path: Path) -> np.ndarray[Any, Any]:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FileFormatError(f"{path} is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype=np.uint8)


def _typed(raw: np.ndarray[Any, Any], dtype: str) -> Stored:
    return Stored(raw.view(np.uint16 if dtype == _BF16 else np.dtype(dtype)), dtype == _BF16)


def _read_safetensors(path: Path) -> dict[str, Stored]:
    try:
        # The library checks the whole header: sizes, offsets, gaps, overlaps.
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged: {error}") from None
    raw = _map(path)
    (length,) = struct.unpack_from("<Q", raw.data)
    header = json.loads(raw[8 : 8 + length].tobytes())
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        dtype = _SAFETENSORS_DTYPES.get(info["dtype"])
        if dtype is None:
            continue  # integer buffers such as position ids; asking for one says it is missing
        start, end = info["data_offsets"]
        data = raw[8 + length + start : 8 + length + end]
        stored = _typed(data, dtype)
        tensors[name] = Stored(stored.array.reshape(info["shape"]), stored.is_bf16)
    return tensors


# -- PyTorch files ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A name that a pickle refers to. It stays a name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: where it lies in its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# What zipfile raises for damaged archives, compressed parts of them, and names.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class _Mark:
    pass


_MARK = _Mark()


def _read_torch(path: Path) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [n for n in members if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise FileFormatError(f"{path} is not a PyTorch checkpoint: no data.pkl in it")
            if members[pickles[0]].file_size > MAX_PICKLE:
                raise FileFormatError(f"{path} is damaged: its data.pkl is too large")
            program = archive.read(pickles[0])
    except _ZIP_ERRORS as error:
        raise FileFormatError(
            f"{path} is not a PyTorch zip file ({error}); save it again with a PyTorch of 1.6 or "
            "later, or as safetensors"
        ) from None
    root = pickles[0].removesuffix("data.pkl")
    try:
        content = _run_pickle(program)
    except FileFormatError as error:
        raise FileFormatError(f"{path} is refused: {error}") from None
    except (IndexError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged: its data.pkl makes no sense ({error})") from None

    raw = _map(path)
    views = {"": content} if isinstance(content, _View) else content
    if not isinstance(views, Mapping):
        raise FileFormatError(f"{path} does not hold tensors by name")
    return {
        name: _stored(path, raw, members.get(f"{root}data/{view.storage.key}"), view)
        for name, view in views.items()
        if isinstance(name, str) and isinstance(view, _View)
    }


def _stored(
    path: Path, raw: np.ndarray[Any, Any], member: zipfile.ZipInfo | None, view: _View
) -> Stored:
    """Return the checked view of a tensor's storage inside the mapped zip file."""
    storage = view.storage
    itemsize = 2 if storage.dtype == _BF16 else np.dtype(storage.dtype).itemsize
    if member is None or member.compress_type != zipfile.ZIP_STORED:
        raise FileFormatError(f"{path} is damaged: storage {storage.key!r} is missing")
    # The local header repeats the name and has an extra field of its own length.
    at = member.header_offset
    if at + 30 > len(raw) or raw[at : at + 4].tobytes() != b"PK\x03\x04":
        raise FileFormatError(
            f"{path} is damaged: storage {storage.key!r} is not where it should be"
        )
    name_length, extra_length = struct.unpack_from("<HH", raw.data, at + 26)
    start, size = at + 30 + name_length + extra_length, storage.count * itemsize
    if size > member.file_size or start + size > len(raw):
        raise FileFormatError(f"{path} is damaged: storage {storage.key!r} is too short")

    highest, count = view.offset, 1
    for n, stride in zip(view.shape, view.strides, strict=True):
        if n < 1 or stride < 0:
            raise FileFormatError(f"{path} is damaged: a tensor has a size below 1")
        highest += (n - 1) * stride
        count *= n
    # The count may not exceed the storage either: strides of 0 would make a tiny file huge.
    if view.offset < 0 or highest >= storage.count or count > storage.count:
        raise FileFormatError(f"{path} is damaged: a tensor does not fit its storage")
    # A stride that is never taken may be any number.
    strides = [s if n > 1 else 1 for n, s in zip(view.shape, view.strides, strict=True)]
    flat = _typed(raw[start : start + size], storage.dtype)
    array = np.lib.stride_tricks.as_strided(
        flat.array[view.offset :],
        view.shape,
        tuple(stride * itemsize for stride in strides),
        writeable=False,
    )
    return Stored(array, flat.is_bf16)


def _persistent(pid: Any) -> _Storage:
    kind, type_, key, _device, count = pid if isinstance(pid, tuple) else ()
    is_storage = isinstance(type_, _Global) and isinstance(key, str | int)
    if kind != "storage" or not is_storage or not isinstance(count, int):
        raise FileFormatError("it refers to something that is not a storage")
    module, _, name = type_.name.rpartition(".")
    if module != "torch" or name not in _TORCH_STORAGES or count < 0:
        raise FileFormatError(f"it has a storage of the unknown kind {shown(type_.name)}")
    return _Storage(str(key), _TORCH_STORAGES[name], count)


def _call(function: Any, args: tuple[Any, ...]) -> Any:
    """Do what one of the few allowed functions would do."""
    name = function.name if isinstance(function, _Global) else "something without a name"
    if name == "collections.OrderedDict" and args == ():
        return {}
    if name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, strides = args[:4]
        are_tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
        if not isinstance(storage, _Storage) or not are_tuples or len(shape) != len(strides):
            raise FileFormatError("it has a tensor without a storage")
        if not all(isinstance(n, int) for n in (offset, *shape, *strides)) or len(shape) > 8:
            raise FileFormatError("it has a tensor of no sensible shape")
        return _View(storage, offset, tuple(shape), tuple(strides))
    if name == "torch._utils._rebuild_parameter":
        if not isinstance(args[0], _View):
            raise FileFormatError("it has a parameter that is no tensor")
        return args[0]
    raise FileFormatError(f"it wants to call {shown(name)}, which no plain checkpoint does")


def _run_pickle(program: bytes) -> Any:
    """Interpret the opcodes of a pickle of plain tensors; FileFormatError for anything else."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def set_items(target: Any, items: list[Any]) -> None:
        # Nested tuples as keys could be deeper than C's stack, or take for ever to hash.
        if not isinstance(target, dict) or not all(isinstance(k, str | int) for k in items[::2]):
            raise FileFormatError("its pickle has a dictionary with keys that are no names")
        target.update(zip(items[::2], items[1::2], strict=True))

    for opcode, arg, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "GLOBAL":
                stack.append(_Global(str(arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise FileFormatError("its pickle names something by what is no name")
                stack.append(_Global(f"{module}.{name}"))
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case (
                "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG1"
                | "BINFLOAT"
                | "BINUNICODE"
                | "SHORT_BINUNICODE"
                | "BINUNICODE8"
            ):
                stack.append(arg)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = pop_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = pop_mark()
                set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BINPERSID":
                stack.append(_persistent(stack.pop()))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
            case "BUILD":
                stack.pop()  # attributes of the dict (_metadata): of no use here
            case _:
                raise FileFormatError(f"its pickle uses {opcode.name}, which no checkpoint needs")
    raise FileFormatError("its pickle has no end")
