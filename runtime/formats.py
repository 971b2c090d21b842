"""Block formats of ggml tensors: sizes, names, decoding and encoding in NumPy (the oracle).

Source: ggml-common.h / ggml-quants.c of llama.cpp; gguf.quants gives the same bytes.
A row of n weights is stored as n / block_size blocks of block_bytes each:

    F32, F16, BF16   one number a block
    Q8_0             32 weights: fp16 d, 32 int8 q;                         w = d * q
    Q4_0             32 weights: fp16 d, 16 bytes of nibbles q;             w = d * (q - 8)
                     byte j holds weight j in its low nibble, weight j + 16 in its high one
    Q4_1             32 weights: fp16 d, fp16 m, nibbles as above;          w = d * q + m
    Q5_0, Q5_1       the same with a fifth bit of weight j in bit j of a u32 before the nibbles
                     w = d * (q - 16) or d * q + m
    Q4_K             256 weights in 8 groups of 32: fp16 d, fp16 dmin, 12 bytes of 6-bit scales s
                     and minima m of the groups, 128 bytes of nibbles;      w = d * s * q - dmin * m
    Q5_K             the same with 32 bytes of fifth bits before the nibbles
    Q6_K             256 weights in 16 groups of 16: 128 bytes of low nibbles, 64 bytes of upper
                     bit pairs, 16 int8 scales s, fp16 d;                   w = d * s * (q - 32)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

QK = 32  # weights in a block of every format that we compute with
# Blocks of activations below it count as zero: 127 divided by less might overflow.
SMALLEST_AMAX = np.float32(2.0**-100)


class GGMLType(IntEnum):
    """Tensor types of GGUF, by their number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


# PowerInfer forked ggml before the IQ types existed: in PWRI files these numbers mean integers.
LEGACY_PWRI_TYPES = {16: GGMLType.I8, 17: GGMLType.I16, 18: GGMLType.I32}

# (weights in a block, bytes in a block)
BLOCK_SIZES: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.F64: (1, 8),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q8_1: (32, 40),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.Q8_K: (256, 292),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.MXFP4: (32, 17),
}

# Plain NumPy dtypes, for the types that are arrays of ordinary numbers.
NUMPY_DTYPES: dict[GGMLType, np.dtype[np.generic]] = {
    GGMLType.F32: np.dtype("<f4"),
    GGMLType.F16: np.dtype("<f2"),
    GGMLType.F64: np.dtype("<f8"),
    GGMLType.I8: np.dtype("i1"),
    GGMLType.I16: np.dtype("<i2"),
    GGMLType.I32: np.dtype("<i4"),
    GGMLType.I64: np.dtype("<i8"),
}

# Types whose dot products round the activations to int8 (DESIGN: activation rounding).
INTEGER_DOT = frozenset({GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q6_K})
# Types that `reference` and `cpu` compute with.
COMPUTE_TYPES = frozenset(
    {
        GGMLType.F32,
        GGMLType.F16,
        GGMLType.BF16,
        GGMLType.Q8_0,
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q5_0,
        GGMLType.Q5_1,
        GGMLType.Q4_K,
        GGMLType.Q5_K,
        GGMLType.Q6_K,
    }
)


def row_bytes(type_: GGMLType, n: int) -> int:
    """Return the bytes of a row of `n` weights; ValueError if it is not whole blocks."""
    block, size = BLOCK_SIZES[type_]
    if n % block:
        raise ValueError(f"a row of {n} is not a whole number of {type_.name} blocks of {block}")
    return n // block * size


def decode(type_: GGMLType, data: U8Array) -> F32Array:
    """Decode raw rows to float32.

    `data`: uint8 [..., row bytes]. Returns float32 [..., n]. ValueError for a type that this
    version cannot decode.
    """
    if type_ is GGMLType.F32:
        return np.ascontiguousarray(data).view(np.float32)
    if type_ is GGMLType.F16:
        return np.ascontiguousarray(data).view(np.float16).astype(np.float32)
    if type_ is GGMLType.BF16:
        bits = np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    if type_ not in COMPUTE_TYPES:
        raise ValueError(f"{type_.name} tensors cannot be decoded")
    size = BLOCK_SIZES[type_][1]
    blocks = np.ascontiguousarray(data).reshape(*data.shape[:-1], -1, size)
    with np.errstate(invalid="ignore"):  # a scale that overflowed to infinity, times 0
        return _DECODERS[type_](blocks).reshape(*data.shape[:-1], -1)


