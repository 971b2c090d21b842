"""The weights of a model: which tensors it must have, checked to fit together."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from .config import ModelConfig, model_config
from .errors import ModelError
from .formats import COMPUTE_TYPES, GGMLType
from .gguf import GGUFFile, Tensor


@dataclass(frozen=True)
class Layer:
    """Weights of one transformer block; matrices are [outputs, inputs]."""

    attn_norm: Tensor  # [n_embd]
    attn_norm_bias: Tensor | None  # [n_embd], of layer norms
    wq: Tensor  # [n_head * head_dim, n_embd]
    wk: Tensor  # [n_head_kv * head_dim, n_embd]
    wv: Tensor  # [n_head_kv * head_dim, n_embd]
    wo: Tensor  # [n_embd, n_head * head_dim]
    bq: Tensor | None
    bk: Tensor | None
    bv: Tensor | None
    bo: Tensor | None
    ffn_norm: Tensor  # [n_embd]
    ffn_norm_bias: Tensor | None  # [n_embd]
    decider: Tensor  # [n_ff, n_embd]: ffn_gate where there is one, else ffn_up
    decider_bias: Tensor | None  # [n_ff]
    up: Tensor | None  # [n_ff, n_embd]: what the activation is multiplied by; None without a gate
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
    positions: Tensor | None  # [n_ctx + POSITION_OFFSET, n_embd]: learned positions
    output_norm: Tensor  # [n_embd]
    output_norm_bias: Tensor | None  # [n_embd]
    output: Tensor  # [n_vocab, n_embd]; the embedding when they are tied
    rope_factors: Tensor | None  # [rope_dim / 2]: frequencies are divided by these (llama3)
    layers: tuple[Layer, ...]

    def matrices(self) -> list[Tensor]:
        """Return every tensor that is a matrix."""
        layers = [value for layer in self.layers for value in vars(layer).values()]
        tensors = (t for t in (*vars(self).values(), *layers) if isinstance(t, Tensor))
        return [t for t in tensors if len(t.shape) == 2]

    @property
    def has_predictors(self) -> bool:
        return all(layer.fc1 is not None for layer in self.layers)

    @property
    def is_transposed(self) -> bool:
        """Whether down projections are stored one neuron a row, as sparse modes need."""
        return all(layer.down_t is not None for layer in self.layers)


@dataclass(frozen=True)
class Model:
    """A model file, opened and checked."""

    file: GGUFFile
    config: ModelConfig
    weights: Weights


def load_model(path: str | os.PathLike[str], load: bool = False, lock: bool = False) -> Model:
    """Open a model file as GGUFFile does; its errors, model_config's and load_weights'."""
    file = GGUFFile(path, load, lock)
    config = model_config(file)
    return Model(file, config, load_weights(file, config))


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

    def qkv(p: str) -> list[Tensor]:
        if p + "attn_qkv.weight" not in file.tensors:
            shapes = (("attn_q", q_dim), ("attn_k", kv_dim), ("attn_v", kv_dim))
            return [get(f"{p}{name}.weight", rows, c.n_embd) for name, rows in shapes]
        fused = get(p + "attn_qkv.weight", q_dim + 2 * kv_dim, c.n_embd)
        ends = (0, q_dim, q_dim + kv_dim, q_dim + 2 * kv_dim)
        return [fused.row_slice(fused.name, ends[i], ends[i + 1]) for i in range(3)]

    def layer(il: int) -> Layer:
        p = f"blk.{il}."
        transposed = p + "ffn_down_t.weight" in file.tensors
        has_gate = p + "ffn_gate.weight" in file.tensors
        decider = p + ("ffn_gate" if has_gate else "ffn_up")
        # Falcon feeds its FFN from attn_norm; where there is an attn_norm_2 (the 40B kind), that
        # one feeds attention.
        ffn_norm = p + ("attn_norm" if c.traits.is_parallel else "ffn_norm")
        has_second = c.traits.is_parallel and p + "attn_norm_2.weight" in file.tensors
        attn_norm = p + ("attn_norm_2" if has_second else "attn_norm")
        fc1 = maybe(p + "fc1.weight", -1, c.n_embd)
        rank = fc1.shape[0] if fc1 is not None else 0
        wq, wk, wv = qkv(p)
        return Layer(
            attn_norm=get(attn_norm + ".weight", c.n_embd),
            attn_norm_bias=maybe(attn_norm + ".bias", c.n_embd),
            wq=wq,
            wk=wk,
            wv=wv,
            wo=get(p + "attn_output.weight", c.n_embd, q_dim),
            bq=maybe(p + "attn_q.bias", q_dim),
            bk=maybe(p + "attn_k.bias", kv_dim),
            bv=maybe(p + "attn_v.bias", kv_dim),
            bo=maybe(p + "attn_output.bias", c.n_embd),
            ffn_norm=get(ffn_norm + ".weight", c.n_embd),
            ffn_norm_bias=maybe(ffn_norm + ".bias", c.n_embd),
            decider=get(decider + ".weight", c.n_ff, c.n_embd),
            decider_bias=maybe(decider + ".bias", c.n_ff),
            up=get(p + "ffn_up.weight", c.n_ff, c.n_embd) if has_gate else None,
            up_bias=maybe(p + "ffn_up.bias", c.n_ff) if has_gate else None,
            down_t=get(p + "ffn_down_t.weight", c.n_ff, c.n_embd) if transposed else None,
            down=None if transposed else get(p + "ffn_down.weight", c.n_embd, c.n_ff),
            down_bias=maybe(p + ("ffn_down_t.bias" if transposed else "ffn_down.bias"), c.n_embd),
            fc1=fc1,
            fc2=get(p + "fc2.weight", c.n_ff, rank) if fc1 is not None else None,
            fc2_bias=maybe(p + "fc2.bias", c.n_ff) if fc1 is not None else None,
        )

    for il in range(c.n_layer):
        _check_firing(file, il, c.n_ff)
    embd = get("token_embd.weight", c.n_vocab, c.n_embd)
    rope_factors = maybe("rope_freqs.weight", c.rope_dim // 2)
    if rope_factors is not None and not np.all(rope_factors.numpy() > 0):
        raise ModelError(f"{file.path}: rope_freqs.weight holds numbers that are not positive")
    positions = maybe("position_embd.weight", -1, c.n_embd)
    if c.traits.rope == "none" and (positions is None or c.n_ctx_train < 1):
        raise ModelError(f"{file.path} has no position_embd.weight for its positions")
    layers = tuple(layer(il) for il in range(c.n_layer))
    if c.activation == "drelu" and any(la.up is None for la in layers):
        raise ModelError(f"{file.path}: the activation drelu needs an ffn_gate in every layer")
    return Weights(
        embd=embd,
        positions=positions,
        output_norm=get("output_norm.weight", c.n_embd),
        output_norm_bias=maybe("output_norm.bias", c.n_embd),
        output=maybe("output.weight", c.n_vocab, c.n_embd) or embd,
        rope_factors=rope_factors,
        layers=layers,
    )


def _check_firing(file: GGUFFile, il: int, n_ff: int) -> None:
    """Check the tables that say who fires in layer `il`, where there are any."""
    order, frequency = (file.tensors.get(f"blk.{il}.{name}") for name in ("ffn_perm", "ffn_freq"))
    if order is not None:
        is_good = order.type is GGMLType.I32 and order.shape == (n_ff,)
        if not is_good or not np.array_equal(np.sort(order.numpy()), np.arange(n_ff)):
            raise ModelError(f"{file.path}: {order.name} is not an order of {n_ff} neurons")
    if frequency is not None:
        is_good = frequency.type is GGMLType.F32 and frequency.shape == (n_ff,)
        values = frequency.numpy() if is_good else np.array([np.nan])
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ModelError(f"{file.path}: {frequency.name} is not {n_ff} numbers from 0 to 1")
        if (np.diff(values) > 0).any():
            raise ModelError(f"{file.path}: {frequency.name} is not sorted, most frequent first")
