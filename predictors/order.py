"""Rewriting a file: its neurons in another order, other predictors; rows move whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..quantize.encoder import row_chunks
from ..runtime.errors import RequestError
from ..runtime.formats import GGMLType
from ..runtime.gguf import GGUFFile, Tensor, Value
from ..runtime.gguf_writer import GGUFWriter, not_onto
from ..runtime.weights import Model, load_model
from .profile import PROFILE, Firing, Order

# One row (or element) a neuron.
_NEURONS = re.compile(
    r"blk\.(\d+)\.(ffn_gate\.weight|ffn_up\.weight|ffn_down_t\.weight|fc2\.weight"
    r"|ffn_gate\.bias|ffn_up\.bias|fc2\.bias)"
)
_FIRING = re.compile(r"blk\.\d+\.(ffn_perm|ffn_freq)")
_PREDICTOR = re.compile(r"blk\.\d+\.(fc1\.weight|fc2\.weight|fc2\.bias)")
_DROPPED = ("general.architecture", "general.alignment")  # the writer's own


@dataclass(frozen=True)
class Changes:
    """What is to differ in the new file; by default nothing but the magic of a PWRI file."""

    firing: Firing | None = None  # hot neurons first, by this
    undo_order: bool = False  # back to the original order
    predictors: Sequence[Tensor] | None = None  # in place of the old ones, rows in the old order
    keys: Mapping[str, Value | None] = field(default_factory=dict)  # None: removed


def rewrite(
    source: Path,
    target: Path,
    changes: Changes,
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write `source` again as a file of ours with some changes, tensor by tensor.

    ffn_perm keeps the original numbers of the neurons, ffn_freq how often they fire. RequestError
    when the target is the source or the neurons cannot be moved; the errors of load_model.
    """
    not_onto(source, target)
    model = load_model(source)
    file, firing = model.file, changes.firing
    orders = _orders(model, changes)
    tensors = [t for t in file.tensors.values() if not _FIRING.fullmatch(t.name)]
    if changes.predictors is not None:
        tensors = [t for t in tensors if not _PREDICTOR.fullmatch(t.name)]
        tensors += changes.predictors
    if orders is None:  # the tables stay as they are
        tensors += [t for t in file.tensors.values() if _FIRING.fullmatch(t.name)]
    elif firing is not None:
        tensors += _firing_tensors(file, firing)

    with GGUFWriter(target, model.config.arch) as writer:
        for key, value in _keys(model, changes).items():
            writer.add(key, value)
        for tensor in tensors:
            writer.declare(tensor.name, tensor.type, tensor.shape)
        for tensor in tensors:
            match = _NEURONS.fullmatch(tensor.name)
            is_vector = len(tensor.shape) == 1
            # A vector is stored as one row: its elements are what moves.
            data = tensor.data.reshape(tensor.cols, -1) if is_vector else tensor.data
            moved = orders[int(match[1])] if orders is not None and match else None
            for rows in row_chunks(len(data), 1 if is_vector else tensor.cols):
                writer.write(tensor.name, data[rows] if moved is None else data[moved[rows]])
                progress(data[rows].size)


def _orders(model: Model, changes: Changes) -> list[Order] | None:
    """Return, per layer, which row of the old file each row of the new one is; None: the same."""
    config, path = model.config, model.file.path
    if changes.firing is None and not changes.undo_order:
        return None
    if not model.weights.is_transposed:
        raise RequestError(f"{path} has the standard ffn_down: its neurons cannot be reordered")
    if changes.firing is not None:
        return changes.firing.orders
    for il in range(config.n_layer):
        if f"blk.{il}.ffn_perm" not in model.file.tensors:
            raise RequestError(f"{path} has no blk.{il}.ffn_perm: its order cannot be undone")
    return [original_rows(model.file, il, config.n_ff) for il in range(config.n_layer)]


def original_rows(file: GGUFFile, il: int, n_ff: int) -> Order:
    """Return at which row of layer `il` each neuron of the original order lies: int32 [n_ff]."""
    perm = file.tensors.get(f"blk.{il}.ffn_perm")
    if perm is None:
        return np.arange(n_ff, dtype=np.int32)
    return np.argsort(perm.numpy(), kind="stable").astype(np.int32)


def in_order_of(file: GGUFFile, firing: Firing) -> Firing:
    """Return what is known by original neuron numbers in the numbering that `file` has now."""
    orders, frequencies = [], []
    for il, order in enumerate(firing.orders):
        rows = original_rows(file, il, len(order))
        orders.append(rows[order])
        if firing.frequencies is not None:
            frequencies.append(firing.frequencies[il][np.argsort(rows, kind="stable")])
    return replace(firing, orders=orders, frequencies=frequencies or None)


def _firing_tensors(file: GGUFFile, firing: Firing) -> list[Tensor]:
    """Return ffn_perm and ffn_freq of every layer in the new order."""
    tensors = []
    for il, order in enumerate(firing.orders):
        old = file.tensors.get(f"blk.{il}.ffn_perm")  # it has been reordered before
        perm = order if old is None else old.numpy()[order]
        values = [("ffn_perm", GGMLType.I32, perm.astype("<i4"))]
        if firing.frequencies is not None:
            frequency = firing.frequencies[il][order].astype("<f4")
            values.append(("ffn_freq", GGMLType.F32, frequency))
        for name, type_, array in values:
            data = array.view(np.uint8).reshape(1, -1)
            tensors.append(Tensor(f"blk.{il}.{name}", type_, array.shape, data))
    return tensors


def _keys(model: Model, changes: Changes) -> dict[str, Value]:
    """Return the keys of the new file: the old ones, and what the original leaves unsaid."""
    config = model.config
    keys = {key: value for key, value in model.file.metadata.items() if key not in _DROPPED}
    order = "hot-first" if changes.firing else config.neuron_order
    keys["powerinfer.ffn_activation"] = Value.of(config.activation)
    keys["powerinfer.neuron_order"] = Value.of("original" if changes.undo_order else order)
    if model.weights.has_predictors:
        keys["powerinfer.predictor_input"] = Value.of(config.predictor_input)
    if changes.firing is not None or changes.undo_order:  # ffn_freq is another, or gone
        keys = {key: value for key, value in keys.items() if not key.startswith(PROFILE)}
    if changes.firing is not None:
        keys |= changes.firing.keys
    for key, value in changes.keys.items():
        keys.pop(key, None)
        if value is not None:
            keys[key] = value
    return keys
