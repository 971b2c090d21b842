"""From a checkpoint (and predictors) to a GGUF file, a few rows at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..quantize.encoder import Progress, add_file_type, encode_rows, row_chunks
from ..quantize.policy import Policy
from ..runtime.config import ARCHITECTURES as ARCHITECTURE_TRAITS
from ..runtime.config import POSITION_OFFSET
from ..runtime.errors import FileFormatError, ModelError, shown
from ..runtime.formats import F32Array, GGMLType
from ..runtime.gguf import Metadata, Value
from ..runtime.gguf_writer import GGUFWriter
from ..runtime.tokenizer import load_tokenizer
from . import pwri
from .architectures import (
    ARCHITECTURES,
    Architecture,
    Rope,
    Transform,
    check_variant,
    read_rope,
)
from .checkpoint import Stored, open_checkpoint, read_json, read_tensors
from .hyper import Hyper, read_hyper
from .vocab import tokenizer_keys

RANK_MULTIPLE = 32  # predictor ranks are padded to it with zeros, which changes no score


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the file is made from one of the checkpoint."""

    name: str
    source: Stored
    shape: tuple[int, ...]  # in the file
    transform: Transform = "none"
    order: np.ndarray | None = None  # row numbers of the source, for the transforms of heads

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    def read(self, rows: slice) -> F32Array:
        """Return rows of the finished tensor as float32; only they are read."""
        if self.transform == "transpose":
            return np.ascontiguousarray(self.source.float32((slice(None), rows)).T)
        if self.order is not None:
            if len(self.shape) == 1:
                return self.source.float32(self.order)[None]
            return self.source.float32(self.order[rows])
        if len(self.shape) == 1:
            return self.source.float32()[None]
        x = self.source.float32(rows)
        if self.source.shape != self.shape:  # a predictor's rank, padded
            missing = rows.stop - rows.start - len(x)
            x = np.pad(x, [(0, missing), (0, self.shape[1] - x.shape[1])])
        return x