def _halves(raw: U8Array) -> F32Array:
    """Read bytes as fp16 numbers: [..., 2 n] -> float32 [..., n]."""
    return raw.copy().view(np.float16).astype(np.float32)


def _nibbles(raw: U8Array) -> U8Array:
    """All low nibbles, then all high ones: [..., n] -> [..., 2 n]."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _bits(raw: U8Array) -> U8Array:
    """Bits of bytes, lowest first: [..., n] -> [..., 8 n]."""
    return np.unpackbits(raw, axis=-1, bitorder="little")


def _decode_q8_0(b: U8Array) -> F32Array:
    return _halves(b[..., :2]) * b[..., 2:].view(np.int8).astype(np.float32)


def _decode_q4_0(b: U8Array) -> F32Array:
    return _halves(b[..., :2]) * (_nibbles(b[..., 2:]).astype(np.float32) - 8)


def _decode_q4_1(b: U8Array) -> F32Array:
    scale = _halves(b[..., :4])
    return scale[..., :1] * _nibbles(b[..., 4:]).astype(np.float32) + scale[..., 1:]


def _decode_q5_0(b: U8Array) -> F32Array:
    q = _nibbles(b[..., 6:]) | _bits(b[..., 2:6]) << 4
    return _halves(b[..., :2]) * (q.astype(np.float32) - 16)


def _decode_q5_1(b: U8Array) -> F32Array:
    scale = _halves(b[..., :4])
    q = _nibbles(b[..., 8:]) | _bits(b[..., 4:8]) << 4
    return scale[..., :1] * q.astype(np.float32) + scale[..., 1:]


def _k_scales(b: U8Array) -> tuple[F32Array, F32Array]:
    """Return d * s and dmin * m of the 8 groups of a Q4_K or Q5_K block: [..., 8] each.

    The 12 bytes hold 6-bit numbers: of groups 0 to 3 in the low bits of bytes 0-3 (s) and 4-7 (m),
    of groups 4 to 7 in the nibbles of bytes 8-11, with their upper two bits atop bytes 0-7.
    """
    d = _halves(b[..., :4])
    s, m, rest = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = np.concatenate([s & 63, (rest & 15) | (s >> 6) << 4], axis=-1)
    minima = np.concatenate([m & 63, (rest >> 4) | (m >> 6) << 4], axis=-1)
    return d[..., :1] * scales.astype(np.float32), d[..., 1:] * minima.astype(np.float32)


def _decode_q4_k(b: U8Array, upper: U8Array | None = None) -> F32Array:
    scales, minima = _k_scales(b)
    quants = b[..., -128:].reshape(*b.shape[:-1], 4, 32)
    q = _nibbles(quants).reshape(
        *b.shape[:-1], 8, 32
    )  # low nibbles are a group, high ones the next
    if upper is not None:
        q |= upper << np.uint8(4)
    return scales[..., None] * q.astype(np.float32) - minima[..., None]


def _decode_q5_k(b: U8Array) -> F32Array:
    # Bit g of byte j is the fifth bit of weight j of group g.
    groups = np.arange(8, dtype=np.uint8)[:, None]
    upper: U8Array = (b[..., None, 16:48] >> groups) & np.uint8(1)
    return _decode_q4_k(b, upper)


def _decode_q6_k(b: U8Array) -> F32Array:
    # Two halves of 128 weights: 64 bytes of nibbles, 32 bytes of bit pairs each.
    low = _nibbles(b[..., :128].reshape(*b.shape[:-1], 2, 64)).reshape(*b.shape[:-1], 2, 4, 32)
    pairs = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32)
    q = low | (pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
    scales = _halves(b[..., 208:]) * b[..., 192:208].view(np.int8).astype(np.float32)
    weights = q.reshape(*b.shape[:-1], 16, 16).astype(np.float32) - 32
    return scales[..., None] * weights


_DECODERS: dict[GGMLType, Callable[[U8Array], F32Array]] = {
    GGMLType.Q8_0: _decode_q8_0,
    GGMLType.Q4_0: _decode_q4_0,
    GGMLType.Q4_1: _decode_q4_1,
    GGMLType.Q5_0: _decode_q5_0,
    GGMLType.Q5_1: _decode_q5_1,
    GGMLType.Q4_K: _decode_q4_k,
    GGMLType.Q5_K: _decode_q5_k,
    GGMLType.Q6_K: _decode_q6_k,
}


def encode(type_: GGMLType, x: F32Array) -> U8Array:
    """Encode float32 rows into raw rows, the same bytes as gguf.quants.

    `x`: float32 [..., n]. Returns uint8 [..., row bytes]. ValueError for a type that is not
    written by this version.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    if type_ is GGMLType.F32:
        return x.view(np.uint8)
    if type_ is GGMLType.F16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint8)
    if type_ is GGMLType.BF16:
        return _encode_bf16(x).view(np.uint8)
    if type_ not in _ENCODERS:
        raise ValueError(f"{type_.name} tensors cannot be written")
    row_bytes(type_, x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], -1, QK)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        raw = _ENCODERS[type_](blocks)
    return raw.reshape(*x.shape[:-1], -1)


