"""Every operator in plain NumPy: the oracle of all tests, and `--backend numpy`.

Shapes stand beside the arrays. Weights of integer formats meet activations rounded to int8 in
blocks of 32, as in the other backends; `round_activations=False` keeps them float (DESIGN.md
section 6 separates the two errors).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .backend import Plan, Residency
from .cache import PAGE
from .config import POSITION_OFFSET
from .formats import INTEGER_DOT, F32Array, U8Array, decode, round_activations
from .gguf import Tensor
from .step import FIRED, HALF_FIRED

_erf = np.frompyfunc(math.erf, 1, 1)


def activate(kind: str, x: F32Array, threshold: float = 0.0) -> F32Array:
    """Apply an FFN activation to the decider, elementwise; `threshold` is fatrelu's."""
    if kind in ("relu", "drelu"):
        return np.maximum(x, np.float32(0))
    if kind == "fatrelu":
        return np.where(x < np.float32(threshold), np.float32(0), x)
    if kind == "relu2":
        return np.square(np.maximum(x, np.float32(0)))
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return (x * 0.5 * (1 + _erf(x / math.sqrt(2)).astype(np.float64))).astype(np.float32)
    raise ValueError(f"unknown activation {kind!r}")


def layer_norm(x: F32Array, weight: F32Array, bias: F32Array | None, eps: float) -> F32Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (arXiv 1607.06450)."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    y = centred / np.sqrt(variance + np.float32(eps)) * weight
    return y if bias is None else y + bias


def rms_norm(x: F32Array, weight: F32Array, eps: float) -> F32Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467)."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean + np.float32(eps)) * weight


def rope(x: F32Array, table: F32Array, kind: str) -> F32Array:
    """Rotate pairs of each head: (2i, 2i + 1) for `norm`, (i, i + rope_dim / 2) for `neox`.

    x [n_tok, n_head, head_dim]; table [n_tok, 2, rope_dim / 2] of cos and sin.
    """
    cos, sin = table[:, None, 0], table[:, None, 1]  # [n_tok, 1, rope_dim / 2]
    half = cos.shape[-1]
    if kind == "norm":
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


