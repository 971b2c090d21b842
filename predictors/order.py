"""Rewriting a file with its neurons in another order; rows move whole, whatever their type."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..quantize.encoder import row_chunks
from ..runtime.config import ModelConfig, model_config
from ..runtime.errors import RequestError
from ..runtime.formats import F32Array, GGMLType
from ..runtime.gguf import GGUFFile, Value, ValueType
from ..runtime.gguf_writer import GGUFWriter, not_onto
from ..runtime.weights import load_weights
from .legacy import Firing, Order

# One row (or element) a neuron.
_NEURONS = re.compile(
    r"blk\.(\d+)\.(ffn_gate\.weight|ffn_up\.weight|ffn_down_t\.weight|fc2\.weight"
    r"|ffn_gate\.bias|ffn_up\.bias|fc2\.bias)"
)


def rewrite(
    source: Path,
    target: Path,
    firing: Firing | None,
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write `source` again as a file of ours, hot neurons first where `firing` says who they are.

    A file of the original's (PWRI) becomes a GGUF file that says what it is; ffn_perm keeps the
    original numbers of the neurons, ffn_freq how often they fire. RequestError when the target is
    the source or the neurons cannot be moved; the errors of GGUFFile and load_weights.
    """
    not_onto(source, target)
    file = GGUFFile(source)
    config = model_config(file)
    weights = load_weights(file, config)
    if firing is not None and not weights.is_transposed:
        raise RequestError(f"{source} has the standard ffn_down: its neurons cannot be reordered")
    if firing is not None and config.neuron_order != "original":
        raise RequestError(f"{source} is in hot-first order already")
    added: list[tuple[str, GGMLType, Order | F32Array]] = []
    for il, order in enumerate(firing.orders if firing else []):
        added.append((f"blk.{il}.ffn_perm", GGMLType.I32, order))
        if firing and firing.frequencies:
            added.append((f"blk.{il}.ffn_freq", GGMLType.F32, firing.frequencies[il][order]))

    with GGUFWriter(target, config.arch) as writer:
        for key, value in _keys(file, config, weights.has_predictors, firing).items():
            writer.add(key, value)
        for tensor in file.tensors.values():
            writer.declare(tensor.name, tensor.type, tensor.shape)
        for name, type_, values in added:
            writer.declare(name, type_, values.shape)
        for tensor in file.tensors.values():
            match = _NEURONS.fullmatch(tensor.name)
            # A vector is stored as one row: its elements are what moves.
            data = tensor.data if len(tensor.shape) > 1 else tensor.data.reshape(tensor.cols, -1)
            moved = firing.orders[int(match[1])] if firing and match else None
            for rows in row_chunks(len(data), tensor.cols if len(tensor.shape) > 1 else 1):
                writer.write(tensor.name, data[rows] if moved is None else data[moved[rows]])
                progress(data[rows].size)
        for name, _, values in added:
            writer.write(name, values)


def _keys(
    file: GGUFFile, config: ModelConfig, has_predictors: bool, firing: Firing | None
) -> dict[str, Value]:
    """Return the keys of the new file: the old ones, and what the original leaves unsaid."""
    dropped = ("general.architecture", "general.alignment")
    keys = {key: value for key, value in file.metadata.items() if key not in dropped}
    order = "hot-first" if firing else config.neuron_order
    keys["powerinfer.ffn_activation"] = Value(ValueType.STRING, config.activation)
    keys["powerinfer.neuron_order"] = Value(ValueType.STRING, order)
    if has_predictors:
        keys["powerinfer.predictor_input"] = Value(ValueType.STRING, config.predictor_input)
    return keys
