"""What a model is worth: perplexity, distance from another model, and how good its predictors are.

The figures and their names are those of llama.cpp's perplexity tool, so that they can be compared:
each window's first half is context only, the tokens after it are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.backend import Backend
from ..runtime.engine import Engine
from ..runtime.formats import F32Array
from ..runtime.model import Watcher, audit
from ..runtime.step import COUNTS
from ..runtime.traffic import Traffic, traffic

MakeMask = Callable[[Backend, int], None]
F64Array = np.ndarray[Any, np.dtype[np.float64]]


def log_softmax(logits: F32Array) -> F64Array:
    """Return log probabilities in float64 [n_tok, n_vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(base: F64Array, ours: F64Array) -> F64Array:
    """Return KL(base || ours) of each token in nats, from log probabilities [n_tok, n_vocab]."""
    # Rounding leaves -1e-16 where the two agree.
    return np.maximum((np.exp(base) * (base - ours)).sum(axis=-1), 0)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: F64Array) -> Estimate:
        n = len(values)
        return cls(float(values.mean()), float(values.std() / np.sqrt(max(n - 1, 1))))


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token probabilities are from a base model's, over scored tokens."""

    perplexity: float  # of the base
    log_ratio: Estimate  # ln(perplexity / base's)
    kl: Estimate  # nats
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: Estimate  # share of tokens with the same most likely successor
    delta_p: Estimate  # change of the probability of the token that follows
    delta_p_rms: float


@dataclass(frozen=True)
class Recall:
    """How a layer's predictor did: each token's own mask against who fires in truth."""

    recall: float  # of the neurons that fire, the share that is predicted
    precision: float  # of the predicted, the share that fires
    predicted_share: float  # of all neurons
    firing_share: float


@dataclass(frozen=True)
class Quality:
    """All that measure() finds out."""

    tokens: int  # scored
    perplexity: Estimate
    divergence: Divergence | None  # None: there was no base
    layers: list[Recall]  # empty: no predictors in use
    traffic: Traffic  # of a token


class RecallWatcher(Watcher):
    """Compares predictions with the truth at every FFN, on the stream that the model really has."""

    def __init__(self, n_layer: int, n_ff: int, masks: MakeMask | None = None) -> None:
        self._n_ff, self._masks = n_ff, masks
        self.firing = np.zeros((n_layer, n_ff), np.int64)  # tokens for which each neuron fires
        self._sums = np.zeros((n_layer, 3), np.int64)  # tokens, predicted, fired and predicted

    def before_ffn(self, ops: Backend, il: int) -> None:
        if self._masks is not None:
            self._masks(ops, il)
        for t in range(ops.plan.step.n_tok):
            fired, mask = audit(ops, il, t), ops.plan.buffers.mask[t] != 0
            self.firing[il] += fired
            self._sums[il] += 1, mask.sum(), (fired & mask).sum()

    def results(self) -> list[Recall]:
        out = []
        for firing, (tokens, predicted, hit) in zip(self.firing, self._sums.tolist(), strict=True):
            fired = int(firing.sum())
            n = max(tokens * self._n_ff, 1)
            out.append(
                Recall(
                    recall=hit / fired if fired else 1.0,
                    precision=hit / predicted if predicted else 1.0,
                    predicted_share=predicted / n,
                    firing_share=fired / n,
                )
            )
        return out


def measure(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    base: Engine | None = None,
    progress: Callable[[int], Any] = lambda _: None,
    masks: MakeMask | None = None,
) -> Quality:
    """Measure a model on windows of tokens, against `base` if there is one.

    `masks` may overwrite the mask in the buffers of a layer: for predictors of another kind.
    Both run window by window: nothing but per-token figures is kept.
    """
    watcher = RecallWatcher(engine.config.n_layer, engine.config.n_ff, masks)
    is_predicted = engine.mode == "predicted"
    counts = np.zeros((engine.config.n_layer, len(COUNTS)), np.int64)
    columns: list[list[F64Array]] = [[] for _ in range(4)]
    with engine.watched(watcher if is_predicted else None):
        for ids in texts:
            out = np.empty((len(ids), engine.config.n_vocab), np.float32)
            counts += engine.read(ids, out)
            first = min(len(ids) // 2, len(ids) - 2)  # the token whose successor is scored first
            nexts = np.asarray(ids[first + 1 :])
            rows = np.arange(len(nexts))
            ours = log_softmax(out[first:-1])
            columns[0].append(ours[rows, nexts])
            if base is not None:
                theirs = log_softmax(base.logits(ids)[first:-1])
                columns[1].append(theirs[rows, nexts])
                columns[2].append(kl_divergence(theirs, ours))
                columns[3].append((theirs.argmax(-1) == ours.argmax(-1)).astype(np.float64))
            progress(len(ids))
    ours_p, base_p, kl, same = (np.concatenate(c) if c else np.zeros(0) for c in columns)
    nll = Estimate.of(-ours_p)
    perplexity = float(np.exp(nll.mean))
    divergence = None
    if base is not None:
        delta = np.exp(ours_p) - np.exp(base_p)
        divergence = Divergence(
            perplexity=float(np.exp(-base_p.mean())),
            log_ratio=Estimate.of(base_p - ours_p),
            kl=Estimate.of(kl),
            kl_median=float(np.median(kl)),
            kl_99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            same_top=Estimate.of(same),
            delta_p=Estimate.of(delta),
            delta_p_rms=float(np.sqrt(np.mean(delta**2))),
        )
    return Quality(
        tokens=len(ours_p),
        perplexity=Estimate(perplexity, perplexity * nll.error),
        divergence=divergence,
        layers=watcher.results() if is_predicted else [],
        traffic=traffic(engine.weights, engine.mode, counts),
    )