class Reference:
    """The operators of backend.Backend in NumPy."""

    name = "numpy"

    def __init__(self, plan: Plan, round_activations: bool = True) -> None:
        self.plan = plan
        self._round = round_activations
        self._decoded: dict[int, F32Array] = {}  # float32 copies of the weights

    def close(self) -> None:
        self._decoded.clear()

    def residency(self) -> None:
        """All neurons are in one place."""

    def use(self, text: Residency | None) -> None:
        """See residency()."""

    def show(self) -> None:
        """All operators work in plan.buffers, and have finished when they return."""

    def take_mask(self, il: int) -> None:
        """See show()."""

    def finish(self) -> None:
        """See show()."""

    def bound(self, data: U8Array, nbytes: float, tokens: float) -> float:
        return 0.0

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def _w(self, tensor: Tensor) -> F32Array:
        if id(tensor) not in self._decoded:
            self._decoded[id(tensor)] = tensor.float32()
        return self._decoded[id(tensor)]

    def _matmul(self, x: F32Array, w: Tensor, bias: Tensor | None = None) -> F32Array:
        """x [n_tok, inputs] @ w [outputs, inputs]^T + bias -> [n_tok, outputs]."""
        if self._round and w.type in INTEGER_DOT:
            x = round_activations(x)
        y = x @ self._w(w).T
        return y if bias is None else y + self._w(bias)

    def _norm(self, x: F32Array, weight: Tensor, bias: Tensor | None) -> F32Array:
        c = self.plan.config
        if c.traits.norm == "rms":
            return rms_norm(x, self._w(weight), c.norm_eps)
        return layer_norm(x, self._w(weight), None if bias is None else self._w(bias), c.norm_eps)

    def embed(self) -> None:
        step, embd = self.plan.step, self.plan.weights.embd
        n, x = step.n_tok, self.plan.buffers.x
        x[:n] = decode(embd.type, embd.data[step.tokens[:n]])  # rows [n_tok, row bytes]
        positions = self.plan.weights.positions
        if positions is not None:
            rows = positions.data[step.positions[:n] + POSITION_OFFSET]
            x[:n] += decode(positions.type, rows)

    def qkv(self, il: int) -> None:
        c, w, step, b = (
            self.plan.config,
            self.plan.weights.layers[il],
            self.plan.step,
            self.plan.buffers,
        )
        n = step.n_tok
        h = self._norm(b.x[:n], w.attn_norm, w.attn_norm_bias)
        q = self._matmul(h, w.wq, w.bq).reshape(n, c.n_head, c.head_dim)
        k = self._matmul(h, w.wk, w.bk).reshape(n, c.n_head_kv, c.head_dim)
        v = self._matmul(h, w.wv, w.bv).reshape(n, c.n_head_kv, c.head_dim)
        positions = step.positions[:n]
        table = self.plan.rope[positions]  # [n_tok, 2, rope_dim / 2]
        kind = c.traits.rope
        b.q[:n] = rope(q, table, kind).reshape(n, -1)
        pages = step.pages[step.rows[:n], positions // PAGE]  # [n_tok]
        # [n_pages, n_head_kv, 32, head_dim] at (page, :, slot): [n_tok, n_head_kv, head_dim]
        self.plan.cache.k[il][pages, :, positions % PAGE] = rope(k, table, kind)
        self.plan.cache.v[il][pages, :, positions % PAGE] = v

    def attend(self, il: int) -> None:
        c, step, b = self.plan.config, self.plan.step, self.plan.buffers
        group = c.n_head // c.n_head_kv
        for t in range(step.n_tok):
            length = int(step.positions[t]) + 1
            pages = step.pages[step.rows[t], : -(-length // PAGE)]

            def gather(cache: np.ndarray, pages: np.ndarray, length: int) -> F32Array:
                # [n_pages, n_head_kv, 32, head_dim] -> [n_head_kv, length, head_dim]
                x = cache[pages].swapaxes(0, 1).reshape(c.n_head_kv, -1, c.head_dim)
                return x[:, :length].astype(np.float32)

            k = gather(self.plan.cache.k[il], pages, length)
            v = gather(self.plan.cache.v[il], pages, length)
            q = b.q[t].reshape(c.n_head_kv, group, c.head_dim)
            scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(c.head_dim))  # [kv, group, length]
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            b.a[t] = (weights @ v).reshape(-1)

    def out_add(self, il: int) -> None:
        w, n, b = self.plan.weights.layers[il], self.plan.step.n_tok, self.plan.buffers
        b.x[:n] += self._matmul(b.a[:n], w.wo, w.bo)

    def ffn_norm(self, il: int) -> None:
        w, n, b = self.plan.weights.layers[il], self.plan.step.n_tok, self.plan.buffers
        b.h[:n] = self._norm(b.x[:n], w.ffn_norm, w.ffn_norm_bias)

    def predict(self, il: int) -> None:
        w, n, b = self.plan.weights.layers[il], self.plan.step.n_tok, self.plan.buffers
        assert w.fc1 is not None and w.fc2 is not None
        x = b.h if self.plan.config.predictor_input == "normed" else b.x
        hidden = activate("relu", self._matmul(x[:n], w.fc1))  # [n_tok, rank]
        step = self.plan.step
        thresholds = step.thresholds[step.rows[:n], il]  # [n_tok]
        b.scores[:n] = self._matmul(hidden, w.fc2, w.fc2_bias)
        b.mask[:n] = ~(b.scores[:n] < thresholds[:, None])  # NaN counts: damage must show

    def audit(self, il: int) -> None:
        token = self.plan.step.audit[0]
        _, self.plan.buffers.truth[:] = self._activations(il, self.plan.buffers.h[token], None)

    def _activations(
        self, il: int, h: F32Array, mask: np.ndarray | None
    ) -> tuple[F32Array, np.ndarray]:
        """Return act(decider h) * (up h) and who fired, of the neurons in mask (None: all)."""
        w, c = self.plan.weights.layers[il], self.plan.config
        decider = self._matmul(h, w.decider, w.decider_bias)  # [n_tok, n_ff]
        act = activate(c.activation, decider, c.activation_threshold)
        if mask is not None:
            act *= mask
        fired = np.where(act != 0, np.uint8(FIRED), np.uint8(0))
        if w.up is not None:
            up = self._matmul(h, w.up, w.up_bias)
            if c.activation == "drelu":
                up = activate("relu", up)
                fired[(fired != 0) & (up == 0)] = HALF_FIRED
            act *= up
        return act, fired

    def ffn(self, il: int) -> None:
        w, n, b = self.plan.weights.layers[il], self.plan.step.n_tok, self.plan.buffers
        is_predicted = self.plan.mode == "predicted"
        act, fired = self._activations(il, b.h[:n], b.mask[:n] if is_predicted else None)
        b.act[:n], b.fired[:n] = act, fired
        if w.down_t is not None:
            y = act @ self._w(w.down_t)  # [n_tok, n_embd]; down rows meet float activations
        else:
            assert w.down is not None
            y = self._matmul(act, w.down)
        b.x[:n] += y if w.down_bias is None else y + self._w(w.down_bias)
        rows = int(b.mask[:n].sum()) if is_predicted else act.size
        b.counts[il] += (n, rows, np.count_nonzero(fired), np.count_nonzero(fired == FIRED))

    def head(self) -> None:
        step, b = self.plan.step, self.plan.buffers
        x = b.x[step.outputs[: step.n_out]]
        w = self.plan.weights
        h = self._norm(x, w.output_norm, w.output_norm_bias)
        b.logits[: step.n_out] = self._matmul(h, w.output)
