"""From a checkpoint (and predictors) to a GGUF file, a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..quantize.encoder import Progress, add_file_type, encode_rows, row_chunks
from ..quantize.policy import Policy
from ..runtime.config import DENSE_ACTIVATIONS, SPARSE_ACTIVATIONS
from ..runtime.errors import FileFormatError, ModelError
from ..runtime.formats import F32Array, GGMLType
from ..runtime.gguf import Value, ValueType
from ..runtime.gguf_writer import GGUFWriter
from .architectures import ARCHITECTURES, Architecture, Rope, Transform, read_rope
from .checkpoint import Stored, open_checkpoint, read_json, read_tensors
from .vocab import tokenizer_keys

RANK_MULTIPLE = 32  # predictor ranks are padded to it with zeros, which changes no score


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the file is made from one of the checkpoint."""

    name: str
    source: Stored
    shape: tuple[int, ...]  # in the file
    transform: Transform = "none"
    n_head: int = 1  # for the transforms heads_q and heads_k

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    def read(self, rows: slice) -> F32Array:
        """Return rows of the finished tensor as float32; only they are read."""
        if self.transform == "transpose":
            return np.ascontiguousarray(self.source.float32((slice(None), rows)).T)
        if self.transform in ("heads_q", "heads_k"):
            order = _rope_order(self.source.shape[0], self.n_head)
            if len(self.shape) == 1:
                return self.source.float32(order)[None]
            return self.source.float32(order[rows])
        if len(self.shape) == 1:
            return self.source.float32()[None]
        x = self.source.float32(rows)
        if self.source.shape != self.shape:  # a predictor's rank, padded
            missing = rows.stop - rows.start - len(x)
            x = np.pad(x, [(0, missing), (0, self.shape[1] - x.shape[1])])
        return x


def _rope_order(rows: int, n_head: int) -> np.ndarray:
    """Return the row numbers that turn Hugging Face's rope halves into GGUF's pairs."""
    return np.arange(rows).reshape(n_head, 2, -1).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Conversion:
    """A checked conversion, ready to be written."""

    architecture: Architecture
    keys: dict[str, Value]
    recipes: list[Recipe]
    policy: Policy

    @property
    def n_weights(self) -> int:
        return sum(int(np.prod(r.shape)) for r in self.recipes)


