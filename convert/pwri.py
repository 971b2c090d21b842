"""Files as the original PowerInfer writes and loads them (magic PWRI), from the same checkpoints.

Its order of neurons, its names, its types: f16, or q4_0 with an output head of Q6_K. The encoders
here give its bytes: it was compiled with fused multiply-adds, where gguf.quants rounds twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..quantize.policy import Policy
from ..runtime.errors import ModelError
from ..runtime.formats import QK, F32Array, GGMLType, U8Array, encode

MAGIC = b"PWRI"
TARGETS = (GGMLType.F16, GGMLType.Q4_0)
# What its files cannot say: they have no key for the activation.
_ACTIVATIONS = {("llama", "relu"): "llama", ("llama", "drelu"): "bamboo"}
_ACTIVATIONS |= {(arch, "relu"): arch for arch in ("falcon", "opt")}
_QK_K = 256


@dataclass(frozen=True)
class PwriPolicy(Policy):
    """The types of the original's tools: one for all matrices, Q6_K for the head under q4_0."""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ModelError("the original PowerInfer works with f16 and q4_0 only")

    def type_of(self, name: str, type_: GGMLType, shape: tuple[int, ...]) -> GGMLType:
        if len(shape) == 1:
            return GGMLType.F32
        if self.target is GGMLType.Q4_0:
            if name == "output.weight" and shape[-1] % _QK_K == 0:
                return GGMLType.Q6_K
            return GGMLType.Q4_0 if shape[-1] % QK == 0 else GGMLType.F16
        return self.target


def architecture(gguf: str, activation: str) -> str:
    """Return the original's name for a model; ModelError if its files cannot express it."""
    try:
        return _ACTIVATIONS[gguf, activation]
    except KeyError:
        raise ModelError(
            f"the original PowerInfer has no {gguf} model with the activation {activation!r}"
        ) from None


def encode_original(type_: GGMLType, x: F32Array) -> U8Array:
    """Encode float32 rows [n, cols] to the bytes that the original's quantiser writes."""
    if type_ not in (GGMLType.Q4_0, GGMLType.Q6_K):
        return encode(type_, x)
    with np.errstate(over="ignore"):
        x = x.astype(np.float16).astype(np.float32)  # it quantises its own f16 files
    return _encode_q4_0(x) if type_ is GGMLType.Q4_0 else _encode_q6_k(x)


def _fma(x: F32Array, y: F32Array, z: F32Array | np.float32) -> F32Array:
    """x * y + z rounded once: the product of two float32 is exact in float64."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _encode_q4_0(x: F32Array) -> U8Array:
    blocks = x.reshape(len(x), -1, QK)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
    scale = peak / np.float32(-8)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        q = np.trunc(_fma(blocks, inverse, np.float32(8.5))).astype(np.uint8).clip(0, 15)
        raw = scale.astype(np.float16).view(np.uint8)
    nibbles = q[..., : QK // 2] | q[..., QK // 2 :] << np.uint8(4)
    return np.concatenate([raw, nibbles], axis=-1).reshape(len(x), -1)


def _group_scales(x: F32Array) -> F32Array:
    """Return the scale of each group [..., 16] that keeps the weighted error smallest.

    ggml's make_qx_quants (k_quants.c) with weights x^2: the scale that maps the largest value to
    -32 is tried, and 18 near it; for each, the best scale for the rounded numbers is a quotient
    of two sums.
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    weight = x * x

    def sums(inverse: F32Array) -> tuple[F32Array, F32Array]:
        q = np.clip(np.rint(inverse * x), -32, 31).astype(np.float32)
        xq, qq = np.zeros_like(x[..., 0]), np.zeros_like(x[..., 0])
        for i in range(x.shape[-1]):  # in the original's order
            xq = _fma(weight[..., i] * x[..., i], q[..., i], xq)
            qq = _fma(weight[..., i] * q[..., i], q[..., i], qq)
        return xq, qq

    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        xq, qq = sums(np.float32(-32) / peak)
        scale = xq / qq
        best = scale * xq
        for step in (*range(-9, 0), *range(1, 10)):
            xq, qq = sums(-(np.float32(32) + np.float32(0.1) * np.float32(step)) / peak)
            is_better = (qq > 0) & (xq * xq > best * qq)
            scale = np.where(is_better, xq / qq, scale)
            best = np.where(is_better, scale * xq, best)
    return np.where(np.abs(peak[..., 0]) < 1e-30, np.float32(0), scale)


def _encode_q6_k(x: F32Array) -> U8Array:
    groups = x.reshape(len(x), -1, 16, 16)  # [rows, blocks, groups, 16]
    scales = _group_scales(groups)
    peak = np.take_along_axis(scales, np.abs(scales).argmax(axis=-1)[..., None], axis=-1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.float32(-128) / peak
        d = np.where(peak == 0, np.float32(0), np.float32(1) / inverse).astype(np.float16)
        s = np.minimum(127, np.rint(np.where(peak == 0, 0, inverse * scales))).astype(np.int8)
        effective = (d.astype(np.float32) * s.astype(np.float32))[..., None]
        q = np.clip(np.rint(groups / effective), -32, 31)
    q = np.where(effective == 0, 0, np.where(peak[..., None] == 0, -32, q)) + 32
    # Two halves of four quarters of 32: nibbles of quarters 0 and 2, 1 and 3; then bit pairs.
    quarters = q.astype(np.uint8).reshape(len(x), -1, 2, 4, 32)
    a, b, c, e = (quarters[..., i, :] for i in range(4))
    low = np.concatenate([a & 15 | (c & 15) << 4, b & 15 | (e & 15) << 4], axis=-1)
    high = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6
    parts = [p.reshape(len(x), low.shape[1], -1) for p in (low, high)]
    return np.concatenate([*parts, s.view(np.uint8), d.view(np.uint8)], axis=-1).reshape(len(x), -1)
