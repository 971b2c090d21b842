"""Operands of products on the device, for tests: weights of every format, and what meets them."""

from __future__ import annotations

from typing import Any

import cuda_case
import numpy as np
from cusim.sim import Simulator
from powerinfer.runtime.formats import (
    INTEGER_DOT,
    QK,
    SMALLEST_AMAX,
    GGMLType,
    decode,
    encode,
    round_activations,
    row_bytes,
)

FORMATS = {
    "q4_0": GGMLType.Q4_0,
    "q8_0": GGMLType.Q8_0,
    "q6_k": GGMLType.Q6_K,
    "f16": GGMLType.F16,
    "f32": GGMLType.F32,
}


def only(suffix: str, macro: str) -> dict[str, str]:
    """Return what to replace in a .cu file so that a macro makes kernels of one format alone."""
    names = {"q4_0": "Q4_0", "q8_0": "Q8_0", "q6_k": "Q6_K", "f16": "F16", "f32": "F32"}
    return {f"\n{macro}({s}, {name})": "" for s, name in names.items() if s != suffix}


class Weights:
    """Random weights: `type`, and `values` float32 [rows, cols] as reference has them."""

    def __init__(self, rng: np.random.Generator, suffix: str, rows: int, cols: int) -> None:
        self.type, self.rows, self.cols = FORMATS[suffix], rows, cols
        if self.type is GGMLType.Q6_K:  # nothing writes it: random bytes, with scales that are sane
            blocks = rng.integers(0, 256, (rows, cols // 256, 210), dtype=np.uint8)
            scales = rng.uniform(-3e-4, 3e-4, (rows, cols // 256, 1)).astype(np.float16)
            blocks[..., 208:] = scales.view(np.uint8)
            self.raw = blocks.reshape(rows, row_bytes(self.type, cols))
        else:
            self.raw = encode(self.type, rng.standard_normal((rows, cols), np.float32))
        self.values = decode(self.type, self.raw)

    def float32(self) -> np.ndarray:  # as a Tensor's
        return self.values

    def matrix(self, sim: Simulator, rows: np.ndarray | None = None) -> tuple[Any, ...]:
        """Return a Matrix on the device. `rows` [n]: which row of these each of its rows is.

        Rows of -1 hold what is worst to read: all bits set, NaN where the format has one.
        """
        raw = self.raw if rows is None else self.raw[rows]
        if rows is not None:
            raw[rows < 0] = 0xFF
        return cuda_case.matrix(sim, self.type, raw, self.cols)


NO_TF32 = {"HAS_TF32 = true": "HAS_TF32 = false"}  # to replace: tensor cores as Turing has them
NO_MATRIX = (None, None, 0, 0)


def pack(x: np.ndarray) -> list[np.ndarray]:
    """Return q int8, d float32 and s int32 of activations [n_tok, cols], as Packed has them."""
    blocks = x.reshape(len(x), -1, QK)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    amax[amax < SMALLEST_AMAX] = 0
    inverse = np.zeros_like(amax)
    np.divide(np.float32(127), amax, out=inverse, where=amax > 0)
    q = np.rint(blocks * inverse).astype(np.int8)
    d = amax / np.float32(127)
    assert np.array_equal((q * d).reshape(x.shape), round_activations(x))
    return [q.reshape(x.shape), d[..., 0], q.sum(axis=-1, dtype=np.int32)]


class Inputs:
    """Activations [n_tok, cols] for weights of a type: `values`, and the device's `fields`."""

    @staticmethod
    def rounded(type_: GGMLType, x: np.ndarray) -> np.ndarray:
        """Return activations as weights of a type meet them."""
        return round_activations(x) if type_ in INTEGER_DOT else x

    def __init__(self, sim: Simulator, type_: GGMLType, x: np.ndarray) -> None:
        self.values = self.rounded(type_, x)
        if type_ in INTEGER_DOT:
            packed = [
                sim.array(part, f"x.{name}") for part, name in zip(pack(x), "qds", strict=True)
            ]
            self.fields: dict[str, Any] = {"x": None, "x_packed": packed}
        else:
            self.fields = {"x": sim.array(x, "x"), "x_packed": cuda_case.NOT_PACKED}


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return x [n, k] . w [m, k] -> [n, m], in double precision."""
    return x.astype(np.float64) @ w.astype(np.float64).T


def close_enough(ours: np.ndarray, theirs: np.ndarray, relative: float = 1e-5) -> None:
    """Assert equality within `relative` of the largest value."""
    assert ours.shape == theirs.shape
    worst = np.abs(theirs).max(initial=0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * worst)