def _encode_bf16(x: F32Array) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16, half to even; NaN stays a (quiet) NaN."""
    bits = x.view(np.uint32)
    rounded = (bits.astype(np.uint64) + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 64, rounded).astype(np.uint16)


def _round_half_away(x: F32Array) -> F32Array:
    """Round half away from zero, as C's roundf does (np.round goes to even)."""
    floor = np.floor(np.abs(x))
    return np.sign(x) * (floor + np.floor(2 * (np.abs(x) - floor)))


def _inverse(scale: F32Array) -> F32Array:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _half_bytes(x: F32Array) -> U8Array:
    return x.astype(np.float16).view(np.uint8)


def _pack_nibbles(q: U8Array) -> U8Array:
    return (q[..., : QK // 2] & np.uint8(15)) | (q[..., QK // 2 :] << np.uint8(4))


def _encode_q8_0(blocks: F32Array) -> U8Array:
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    quants = _round_half_away(blocks * _inverse(scale)).astype(np.int8).view(np.uint8)
    return np.concatenate([_half_bytes(scale), quants], axis=-1)


def _encode_symmetric(blocks: F32Array, bits: int) -> U8Array:
    """Q4_0 and Q5_0: the value of largest magnitude, with its sign, maps to q = 0."""
    middle = 1 << (bits - 1)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
    scale = peak / np.float32(-middle)
    shifted = blocks * _inverse(scale) + np.float32(middle + 0.5)
    q = np.trunc(shifted).astype(np.uint8).clip(0, 2 * middle - 1)
    upper = [np.packbits(q >> 4, axis=-1, bitorder="little")] if bits == 5 else []
    return np.concatenate([_half_bytes(scale), *upper, _pack_nibbles(q)], axis=-1)


def _encode_offset(blocks: F32Array, bits: int) -> U8Array:
    """Q4_1 and Q5_1: the smallest value maps to 0, the largest to the top."""
    low = blocks.min(axis=-1, keepdims=True)
    top = (1 << bits) - 1
    scale = (blocks.max(axis=-1, keepdims=True) - low) / np.float32(top)
    shifted = (blocks - low) * _inverse(scale) + np.float32(0.5)
    q = np.trunc(shifted).astype(np.uint8).clip(0, top)
    upper = [np.packbits(q >> 4, axis=-1, bitorder="little")] if bits == 5 else []
    return np.concatenate([_half_bytes(scale), _half_bytes(low), *upper, _pack_nibbles(q)], axis=-1)


_ENCODERS: dict[GGMLType, Callable[[F32Array], U8Array]] = {
    GGMLType.Q8_0: _encode_q8_0,
    GGMLType.Q4_0: lambda blocks: _encode_symmetric(blocks, 4),
    GGMLType.Q5_0: lambda blocks: _encode_symmetric(blocks, 5),
    GGMLType.Q4_1: lambda blocks: _encode_offset(blocks, 4),
    GGMLType.Q5_1: lambda blocks: _encode_offset(blocks, 5),
}


def round_activations(x: F32Array) -> F32Array:
    """Round activations as the integer dot products do, and return them as float32.

    Blocks of 32 along the last axis (the last may be short): scale amax / 127 kept in float32,
    values rounded half to even (DESIGN.md section 6, error 2).
    """
    n = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-n // QK) * QK), dtype=np.float32)
    padded[..., :n] = x
    blocks = padded.reshape(*x.shape[:-1], -1, QK)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    amax = np.where(amax < SMALLEST_AMAX, np.float32(0), amax)
    with np.errstate(divide="ignore"):
        inverse = np.where(amax == 0, np.float32(0), np.float32(127) / amax)
    rounded = np.rint(blocks * inverse) * (amax / np.float32(127))
    return rounded.reshape(padded.shape)[..., :n]