def _row_order(transform: Transform, h: Hyper) -> np.ndarray | None:
    """Return which row of the checkpoint each row of the file comes from; None: the same."""
    if transform in ("heads_q", "heads_k"):
        n_head = h.n_head if transform == "heads_q" else h.n_head_kv
        halves = np.arange(n_head * h.head_dim).reshape(n_head, 2, h.head_dim // 2)
        return halves.swapaxes(1, 2).reshape(-1)
    if transform == "groups":
        group = h.n_head // h.n_head_kv
        rows = np.arange((h.n_head + 2 * h.n_head_kv) * h.head_dim)
        groups = rows.reshape(h.n_head_kv, group + 2, h.head_dim)
        q, k, v = groups[:, :group], groups[:, group], groups[:, group + 1]
        return np.concatenate([q.reshape(-1), k.reshape(-1), v.reshape(-1)])
    return None


@dataclass(frozen=True)
class Conversion:
    """A checked conversion, ready to be written."""

    arch: str  # GGUF's name
    keys: dict[str, Value]
    recipes: list[Recipe]
    policy: Policy
    warnings: tuple[str, ...]  # for the user
    is_pwri: bool  # write the original PowerInfer's format

    @property
    def n_weights(self) -> int:
        return sum(int(np.prod(r.shape)) for r in self.recipes)


def plan_conversion(
    folder: Path,
    predictor_folder: Path | None,
    policy: Policy,
    dense: bool,
    activation: str | None = None,
    is_pwri: bool = False,
) -> Conversion:
    """Check a checkpoint and its predictors, and say how they become a file.

    `dense`: keep the standard down projection, and accept activations that are not sparse;
    `activation`: over what config.json says; `is_pwri`: as the original PowerInfer has it (`policy`
    is then a PwriPolicy). Nothing is written. FileFormatError and OSError for
    what cannot be read, ModelError for what cannot be converted.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory with a Hugging Face checkpoint")
    if dense and (predictor_folder is not None or is_pwri):
        raise ModelError("predictors and PWRI files exclude --dense")
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "?"
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ModelError(f"{folder} holds a {shown(name)}; supported: {', '.join(ARCHITECTURES)}")
    check_variant(name, config)
    has_predictors = predictor_folder is not None
    h = read_hyper(folder, name, architecture, config, dense, activation, has_predictors)
    rope = read_rope(config, h.head_dim)
    recipes = list(_model_recipes(folder, architecture, open_checkpoint(folder), h, dense))
    if rope.factors is not None:
        recipes.append(Recipe("rope_freqs.weight", Stored(rope.factors), rope.factors.shape))
    arch = pwri.architecture(architecture.gguf, h.activation) if is_pwri else architecture.gguf
    keys = _model_keys(folder, arch, h, rope)
    if is_pwri and ARCHITECTURE_TRAITS[arch].rope == "none":
        # The original takes the rows of the table of positions, offset and all, for the context.
        keys[f"{arch}.context_length"] = Value.of(h.n_ctx + POSITION_OFFSET)
    keys |= tokenizer_keys(folder, config, h.n_vocab)
    if keys["tokenizer.ggml.model"].value != "gpt2":  # that one needs an extra, later
        load_tokenizer(Metadata(folder, keys))  # whoever runs the file would find the same faults
    if predictor_folder is not None:
        predictors, threshold = _predictor_recipes(predictor_folder, h)
        recipes += predictors
        keys["powerinfer.predictor_input"] = Value.of("residual")
        if threshold is not None:
            keys["powerinfer.sparse_threshold"] = Value.of(float(threshold))
    return Conversion(arch, keys, recipes, policy, h.warnings, is_pwri)


def write_conversion(
    conversion: Conversion, target: Path, progress: Progress = lambda _: None
) -> None:
    """Write the file of a planned conversion, one chunk of rows in memory at a time."""
    c = conversion
    types = {r.name: c.policy.type_of(r.name, GGMLType.F32, r.shape) for r in c.recipes}
    magic = pwri.MAGIC if c.is_pwri else b"GGUF"
    with GGUFWriter(target, c.arch, magic) as writer:
        for key, value in c.keys.items():
            writer.add(key, value)
        add_file_type(writer, c.policy.target)
        for recipe in c.recipes:
            writer.declare(recipe.name, types[recipe.name], recipe.shape)
        for recipe in c.recipes:
            for rows in row_chunks(recipe.rows, recipe.shape[-1]):
                x = recipe.read(rows)
                type_ = types[recipe.name]
                encoded = (
                    pwri.encode_original(type_, x)
                    if c.is_pwri
                    else encode_rows(type_, x, recipe.name)
                )
                writer.write(recipe.name, encoded)
                progress(x.size)


def _model_recipes(
    folder: Path, architecture: Architecture, tensors: dict[str, Stored], h: Hyper, dense: bool
) -> Iterator[Recipe]:
    """Yield a recipe for each tensor; ModelError for one that is unknown, missing or misshapen."""
    q_dim, kv_dim = h.n_head * h.head_dim, h.n_head_kv * h.head_dim
    shapes = {  # in the checkpoint; everything else is [n_embd]
        "token_embd.weight": (h.n_vocab, h.n_embd),
        "position_embd.weight": (h.n_ctx + POSITION_OFFSET, h.n_embd),
        "output.weight": (h.n_vocab, h.n_embd),
        "attn_qkv.weight": (q_dim + 2 * kv_dim, h.n_embd),
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
    left: dict[str, Stored] = {}
    for hf_name, found in tensors.items():
        old = next((o for o in architecture.aliases if hf_name.startswith(o)), None)
        if old is not None:
            hf_name = architecture.aliases[old] + hf_name.removeprefix(old)
        left[hf_name] = found
    written = set()
    # Whole-model tensors come once, the others once a layer; the file gets them in this order,
    # whatever order the shards have.
    for i in [None, *range(h.n_layer)]:
        for template, (name, transform) in architecture.tensors.items():
            if ("{i}" in template) != (i is not None):
                continue
            hf_name, name = template.replace("{i}", str(i)), name.replace("{i}", str(i))
            stored = left.pop(hf_name) if hf_name in left else None
            if hf_name == "lm_head.weight" and h.is_tied:
                continue  # a copy of the embedding
            if stored is None:
                if hf_name.endswith(".bias") or template in architecture.optional:
                    continue
                raise ModelError(f"{folder} lacks the tensor {hf_name}")
            expected = shapes.get(re.sub(r"blk\.\d+\.", "", name), (h.n_embd,))
            if stored.shape != expected:
                have, want = list(stored.shape), list(expected)
                raise ModelError(f"{folder}: {hf_name} is {have}, not {want}")
            if dense and "ffn_down_t" in name:
                name, transform = name.replace("ffn_down_t", "ffn_down"), "none"
            if name in written:
                raise ModelError(f"{folder} has two tensors for {name}, one of them {hf_name}")
            written.add(name)
            shape = stored.shape[::-1] if transform == "transpose" else stored.shape
            yield Recipe(name, stored, shape, transform, _row_order(transform, h))
        if i is not None and f"blk.{i}.attn_norm.weight" not in written:
            raise ModelError(f"{folder} lacks the norm of layer {i}")
    for hf_name in left:
        if re.sub(r"\.(layers|h)\.\d+\.", r".\1.{i}.", hf_name) not in architecture.ignored:
            raise ModelError(f"{folder} has a tensor that is not known: {hf_name}")


def _predictor_recipes(folder: Path, h: Hyper) -> tuple[list[Recipe], float | None]:
    """Return recipes of fc1 and fc2 of every layer, and the threshold if one is given."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory with model_0.pt, model_1.pt, ...")
    threshold = None
    if (folder / "config.json").exists():
        threshold = read_json(folder / "config.json").get("sparse_threshold")
        is_number = isinstance(threshold, int | float) and -1e30 < threshold < 1e30
        if threshold is not None and not is_number:
            raise FileFormatError(f"{folder}/config.json: sparse_threshold is {shown(threshold)}")
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


