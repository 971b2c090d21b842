"""The forward pass of a transformer over the operators of a backend."""

from __future__ import annotations

from typing import Protocol

from .backend import Backend, Plan


class Watcher(Protocol):
    """Looks at plan.buffers around every FFN, for profiling and measuring."""

    def before_ffn(self, plan: Plan, il: int) -> None:
        """x, h, scores and mask of layer il are there; the mask may be changed."""

    def after_ffn(self, plan: Plan, il: int) -> None:
        """fired is there, x has been added to."""


def forward(plan: Plan, ops: Backend, watcher: Watcher | None = None) -> None:
    """Run the tokens of plan.step through all layers; `ops.head()` then gives their logits.

    x [n_tok, n_embd] is the residual stream, h what the FFN sees, a the attention's output,
    mask the neurons predicted for each token; all of them live in plan.buffers.
    """
    ops.embed()  # tokens -> x
    for il in range(plan.config.n_layer):
        ops.qkv(il)  # x -> q; k, v -> cache
        ops.attend(il)  # q, cache -> a
        if not plan.config.traits.is_parallel:
            ops.out_add(il)  # x += a @ wo
        ops.ffn_norm(il)  # x -> h
        if plan.mode == "predicted":
            ops.predict(il)  # x or h -> scores, mask
            if plan.step.audit[0] == il:
                ops.audit(il)  # h of one token -> truth
        if watcher is not None:
            watcher.before_ffn(plan, il)
        ops.ffn(il)  # x += ffn(h)
        if watcher is not None:
            watcher.after_ffn(plan, il)
        if plan.config.traits.is_parallel:
            ops.out_add(il)  # Falcon: the FFN has read the layer's input, as attention did
