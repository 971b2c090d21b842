"""The weights of a model: which tensors it must have, checked to fit together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import ModelConfig
from .errors import ModelError
from .formats import COMPUTE_TYPES, GGMLType
from .gguf import GGUFFile, Tensor


@dataclass(frozen=True)
class Layer:
    """Weights of one transformer block; matrices are [outputs, inputs]."""

    attn_norm: Tensor  # [n_embd]
    wq: Tensor  # [n_head * head_dim, n_embd]
    wk: Tensor  # [n_head_kv * head_dim, n_embd]
    wv: Tensor  # [n_head_kv * head_dim, n_embd]
    wo: Tensor  # [n_embd, n_head * head_dim]
    bq: Tensor | None
    bk: Tensor | None
    bv: Tensor | None
    bo: Tensor | None
    ffn_norm: Tensor  # [n_embd]
    gate: Tensor  # [n_ff, n_embd]: the decider
    up: Tensor  # [n_ff, n_embd]
    gate_bias: Tensor | None  # [n_ff]
    up_bias: Tensor | None  # [n_ff]
    down_t: Tensor | None  # [n_ff, n_embd]: one neuron a row
    down: Tensor | None  # [n_embd, n_ff]: the standard layout of files made with --dense
    down_bias: Tensor | None  # [n_embd]
    fc1: Tensor | None  # [rank, n_embd]: the predictor
    fc2: Tensor | None  # [n_ff, rank]
    fc2_bias: Tensor | None  # [n_ff]


@dataclass(frozen=True)
class Weights:
    """All weights of a model."""

    embd: Tensor  # [n_vocab, n_embd]
    output_norm: Tensor  # [n_embd]
    output: Tensor  # [n_vocab, n_embd]; the embedding when they are tied
    rope_factors: Tensor | None  # [rope_dim / 2]: frequencies are divided by these (llama3)
    layers: tuple[Layer, ...]

    @property
    def has_predictors(self) -> bool:
        return all(layer.fc1 is not None for layer in self.layers)

    @property
    def is_transposed(self) -> bool:
        """Whether down projections are stored one neuron a row, as sparse modes need."""
        return all(layer.down_t is not None for layer in self.layers)


def load_weights(file: GGUFFile, config: ModelConfig) -> Weights:
    """Find and check every tensor that the model needs.

    ModelError names the first tensor that is missing, misshapen, or of a type that cannot be
    computed with.
    """
    c = config
    q_dim, kv_dim = c.n_head * c.head_dim, c.n_head_kv * c.head_dim

    def get(name: str, *shape: int) -> Tensor:
        tensor = file.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{file.path} lacks the tensor {name}")
        # -1 stands for any size: predictor ranks differ from layer to layer.
        if len(tensor.shape) != len(shape) or any(
            want not in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
        ):
            raise ModelError(f"{file.path}: {name} is {list(tensor.shape)}, not {list(shape)}")
        allowed = COMPUTE_TYPES if len(shape) == 2 else {GGMLType.F32}
        if tensor.type not in allowed:
            raise ModelError(
                f"{file.path}: {name} is {tensor.type.name}, which cannot be computed with; "
                f"supported: {', '.join(t.name for t in sorted(allowed))}"
            )
        return tensor

    def maybe(name: str, *shape: int) -> Tensor | None:
        return get(name, *shape) if name in file.tensors else None

    def layer(il: int) -> Layer:
        p = f"blk.{il}."
        transposed = p + "ffn_down_t.weight" in file.tensors
        fc1 = maybe(p + "fc1.weight", -1, c.n_embd)
        rank = fc1.shape[0] if fc1 is not None else 0
        return Layer(
            attn_norm=get(p + "attn_norm.weight", c.n_embd),
            wq=get(p + "attn_q.weight", q_dim, c.n_embd),
            wk=get(p + "attn_k.weight", kv_dim, c.n_embd),
            wv=get(p + "attn_v.weight", kv_dim, c.n_embd),
            wo=get(p + "attn_output.weight", c.n_embd, q_dim),
            bq=maybe(p + "attn_q.bias", q_dim),
            bk=maybe(p + "attn_k.bias", kv_dim),
            bv=maybe(p + "attn_v.bias", kv_dim),
            bo=maybe(p + "attn_output.bias", c.n_embd),
            ffn_norm=get(p + "ffn_norm.weight", c.n_embd),
            gate=get(p + "ffn_gate.weight", c.n_ff, c.n_embd),
            up=get(p + "ffn_up.weight", c.n_ff, c.n_embd),
            gate_bias=maybe(p + "ffn_gate.bias", c.n_ff),
            up_bias=maybe(p + "ffn_up.bias", c.n_ff),
            down_t=get(p + "ffn_down_t.weight", c.n_ff, c.n_embd) if transposed else None,
            down=None if transposed else get(p + "ffn_down.weight", c.n_embd, c.n_ff),
            down_bias=maybe(p + ("ffn_down_t.bias" if transposed else "ffn_down.bias"), c.n_embd),
            fc1=fc1,
            fc2=get(p + "fc2.weight", c.n_ff, rank) if fc1 is not None else None,
            fc2_bias=maybe(p + "fc2.bias", c.n_ff) if fc1 is not None else None,
        )

    embd = get("token_embd.weight", c.n_vocab, c.n_embd)
    rope_factors = maybe("rope_freqs.weight", c.rope_dim // 2)
    if rope_factors is not None and not np.all(rope_factors.numpy() > 0):
        raise ModelError(f"{file.path}: rope_freqs.weight holds numbers that are not positive")
    return Weights(
        embd=embd,
        output_norm=get("output_norm.weight", c.n_embd),
        output=maybe("output.weight", c.n_vocab, c.n_embd) or embd,
        rope_factors=rope_factors,
        layers=tuple(layer(il) for il in range(c.n_layer)),
    )
