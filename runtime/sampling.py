"""Choosing the next token: penalties, then top-k, top-p, min-p, temperature, then a draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import ModelError, RequestError
from .formats import F32Array

BLOCK = 64  # logits whose largest one is looked at first


@dataclass(frozen=True)
class SamplingOptions:
    """llama.cpp's parameters with its meanings and defaults; RequestError when out of range.

    `temperature` 0 takes the most likely token. `top_k` 0, `top_p` 1, `min_p` 0 and
    `repeat_penalty` 1 switch that step off. `penalty_last_n`: tokens looked back at; -1 all.
    `logit_bias`: token id -> added to its logit (-inf bans it). `seed` None: a new one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, want: str) -> None:
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be {want}")

        check("temperature", 0 <= self.temperature < float("inf"), "0 or more")
        check("top_k", self.top_k >= 0, "0 (off) or more")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        check("repeat_penalty", 1e-3 <= self.repeat_penalty <= 1e3, "between 0.001 and 1000")
        check("penalty_last_n", self.penalty_last_n >= -1, "-1 (all) or more")
        check("seed", self.seed is None or 0 <= self.seed < 1 << 64, "0 to 2^64 - 1")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, bool(abs(getattr(self, name)) <= 1e6), "between -1e6 and 1e6")
        for bias in self.logit_bias.values():
            if np.isnan(bias) or bias == float("inf"):
                raise RequestError("a logit bias must be a number below infinity")


class Sampler:
    """Draws tokens for one text; the same options and seed give the same draws."""

    def __init__(self, options: SamplingOptions, n_vocab: int) -> None:
        self.options = options
        self._rng = np.random.default_rng(options.seed)
        for token in options.logit_bias:
            if not 0 <= token < n_vocab:
                raise RequestError(f"logit bias names token {token}, outside 0 to {n_vocab - 1}")

    def sample(self, logits: F32Array, history: Sequence[int]) -> int:
        """Choose a token from `logits` [n_vocab]; `history` is the text so far, oldest first.

        ModelError if a logit is NaN or infinite.
        """
        o = self.options
        logits = logits.astype(np.float64)
        if not np.isfinite(logits).all():
            raise ModelError("the model computed logits that are not finite: its file is damaged")
        self._penalise(logits, history)
        for token, bias in o.logit_bias.items():
            logits[token] += bias
        peak = logits.max()
        if not np.isfinite(peak):
            raise RequestError("penalties and logit biases leave no token to choose")
        if o.temperature == 0:
            return int(logits.argmax())
        logits -= peak  # before any division: a tiny temperature must not overflow

        # All cuts keep the likeliest tokens: only those that may pass are put in order.
        order = _likeliest(logits, o.top_k) if o.top_k else np.arange(len(logits))
        p = _softmax(logits[order])
        kept = np.flatnonzero(p >= o.min_p * p.max())
        # Lower ids first among equals: the draw must not depend on how they were found.
        kept = kept[np.lexsort((order[kept], -logits[order[kept]]))]
        order, p = order[kept], p[kept]
        if o.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(p), o.top_p)) + 1
            order = order[:keep]
        with np.errstate(over="ignore"):
            p = _softmax(logits[order] / o.temperature)
        drawn = int(np.searchsorted(np.cumsum(p), self._rng.random() * p.sum(), side="right"))
        return int(order[min(drawn, len(order) - 1)])

    def _penalise(self, logits: np.ndarray, history: Sequence[int]) -> None:
        o = self.options
        if (o.repeat_penalty, o.presence_penalty, o.frequency_penalty) == (1, 0, 0):
            return
        recent = history if o.penalty_last_n < 0 else history[-o.penalty_last_n :]
        if o.penalty_last_n == 0 or not recent:
            return
        tokens, times = np.unique(np.asarray(recent), return_counts=True)
        x = logits[tokens]
        # A negative logit is multiplied: dividing it would make the token likelier.
        x = np.where(x > 0, x / o.repeat_penalty, x * o.repeat_penalty)
        logits[tokens] = x - o.presence_penalty - o.frequency_penalty * times


def _likeliest(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the ids of the k largest logits; the lower ones of equal ones."""
    if k >= len(logits):
        return np.arange(len(logits))
    # The k-th of the largest of each BLOCK is no more than the k-th of all.
    whole = len(logits) // BLOCK * BLOCK
    peaks = logits[:whole].reshape(-1, BLOCK).max(axis=1)
    if k < len(peaks):
        found = np.flatnonzero(logits >= np.partition(peaks, -k)[-k])
    else:
        found = np.arange(len(logits))
    return found[np.lexsort((found, -logits[found]))[:k]]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())
