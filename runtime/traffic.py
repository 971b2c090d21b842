"""What a token reads: bytes of weights by part, from what its FFNs computed; and of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import Mode
from .gguf import Tensor
from .weights import Weights


@dataclass(frozen=True)
class Traffic:
    """Bytes that one token reads, on average; each row of weights counted whenever it is read."""

    attention: float
    predictor: float
    decider: float  # rows of ffn_gate, or of ffn_up in models without a gate
    up: float
    down: float
    head: float
    cache: float = 0.0  # K and V of earlier tokens, where they are counted

    @property
    def ffn(self) -> float:
        """All that sparsity is about: the FFN and what predicts it."""
        return self.predictor + self.decider + self.up + self.down

    @property
    def total(self) -> float:
        return self.attention + self.ffn + self.head + self.cache


def traffic(weights: Weights, mode: Mode, counts: np.ndarray) -> Traffic:
    """Return the traffic of single tokens (decode), given Buffers.counts summed over some tokens.

    counts [n_layer, COUNTS]. Norms and biases are left out: they are small beside it; the cache is,
    too, in short texts: KVCache.bytes_of.
    """
    tokens = max(int(counts[:, 0].max(initial=0)), 1)
    sums = dict.fromkeys(("attention", "predictor", "decider", "up", "down"), 0.0)
    for layer, (_, decider, up, fired) in zip(weights.layers, counts.tolist(), strict=True):
        sums["attention"] += _bytes(layer.wq, layer.wk, layer.wv, layer.wo)
        if mode == "predicted":
            sums["predictor"] += _bytes(layer.fc1, layer.fc2)
        down = layer.down if layer.down_t is None else layer.down_t
        assert down is not None
        n_ff = layer.decider.rows
        for name, tensor, rows in (
            ("decider", layer.decider, decider),
            ("up", layer.up, up),
            ("down", down, fired),
        ):
            share = 1.0 if mode == "dense" else rows / tokens / n_ff
            sums[name] += _bytes(tensor) * share
    return Traffic(**sums, head=_bytes(weights.output))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
