"""Predictors that follow the text: audits find their real recall, thresholds move to hold it.

Now and then the deciders are computed for all neurons of one token. The scores that the predictor
gave to those that fire say which threshold would have let the wanted share of them pass. All layers
are audited in the same token: on a GPU a token is one graph, but not one that is watched. Which
token that is depends on its number in the sequence alone, so a run repeats exactly, whatever the
threads and the chunks of its prompt.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from .backend import Backend
from .config import ModelConfig
from .formats import F32Array
from .model import Watcher, audit
from .traffic import traffic
from .weights import Weights

SHARE = 0.008  # of the time that audits may cost, in the long run
OVERHEAD = 1 << 20  # bytes that could be read while an audit is prepared and judged (0.1 ms)
START, SPAN = 4, 150  # audits in the first tokens of a text, over so many of them
WINDOW = 16  # audits that a threshold is set by
SCATTER = 3.0  # variance of the misses among a token's neurons, against independent ones
SURE_TO_LOWER, SURE_TO_RAISE = 0.5, 2.0  # standard errors before a threshold moves
MAX_STEP = 0.1  # of the range of the scores of those that fire: how far a threshold moves at once
_USUAL_SHARE = 0.15  # of neurons predicted, to estimate what a token reads


def audit_interval(weights: Weights) -> int:
    """Return every how many tokens an audit costs SHARE of what the tokens cost, in bytes."""
    # Deciders in full; up where it decides, too (drelu), is read for few neurons.
    cost = sum(layer.decider.nbytes + OVERHEAD for layer in weights.layers)
    rows = [_USUAL_SHARE * layer.decider.rows for layer in weights.layers]
    token = traffic(weights, "predicted", np.array([[1, n, n, n] for n in rows]))
    return max(1, math.ceil(cost / (SHARE * token.total)))


class Adapter(Watcher):
    """The predictor thresholds of one sequence, and the watcher that audits it.

    `thresholds` float32 [n_layer] changes only in settle(), between forward passes.
    """

    def __init__(self, config: ModelConfig, weights: Weights, thresholds: F32Array) -> None:
        assert config.target_recall is not None
        self.thresholds = thresholds.copy()
        self._miss = 1 - config.target_recall
        self._interval = audit_interval(weights)
        self._scores: list[deque[F32Array]] = [deque(maxlen=WINDOW) for _ in range(config.n_layer)]
        self._is_heard = False  # whether there were audits since the last settle()
        self._due: list[int] = []  # the tokens of the pass to audit
        self._next = 0  # no token before this one is audited

    def _audits_before(self, number: int) -> int:
        """Return how many audits belong to the first `number` tokens of the sequence.

        Each in the middle of its share of SPAN. The very first token is like no other (attention
        sink, huge activations): none there.
        """
        n = max(number - 1, 0)
        return min(n, (START * min(n, SPAN) + SPAN // 2) // SPAN + n // self._interval)

    def is_due(self, number: int) -> bool:
        """Return whether token `number` of the sequence is audited."""
        return self._audits_before(number + 1) > self._audits_before(number)

    def prepare(self, first: int, n_tok: int) -> bool:
        """Look which of the next pass's tokens are audited; return whether any is.

        `first`: the number in the sequence of the first of them.
        """
        self._due = []
        if first + n_tok <= self._next:  # the usual case, when tokens come one by one
            return False
        self._due = [t for t in range(n_tok) if self.is_due(first + t)]
        self._next = first + n_tok
        while not self.is_due(self._next):
            self._next += 1
        return bool(self._due)

    def before_ffn(self, ops: Backend, il: int) -> None:
        for t in self._due:
            fired = audit(ops, il, t)
            self._scores[il].append(ops.plan.buffers.scores[t, fired])
            self._is_heard = True

    def settle(self) -> None:
        """Move the thresholds, if there were audits since the last call.

        Only where the recall seen is off the target by more than chance explains.
        """
        if not self._is_heard:
            return
        self._is_heard = False
        for il, kept in enumerate(self._scores):
            scores = np.concatenate(kept)
            n = len(scores)
            if n == 0:
                continue
            missed = np.count_nonzero(scores < self.thresholds[il]) / n
            chance = math.sqrt(SCATTER * self._miss * (1 - self._miss) / n)
            # Too many predicted costs time, too few costs quality: be surer before the latter, and
            # keep a margin.
            if -SURE_TO_RAISE * chance < missed - self._miss < SURE_TO_LOWER * chance:
                continue
            aim = self._miss if missed > self._miss else max(self._miss - chance, 0)
            index = int(aim * n)
            step = np.partition(scores, index)[index] - self.thresholds[il]
            limit = MAX_STEP * float(scores.max() - scores.min())
            self.thresholds[il] += min(max(float(step), -limit), limit)
