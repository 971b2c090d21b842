"""Hostile GGUF files, built byte by byte.

The cases of llama.cpp's tests/test-gguf.cpp carry its names behind "llama.cpp:"; the others come
from the CVEs of this field (lengths and counts that wrap, offsets past the end, nested arrays).
"""

from __future__ import annotations

import struct


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, type_: int, body: bytes) -> bytes:
    return string(name) + struct.pack("<I", type_) + body


def tensor(name="t", dims=(32, 2), type_=0, offset=0) -> bytes:
    head = string(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, type_, offset)


def header(n_tensors=0, n_keys=0, magic=b"GGUF", version=3) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys)


PAD = bytes(512)
U64 = struct.Struct("<Q").pack
U32 = struct.Struct("<I").pack
HOSTILE = {
    "empty": b"",
    "text": b"this is not a model at all, just text",
    "bad magic": header(magic=b"GGML") + PAD,
    "version 1": header(version=1) + PAD,
    "version 4": header(version=4) + PAD,
    "big-endian": header(version=0x03000000) + PAD,
    "key count huge": header(n_keys=1 << 62) + PAD,
    "tensor count huge": header(n_tensors=1 << 62) + PAD,
    "key length huge": header(n_keys=1) + U64((1 << 64) - 1) + PAD,
    "key empty": header(n_keys=1) + key("", 4, U32(1)) + PAD,
    "key not utf-8": header(n_keys=1) + string(b"\xff\xfe") + U32(4) + U32(1) + PAD,
    "key twice": header(n_keys=2) + key("a", 4, U32(1)) * 2 + PAD,
    "value type unknown": header(n_keys=1) + key("a", 13, U32(1)) + PAD,
    "string length huge": header(n_keys=1) + key("a", 8, U64(1 << 63)) + PAD,
    "string not utf-8": header(n_keys=1) + key("a", 8, string(b"\xc0\x80")) + PAD,
    "bool of 2": header(n_keys=1) + key("a", 7, b"\x02") + PAD,
    "array of bool with 2": header(n_keys=1) + key("a", 9, U32(7) + U64(1) + b"\x02") + PAD,
    "array of arrays": header(n_keys=1) + key("a", 9, U32(9) + U64(1)) + PAD,
    "array count huge": header(n_keys=1) + key("a", 9, U32(0) + U64(1 << 63)) + PAD,
    "array count wraps": header(n_keys=1) + key("a", 9, U32(10) + U64((1 << 61) + 1)) + PAD,
    "string array count huge": header(n_keys=1) + key("a", 9, U32(8) + U64(1 << 60)) + PAD,
    "string in array too long": header(n_keys=1)
    + key("a", 9, U32(8) + U64(2) + string("x") + U64(1 << 40))
    + PAD,
    "alignment 0": header(n_keys=1) + key("general.alignment", 4, U32(0)) + PAD,
    "alignment 33": header(n_keys=1) + key("general.alignment", 4, U32(33)) + PAD,
    "alignment a string": header(n_keys=1) + key("general.alignment", 8, string("32")) + PAD,
    "tensor twice": header(n_tensors=2) + tensor() + tensor(offset=256) + PAD * 2,
    "tensor name empty": header(n_tensors=1) + tensor(name="") + PAD,
    "tensor of 0 dimensions": header(n_tensors=1) + tensor(dims=()) + PAD,
    "tensor of 5 dimensions": header(n_tensors=1) + tensor(dims=(1,) * 5) + PAD,
    "tensor dimension 0": header(n_tensors=1) + tensor(dims=(32, 0)) + PAD,
    "tensor dimensions overflow": header(n_tensors=1) + tensor(dims=(1 << 62, 1 << 62)) + PAD,
    "tensor size wraps to 0": header(n_tensors=1) + tensor(dims=(1 << 32, 1 << 32)) + PAD,
    "tensor type unknown": header(n_tensors=1) + tensor(type_=99) + PAD,
    "tensor type removed": header(n_tensors=1) + tensor(type_=4) + PAD,
    "tensor rows no whole blocks": header(n_tensors=1) + tensor(dims=(33, 2), type_=2) + PAD,
    "tensor offset misaligned": header(n_tensors=1) + tensor(offset=1) + PAD,
    "tensor offset past the end": header(n_tensors=1) + tensor(offset=1 << 20) + PAD,
    "tensor offset wraps": header(n_tensors=1) + tensor(offset=(1 << 64) - 64) + PAD,
    "tensors overlap": header(n_tensors=2) + tensor("a") + tensor("b", offset=128) + PAD * 2,
    "tensor data cut": header(n_tensors=1) + tensor(dims=(256, 2)) + PAD,
}


