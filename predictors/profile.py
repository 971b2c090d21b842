"""Who fires: counted by running text through a model in exact mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.backend import Backend
from ..runtime.engine import Engine
from ..runtime.formats import F32Array
from ..runtime.gguf import Value
from ..runtime.model import Watcher
from ..runtime.step import FIRED

PROFILE = "powerinfer.profile."  # keys: the text that ffn_freq was counted on
Order = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Firing:
    """What is known about who fires, per layer, in the numbering of the file it is about."""

    source: str  # where it comes from, for people
    orders: list[Order]  # [n_ff] neuron numbers, the one that fires most first
    frequencies: list[F32Array] | None  # [n_ff] in 0 to 1; None: only the order is known
    keys: dict[str, Value] = field(default_factory=dict)  # the record of the measurement

    @classmethod
    def of_counts(cls, source: str, counts: Sequence[np.ndarray], most: float) -> Firing:
        """Make it from how often each neuron fired; `most`: the count that is a frequency of 1."""
        # Stable, so that neurons that fire equally often keep their order.
        orders = [np.argsort(-count, kind="stable").astype(np.int32) for count in counts]
        return cls(source, orders, [(count / most).astype(np.float32) for count in counts])


class FiringCounter(Watcher):
    """A watcher that counts, per layer and neuron, for how many tokens it fires (exact mode)."""

    def __init__(self, n_layer: int, n_ff: int) -> None:
        self.tokens = 0
        self.counts: Counts = np.zeros((n_layer, n_ff), np.int64)

    def after_ffn(self, ops: Backend, il: int) -> None:
        n = ops.plan.step.n_tok
        self.counts[il] += (ops.plan.buffers.fired[:n] == FIRED).sum(axis=0)
        self.tokens += n if il == 0 else 0


def profile(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    source: str,
    progress: Callable[[int], Any] = lambda _: None,
) -> Firing:
    """Count who fires over windows of tokens; `engine` must be in exact mode.

    The record (powerinfer.profile.*) says how many tokens, and which (a hash of their ids).
    """
    assert engine.mode == "exact"
    counter = FiringCounter(engine.config.n_layer, engine.config.n_ff)
    with engine.watched(counter):
        for ids in texts:
            engine.read(ids)
            progress(len(ids))
    firing = Firing.of_counts(source, list(counter.counts), float(counter.tokens))
    firing.keys.update(text_record(PROFILE, texts))
    return firing


def text_record(prefix: str, texts: Sequence[Sequence[int]]) -> dict[str, Value]:
    """Return the keys, beginning with `prefix`, that say on which text something was measured."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(np.asarray(ids, np.int32).tobytes())
    return {
        prefix + "tokens": Value.of(sum(map(len, texts))),
        prefix + "text_sha256": Value.of(digest.hexdigest()),
    }


def carrying_share(frequency: F32Array, share: float = 0.8) -> float:
    """Return which share of the neurons, hottest first, makes `share` of all activations."""
    ordered = np.sort(frequency.astype(np.float64))[::-1]
    total = np.cumsum(ordered)
    if total[-1] == 0:
        return 0.0
    return float((np.searchsorted(total, share * total[-1]) + 1) / len(ordered))