def _model_keys(folder: Path, arch: str, h: Hyper, rope: Rope) -> dict[str, Value]:
    traits = ARCHITECTURE_TRAITS[arch]
    eps = "layer_norm_rms_epsilon" if traits.norm == "rms" else "layer_norm_epsilon"
    keys = {
        # A name that is not Unicode (any bytes are a file name) becomes one.
        "general.name": Value.of(os.fsencode(folder.resolve().name).decode("utf-8", "replace")),
        f"{arch}.vocab_size": Value.of(h.n_vocab),
        f"{arch}.context_length": Value.of(h.n_ctx),
        f"{arch}.embedding_length": Value.of(h.n_embd),
        f"{arch}.block_count": Value.of(h.n_layer),
        f"{arch}.feed_forward_length": Value.of(h.n_ff),
        f"{arch}.attention.head_count": Value.of(h.n_head),
        f"{arch}.attention.head_count_kv": Value.of(h.n_head_kv),
        f"{arch}.attention.key_length": Value.of(h.head_dim),
        f"{arch}.attention.value_length": Value.of(h.head_dim),
        f"{arch}.attention.{eps}": Value.of(h.eps),
        "powerinfer.ffn_activation": Value.of(h.activation),
        "powerinfer.neuron_order": Value.of("original"),
    }
    if h.activation_threshold is not None:
        keys["powerinfer.ffn_activation_threshold"] = Value.of(h.activation_threshold)
    if arch == "falcon":
        keys["falcon.tensor_data_layout"] = Value.of(
            "jploski"
        )  # q, k, v apart, as llama.cpp has it
    if traits.rope != "none":
        keys[f"{arch}.rope.dimension_count"] = Value.of(h.head_dim)
        keys[f"{arch}.rope.freq_base"] = Value.of(rope.freq_base)
    if rope.linear_factor is not None:
        keys[f"{arch}.rope.scaling.type"] = Value.of("linear")
        keys[f"{arch}.rope.scaling.factor"] = Value.of(rope.linear_factor)
    return keys
