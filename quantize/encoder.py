"""Encoding rows and re-writing whole files in another type, streaming, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import ModelError, RequestError
from ..runtime.formats import (
    BLOCK_SIZES,
    COMPUTE_TYPES,
    QK,
    F32Array,
    GGMLType,
    U8Array,
    decode,
    encode,
)
from ..runtime.gguf import GGUFFile, Tensor, Value, ValueType
from ..runtime.gguf_writer import GGUFWriter, not_onto
from .policy import FILE_TYPES, Policy

CHUNK = 1 << 22  # weights encoded at a time by one thread: 16 MiB as float32
FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
F16_ENDS = 65520  # from here on float16 is infinite

Progress = Callable[[int], Any]  # called with the number of weights done


def encode_rows(type_: GGMLType, x: F32Array, name: str) -> U8Array:
    """Encode float32 rows [n, cols]; ModelError if quantising meets NaN or infinity."""
    return convert_rows(GGMLType.F32, x.view(np.uint8).reshape(x.shape[0], -1), type_, name)


def convert_rows(source: GGMLType, data: U8Array, type_: GGMLType, name: str) -> U8Array:
    """Re-encode raw rows [n, row bytes] of type `source` as `type_`, without a detour if equal.

    ModelError, with the tensor's name, if quantising meets a weight that is not finite, or f16 one
    that is too large for it.
    """
    if source is type_:
        return data
    if type_ not in (GGMLType.Q4_0, GGMLType.Q8_0):
        x = decode(source, data)
        if type_ not in FLOAT_TYPES and not np.isfinite(x).all():
            raise ModelError(f"{name} holds NaN or infinity: it cannot be quantised")
        if type_ is GGMLType.F16 and (np.isfinite(x) & (np.abs(x) >= F16_ENDS)).any():
            raise ModelError(f"{name} has weights that are too large for f16: use bf16 or f32")
        return encode(type_, x)
    if source not in FLOAT_TYPES:
        source, data = GGMLType.F32, decode(source, data).view(np.uint8)
    from . import kernels  # compiles or loads them: only when quantising

    data = np.ascontiguousarray(data)
    n_blocks = data.size // (QK * BLOCK_SIZES[source][1])
    out = np.empty((data.shape[0], n_blocks // data.shape[0] * BLOCK_SIZES[type_][1]), np.uint8)
    scratch = np.empty(128, np.uint8)
    kernel = kernels.encode_q4_0 if type_ is GGMLType.Q4_0 else kernels.encode_q8_0
    bad = kernel(int(source), data.ctypes.data, n_blocks, out.ctypes.data, scratch.ctypes.data)
    if bad:
        raise ModelError(f"{name} holds NaN or infinity: it cannot be quantised")
    return out


def row_chunks(rows: int, cols: int) -> Iterator[slice]:
    """Cut rows into pieces of about CHUNK weights."""
    step = max(1, CHUNK // cols)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def quantize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    policy: Policy,
    threads: int | None = None,
    allow_requantize: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """Write `source` again with the types of `policy`.

    Streams: about `threads` chunks of 16 MiB are in memory. RequestError when the target is the
    source, or a tensor is quantised already (unless `allow_requantize`); ModelError for weights
    that are not finite; OSError for the disk.
    """
    source, target = Path(source), Path(target)
    not_onto(source, target)
    file = GGUFFile(source)
    n_threads = threads or os.cpu_count() or 1
    plan = [(t, policy.type_of(t.name, t.type, t.shape)) for t in file.tensors.values()]
    for tensor, type_ in plan:
        if type_ is tensor.type or tensor.type in FLOAT_TYPES:
            continue
        if tensor.type not in COMPUTE_TYPES:
            raise RequestError(f"{tensor.name} is {tensor.type.name}, which cannot be re-encoded")
        if not allow_requantize:
            raise RequestError(
                f"{tensor.name} is {tensor.type.name} already: quantising twice loses quality; "
                "start from the f16 file, or add --allow-requantize"
            )
    with (
        ThreadPoolExecutor(n_threads) as pool,
        GGUFWriter(target, file.get_str("general.architecture")) as writer,
    ):
        add_metadata(writer, file, policy.target)
        for tensor, type_ in plan:
            writer.declare(tensor.name, type_, tensor.shape)
        for tensor, type_ in plan:
            for data in _encoded(pool, n_threads, tensor, type_):
                writer.write(tensor.name, data)
                progress(len(data) * tensor.cols)


def _encoded(
    pool: ThreadPoolExecutor, n_threads: int, tensor: Tensor, type_: GGMLType
) -> Iterator[U8Array]:
    """Yield the encoded rows of a tensor in order, `n_threads` chunks at a time."""
    chunks = list(row_chunks(tensor.rows, tensor.cols))
    for first in range(0, len(chunks), n_threads):
        yield from pool.map(
            lambda rows: convert_rows(tensor.type, tensor.data[rows], type_, tensor.name),
            chunks[first : first + n_threads],
        )


def add_metadata(writer: GGUFWriter, file: GGUFFile, target: GGMLType) -> None:
    """Copy the keys of `file`, but for those that say how its tensors are stored."""
    skipped = ("general.architecture", "general.file_type", "general.alignment")
    for key, value in file.metadata.items():
        if key not in (*skipped, "general.quantization_version"):
            writer.add(key, value)
    add_file_type(writer, target)


def add_file_type(writer: GGUFWriter, target: GGMLType) -> None:
    """Add llama.cpp's keys that name the type of most tensors."""
    writer.add("general.file_type", Value(ValueType.UINT32, FILE_TYPES[target]))
    if target not in FLOAT_TYPES:
        writer.add("general.quantization_version", Value(ValueType.UINT32, 2))
