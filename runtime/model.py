"""The forward pass of a transformer over the operators of a backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .backend import Backend, Plan
from .step import FIRED


class Watcher:
    """Looks at ops.plan.buffers around every FFN: profiling, measuring, adapting."""

    def before_ffn(self, ops: Backend, il: int) -> None:
        """x, h, scores and mask of layer il are there; it may audit, or change mask."""

    def after_ffn(self, ops: Backend, il: int) -> None:
        """fired is there, x has been added to."""


def audit(ops: Backend, il: int, token: int) -> np.ndarray:
    """Return which of all neurons of a layer fire for a token of the step: bool [n_ff]."""
    ops.plan.step.audit[0] = token
    ops.audit(il)
    return ops.plan.buffers.truth == FIRED


def forward(plan: Plan, ops: Backend, watchers: Sequence[Watcher] = ()) -> None:
    """Run the tokens of plan.step through all layers; `ops.head()` then gives their logits.

    x [n_tok, n_embd] is the residual stream, h what the FFN sees, a the attention's output,
    mask the neurons predicted for each token; all of them live in plan.buffers.
    """
    is_parallel = plan.config.traits.is_parallel
    ops.embed()  # tokens -> x
    for il in range(plan.config.n_layer):
        if is_parallel:  # Falcon: the FFN reads the layer's input; what is cold may start at once
            _foresee(plan, ops, il)
        ops.qkv(il)  # x -> q; k, v -> cache
        ops.attend(il)  # q, cache -> a
        if not is_parallel:
            ops.out_add(il)  # x += a @ wo
            _foresee(plan, ops, il)
        if watchers:
            ops.show()
            for watcher in watchers:
                watcher.before_ffn(ops, il)
            ops.take_mask(il)
        ops.ffn(il)  # x += ffn(h)
        if watchers:
            ops.show()
            for watcher in watchers:
                watcher.after_ffn(ops, il)
        if is_parallel:
            ops.out_add(il)


def _foresee(plan: Plan, ops: Backend, il: int) -> None:
    ops.ffn_norm(il)  # x -> h
    if plan.mode == "predicted":
        ops.predict(il)  # x or h -> scores, mask