def _llama_cpp(name: str, raw: bytes) -> None:
    HOSTILE[f"llama.cpp: {name}"] = raw


# HANDCRAFTED_HEADER_*, _KV_*, _TENSORS_*, _DATA_* of test-gguf.cpp; what it calls success is a
# good file for us as well and stands in test_gguf.py.
_kv = key("a", 4, U32(1))
_llama_cpp("HEADER_BAD_MAGIC", header(magic=b"FUGG") + PAD)
_llama_cpp("HEADER_BAD_VERSION_0", header(version=0) + PAD)
_llama_cpp("HEADER_BAD_VERSION_1", header(version=1) + PAD)
_llama_cpp("HEADER_BAD_VERSION_FUTURE", header(version=4) + PAD)
_llama_cpp("HEADER_BAD_VERSION_BIG_ENDIAN", header(version=0x03000000) + PAD)
_llama_cpp("HEADER_BAD_N_TENSORS", header(n_tensors=(1 << 64) - 1) + PAD)
_llama_cpp("HEADER_BAD_N_KV", header(n_keys=(1 << 64) - 1) + PAD)
_llama_cpp("KV_BAD_KEY_SIZE", header(n_keys=1) + U64(0) + U32(4) + U32(1) + PAD)
_llama_cpp("KV_BAD_TYPE", header(n_keys=1) + key("a", 0xFFFFFFFF, U32(1)) + PAD)
_llama_cpp("KV_DUPLICATE_KEY", header(n_keys=2) + _kv + _kv + PAD)
_llama_cpp("KV_BAD_ALIGN", header(n_keys=1) + key("general.alignment", 4, U32(13)) + PAD)
_llama_cpp("TENSORS_BAD_NAME_SIZE", header(n_tensors=1) + tensor(name="n" * 4096) + PAD)
_llama_cpp("TENSORS_BAD_N_DIMS", header(n_tensors=1) + tensor(dims=(32,) * 5) + PAD)
_llama_cpp("TENSORS_BAD_SHAPE", header(n_tensors=1) + tensor(dims=(32, (1 << 64) - 1)) + PAD)
_llama_cpp("TENSORS_NE_TOO_BIG", header(n_tensors=1) + tensor(dims=(1 << 31, 1 << 31)) + PAD)
_llama_cpp("TENSORS_NBYTES_TOO_BIG", header(n_tensors=1) + tensor(dims=(1 << 40, 1)) + PAD)
_llama_cpp("TENSORS_BAD_TYPE", header(n_tensors=1) + tensor(type_=0x7FFFFFFF) + PAD)
_llama_cpp("TENSORS_BAD_OFFSET", header(n_tensors=1) + tensor(offset=1 << 40) + PAD)
_llama_cpp(
    "TENSORS_DUPLICATE_NAME", header(n_tensors=2) + tensor("a") + tensor("a", offset=256) + PAD * 2
)
_llama_cpp("TENSORS_BAD_ALIGN", header(n_tensors=1) + tensor(offset=16) + PAD)
_llama_cpp(
    "TENSORS_INCONSISTENT_ALIGN",
    header(n_tensors=2, n_keys=1)
    + key("general.alignment", 4, U32(64))
    + tensor("a", dims=(8, 1))
    + tensor("b", dims=(8, 1), offset=32)
    + PAD,
)
_llama_cpp("DATA_NOT_ENOUGH_DATA", header(n_tensors=1) + tensor(dims=(128, 1)) + bytes(64))
_llama_cpp("DATA_BAD_ALIGN", header(n_tensors=1) + tensor(dims=(256, 1), offset=7) + PAD * 4)
