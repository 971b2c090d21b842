"""The one seam between model and machine: the operators that every backend offers.

`reference` (NumPy), `cpu` (numba) and, on a GPU, `cuda` implement the same names. An operator
works on the tokens of `step` and on `buffers`, writes into them, and allocates nothing. `il` is
the number of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .cache import KVCache
from .config import Mode, ModelConfig
from .formats import U8Array
from .step import Buffers, Step
from .weights import Weights


@dataclass(frozen=True)
class Plan:
    """All that a backend is built from."""

    config: ModelConfig
    weights: Weights
    cache: KVCache
    step: Step
    buffers: Buffers
    rope: np.ndarray  # float32 [context, 2, rope_dim / 2]
    mode: Mode


class Residency(Protocol):
    """Where the neurons are while one text is written: they follow what the text needs."""

    def settle(self) -> None:
        """Let them move before the next pass; called between passes, but not within a prompt."""


class Backend(Protocol):
    """The operators, in the order in which a token meets them."""

    name: str
    plan: Plan

    def residency(self) -> Residency | None:
        """Return what a new text hands to `use`; None where no neurons can move."""

    def use(self, text: Residency | None) -> None:
        """Run the pass of step with the neurons where a text has them; None: where they began.

        Called before every pass. It changes results only within rounding.
        """

    def embed(self) -> None:
        """x = embedding of each token."""

    def qkv(self, il: int) -> None:
        """q, k, v = norm(x) @ wq, wk, wv; rope on q and k; k and v appended to the cache."""

    def attend(self, il: int) -> None:
        """a = softmax(q . K / sqrt(head_dim)) @ V over the token's own sequence, causal."""

    def out_add(self, il: int) -> None:
        """x += a @ wo."""

    def ffn_norm(self, il: int) -> None:
        """h = norm(x)."""

    def predict(self, il: int) -> None:
        """scores = fc2 . relu(fc1 . input), x or h (config); mask = scores >= threshold."""

    def audit(self, il: int) -> None:
        """truth = which of all neurons fire for the audited token of the step; x stays."""

    def ffn(self, il: int) -> None:
        """x += down(act(gate h) * up h) over the neurons that the mode computes; fired, counts."""

    def head(self) -> None:
        """logits = norm(x) @ output, for the tokens in step.outputs."""

    def show(self) -> None:
        """Bring plan.buffers up to date: x, h, scores, mask, fired, act of the step's tokens.

        act of those that fired; where nothing is predicted, there are no scores and no mask.
        """

    def take_mask(self, il: int) -> None:
        """Use the mask in plan.buffers, which may have been changed, for the FFN of layer `il`."""

    def finish(self) -> None:
        """Wait for all operators called so far; logits and counts in plan.buffers are then there.

        What went wrong since they were called is raised here at the latest.
        """

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return what does the same as `run`, which calls operators, for any step of one token.

        A graph: it goes from operator to operator without Python. `run` may or may not be called.
        """

    def bound(self, data: U8Array, nbytes: float, tokens: float) -> float:
        """Return the tokens per second if a token took just the reading of `nbytes`. 0: unknown.

        `data`: the model's bytes, some of which may be read to see how fast that goes. `tokens`:
        how many are in the cache, for a backend that knows by itself what a token reads.
        """

    def close(self) -> None:
        """Free threads and memory."""