def plan_conversion(
    folder: Path, predictor_folder: Path | None, policy: Policy, dense: bool
) -> Conversion:
    """Check a checkpoint and its predictors, and say how they become a file.

    `dense`: keep the standard down projection, and accept activations that are not sparse.
    Nothing is written. FileFormatError and OSError for what cannot be read, ModelError for what
    cannot be converted.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory with a Hugging Face checkpoint")
    config = read_json(folder / "config.json")
    names = config.get("architectures") or ["?"]
    architecture = ARCHITECTURES.get(str(names[0]))
    if architecture is None:
        raise ModelError(f"{folder} holds a {names[0]}; supported: {', '.join(ARCHITECTURES)}")
    h = _Hyper(folder, config)
    activation = _activation(folder, config, dense)
    rope = read_rope(config, h.head_dim)
    tensors = open_checkpoint(folder)
    recipes = list(_model_recipes(folder, architecture, tensors, h, dense))
    if rope.factors is not None:
        recipes.append(Recipe("rope_freqs.weight", Stored(rope.factors), rope.factors.shape))
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ModelError(f"{folder} has no embedding")
    keys = _model_keys(folder, architecture.gguf, h, rope, activation)
    keys |= tokenizer_keys(folder, config, embedding.shape[0])
    if predictor_folder is not None:
        if dense:
            raise ModelError("predictors and --dense exclude each other")
        predictors, threshold = _predictor_recipes(predictor_folder, h)
        recipes += predictors
        keys["powerinfer.predictor_input"] = Value(ValueType.STRING, "residual")
        if threshold is not None:
            keys["powerinfer.sparse_threshold"] = Value(ValueType.FLOAT32, threshold)
    return Conversion(architecture, keys, recipes, policy)


def write_conversion(
    conversion: Conversion, target: Path, progress: Progress = lambda _: None
) -> None:
    """Write the file of a planned conversion, one chunk of rows in memory at a time."""
    c = conversion
    types = {r.name: c.policy.type_of(r.name, GGMLType.F32, r.shape) for r in c.recipes}
    with GGUFWriter(target, c.architecture.gguf) as writer:
        for key, value in c.keys.items():
            writer.add(key, value)
        add_file_type(writer, c.policy.target)
        for recipe in c.recipes:
            writer.declare(recipe.name, types[recipe.name], recipe.shape)
        for recipe in c.recipes:
            for rows in row_chunks(recipe.rows, recipe.shape[-1]):
                x = recipe.read(rows)
                writer.write(recipe.name, encode_rows(types[recipe.name], x, recipe.name))
                progress(x.size)


class _Hyper:
    """Hyper-parameters of a config.json, checked; ModelError names the one that is wrong."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        def number(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
                raise ModelError(f"{folder}/config.json: {key} is {value!r}")
            return value

        self.n_embd = number("hidden_size")
        self.n_ff = number("intermediate_size")
        self.n_layer = number("num_hidden_layers")
        self.n_head = number("num_attention_heads")
        self.n_head_kv = number("num_key_value_heads", self.n_head)
        self.head_dim = number("head_dim", self.n_embd // self.n_head)
        self.n_ctx = number("max_position_embeddings", 2048)
        self.n_vocab = number("vocab_size")
        self.is_tied = bool(config.get("tie_word_embeddings", False))
        eps = config.get("rms_norm_eps", 1e-6)
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise ModelError(f"{folder}/config.json: rms_norm_eps is {eps!r}")
        self.eps = eps
        if self.n_head % self.n_head_kv or self.head_dim % 2:
            raise ModelError(f"{folder}/config.json: the numbers of heads make no sense")


def _activation(folder: Path, config: dict[str, Any], dense: bool) -> str:
    activation = str(config.get("hidden_act", "silu"))
    if activation in SPARSE_ACTIVATIONS:
        return activation
    if activation not in DENSE_ACTIVATIONS:
        raise ModelError(f"{folder} uses the activation {activation!r}, which is not supported")
    if not dense:
        raise ModelError(
            f"{folder} uses the activation {activation!r}: its neurons never fall silent, so there "
            "is no sparsity to use; convert it with --dense to run it as an ordinary model"
        )
    return activation


def _model_recipes(
    folder: Path, architecture: Architecture, tensors: dict[str, Stored], h: _Hyper, dense: bool
) -> Iterator[Recipe]:
    """Yield a recipe for each tensor; ModelError for one that is unknown, missing or misshapen."""
    q_dim, kv_dim = h.n_head * h.head_dim, h.n_head_kv * h.head_dim
    shapes = {
        "token_embd.weight": (h.n_vocab, h.n_embd),
        "output.weight": (h.n_vocab, h.n_embd),
        "attn_q.weight": (q_dim, h.n_embd),
        "attn_k.weight": (kv_dim, h.n_embd),
        "attn_v.weight": (kv_dim, h.n_embd),
        "attn_output.weight": (h.n_embd, q_dim),
        "attn_q.bias": (q_dim,),
        "attn_k.bias": (kv_dim,),
        "attn_v.bias": (kv_dim,),
        "ffn_gate.weight": (h.n_ff, h.n_embd),
        "ffn_up.weight": (h.n_ff, h.n_embd),
        "ffn_down_t.weight": (h.n_embd, h.n_ff),
        "ffn_gate.bias": (h.n_ff,),
        "ffn_up.bias": (h.n_ff,),
    }
    left = dict(tensors)
    # Whole-model tensors come once, the others once a layer; the file gets them in this order,
    # whatever order the shards have.
    for i in [None, *range(h.n_layer)]:
        for template, (name, transform) in architecture.tensors.items():
            if ("{i}" in template) != (i is not None):
                continue
            hf_name, name = template.replace("{i}", str(i)), name.replace("{i}", str(i))
            stored = left.pop(hf_name, None)
            if hf_name == "lm_head.weight" and h.is_tied:
                continue  # a copy of the embedding
            if stored is None:
                if hf_name.endswith(".bias"):
                    continue
                raise ModelError(f"{folder} lacks the tensor {hf_name}")
            expected = shapes.get(re.sub(r"blk\.\d+\.", "", name), (h.n_embd,))
            if stored.shape != expected:
                have, want = list(stored.shape), list(expected)
                raise ModelError(f"{folder}: {hf_name} is {have}, not {want}")
            if dense and "ffn_down_t" in name:
                name, transform = name.replace("ffn_down_t", "ffn_down"), "none"
            shape = stored.shape[::-1] if transform == "transpose" else stored.shape
            n_head = h.n_head if transform == "heads_q" else h.n_head_kv
            yield Recipe(name, stored, shape, transform, n_head)
    for hf_name in left:
        if re.sub(r"\.layers\.\d+\.", ".layers.{i}.", hf_name) not in architecture.ignored:
            raise ModelError(f"{folder} has a tensor that is not known: {hf_name}")


def _predictor_recipes(folder: Path, h: _Hyper) -> tuple[list[Recipe], float | None]:
    """Return recipes of fc1 and fc2 of every layer, and the threshold if one is given."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory with model_0.pt, model_1.pt, ...")
    threshold = None
    if (folder / "config.json").exists():
        threshold = read_json(folder / "config.json").get("sparse_threshold")
        if threshold is not None and (
            not isinstance(threshold, int | float) or not np.isfinite(threshold)
        ):
            raise FileFormatError(f"{folder}/config.json: sparse_threshold is {threshold!r}")
    recipes = []
    for i in range(h.n_layer):
        path = folder / f"model_{i}.pt"
        tensors = read_tensors(path)
        if not {"fc1.weight", "fc2.weight"} <= set(tensors):
            raise FileFormatError(f"{path} lacks fc1.weight or fc2.weight")
        fc1, fc2 = tensors["fc1.weight"], tensors["fc2.weight"]
        rank = fc1.shape[0] if len(fc1.shape) == 2 else 0
        if fc1.shape != (rank, h.n_embd) or fc2.shape != (h.n_ff, rank) or rank == 0:
            raise ModelError(
                f"{path} does not fit the model: fc1 is {list(fc1.shape)}, fc2 {list(fc2.shape)}, "
                f"n_embd is {h.n_embd}, n_ff {h.n_ff}"
            )
        if any(np.isnan(t.float32()).any() for t in (fc1, fc2)):
            raise FileFormatError(f"{path} holds NaN")
        padded = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
        recipes.append(Recipe(f"blk.{i}.fc1.weight", fc1, (padded, h.n_embd)))
        recipes.append(Recipe(f"blk.{i}.fc2.weight", fc2, (h.n_ff, padded)))
    return recipes, threshold


def _model_keys(
    folder: Path, arch: str, h: _Hyper, rope: Rope, activation: str
) -> dict[str, Value]:
    def u32(value: int) -> Value:
        return Value(ValueType.UINT32, value)

    def f32(value: float) -> Value:
        return Value(ValueType.FLOAT32, value)

    keys = {
        "general.name": Value(ValueType.STRING, folder.resolve().name),
        f"{arch}.vocab_size": u32(h.n_vocab),
        f"{arch}.context_length": u32(h.n_ctx),
        f"{arch}.embedding_length": u32(h.n_embd),
        f"{arch}.block_count": u32(h.n_layer),
        f"{arch}.feed_forward_length": u32(h.n_ff),
        f"{arch}.attention.head_count": u32(h.n_head),
        f"{arch}.attention.head_count_kv": u32(h.n_head_kv),
        f"{arch}.attention.key_length": u32(h.head_dim),
        f"{arch}.attention.value_length": u32(h.head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": f32(h.eps),
        f"{arch}.rope.dimension_count": u32(h.head_dim),
        f"{arch}.rope.freq_base": f32(rope.freq_base),
        "powerinfer.ffn_activation": Value(ValueType.STRING, activation),
        "powerinfer.neuron_order": Value(ValueType.STRING, "original"),
    }
    if rope.linear_factor is not None:
        keys[f"{arch}.rope.scaling.type"] = Value(ValueType.STRING, "linear")
        keys[f"{arch}.rope.scaling.factor"] = f32(rope.linear_factor)
    return keys
