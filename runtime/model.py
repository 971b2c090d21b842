"""The forward pass of a transformer over the operators of a backend."""

from __future__ import annotations

from .backend import Backend, Plan


def forward(plan: Plan, ops: Backend) -> None:
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
            ops.predict(il)  # x or h -> mask
        ops.ffn(il)  # x += ffn(h)
        if plan.config.traits.is_parallel:
            ops.out_add(il)  # Falcon: the FFN has read the layer's input, as attention did
