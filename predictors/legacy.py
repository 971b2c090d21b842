"""Firing data and predictors in the original PowerInfer's layouts, read and written.

`activation/activation_{i}.pt`: how often each neuron of layer i fired, a tensor [n_ff].
`MODEL.generated.gpuidx`: a GGUF file of arch generic.gpu_index with, per layer, `gpu_idx`
I32 [n_ff] (1: the neuron goes to the GPU) and `gpu_bucket` I32, those neurons' numbers in order.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..convert.checkpoint import read_tensors
from ..convert.torchfile import write_tensor, write_tensors
from ..runtime.errors import FileFormatError, RequestError
from ..runtime.formats import GGMLType
from ..runtime.gguf import GGUFFile
from ..runtime.weights import Model
from .order import original_rows
from .profile import PROFILE, Firing

GPUIDX_SUFFIX = ".generated.gpuidx"


def find_firing(model: Path, n_layer: int, n_ff: int) -> Firing | None:
    """Return what lies beside a model file: counts if there are any, else a GPU index.

    FileFormatError when it is there but damaged or of another model.
    """
    folder, index = model.parent / "activation", Path(f"{model}{GPUIDX_SUFFIX}")
    if folder.is_dir():
        return read_activations(folder, n_layer, n_ff)
    return read_gpuidx(index, n_layer, n_ff) if index.exists() else None


def read_activations(folder: Path, n_layer: int, n_ff: int) -> Firing:
    """Read firing counts. Files are taken by their number, never in the order of their names.

    How many tokens were counted is not in the files: frequencies are relative to the neuron that
    fired most, over all layers.
    """
    counts = []
    for i in range(n_layer):
        path = folder / f"activation_{i}.pt"
        tensor = read_tensors(path).get("")
        if tensor is None or tensor.shape not in ((n_ff,), (1, n_ff)):
            shape = "nothing" if tensor is None else str(list(tensor.shape))
            raise FileFormatError(f"{path} holds {shape}, not the counts of {n_ff} neurons")
        count = tensor.float32().reshape(-1)
        if not np.isfinite(count).all() or count.min() < 0:
            raise FileFormatError(f"{path} holds counts that are negative or no numbers")
        counts.append(count)
    most = max(float(count.max()) for count in counts)
    if most == 0:
        raise FileFormatError(f"{folder} holds no counts above 0")
    return Firing.of_counts(str(folder), counts, most)


def read_gpuidx(path: Path, n_layer: int, n_ff: int) -> Firing:
    """Read a GPU index: the neurons that were given to the GPU come first."""
    file = GGUFFile(path)
    orders = []
    for i in range(n_layer):
        arrays = []
        for name in (f"blk.{i}.gpu_idx", f"blk.{i}.gpu_bucket"):
            tensor = file.tensors.get(name)
            if tensor is None or tensor.type is not GGMLType.I32 or len(tensor.shape) != 1:
                raise FileFormatError(f"{path} lacks {name}, or it is no list of numbers")
            arrays.append(tensor.numpy())
        is_hot, bucket = arrays
        if len(is_hot) != n_ff or not np.isin(is_hot, (0, 1)).all():
            raise FileFormatError(f"{path}: blk.{i}.gpu_idx is not {n_ff} times 0 or 1")
        if not np.array_equal(np.flatnonzero(is_hot), bucket):
            raise FileFormatError(f"{path}: blk.{i}.gpu_bucket does not agree with gpu_idx")
        orders.append(np.argsort(1 - is_hot, kind="stable").astype(np.int32))
    return Firing(str(path), orders, None)


def export_activations(folder: Path, firing: Firing, file: GGUFFile) -> None:
    """Write activation_{i}.pt: float32 counts by the original numbers of the neurons of `file`.

    RequestError when only an order is known.
    """
    if firing.frequencies is None:
        raise RequestError(f"{firing.source} has an order, but no counts that could be exported")
    tokens = firing.keys.get(PROFILE + "tokens")
    for il, frequency in enumerate(firing.frequencies):
        count = frequency[original_rows(file, il, len(frequency))]
        if tokens is not None:  # else they are relative, as they were read
            count = np.rint(count * np.float32(tokens.value))
        write_tensor(folder / f"activation_{il}.pt", count)


def export_predictors(folder: Path, model: Model) -> None:
    """Write a file's predictors as model_{i}.pt (float32) and config.json, neurons as they were.

    RequestError for what that layout cannot express: a bias, thresholds that differ from layer to
    layer, inputs after a norm with a bias, or after any norm when a threshold other than 0
    compares them. Inputs after RMS norm become inputs before it: its weights go into fc1, and its
    scale changes no sign.
    """
    config, weights, path = model.config, model.weights, model.file.path
    if not weights.has_predictors:
        raise RequestError(f"{path} has no predictors to export")
    thresholds = {config.threshold(il) for il in range(config.n_layer)}
    is_normed = config.predictor_input == "normed"
    if len(thresholds) > 1:
        raise RequestError(f"{path}: thresholds that differ by layer cannot be exported")
    threshold = thresholds.pop()
    if any(layer.fc2_bias is not None for layer in weights.layers):
        raise RequestError(f"{path}: predictors with a bias cannot be exported")
    if is_normed and (threshold != 0 or config.traits.norm != "rms"):
        raise RequestError(
            f"{path}: predictors that read normed inputs can be exported only with RMS norm and "
            "a threshold of 0"
        )
    for il, layer in enumerate(weights.layers):
        assert layer.fc1 is not None and layer.fc2 is not None
        fc1, fc2 = layer.fc1.float32(), layer.fc2.float32()
        if is_normed:
            fc1 = fc1 * layer.ffn_norm.numpy()
        fc2 = fc2[original_rows(model.file, il, config.n_ff)]
        tensors = {"fc1.weight": fc1, "fc2.weight": np.ascontiguousarray(fc2)}
        write_tensors(folder / f"model_{il}.pt", tensors)
    (folder / "config.json").write_text(json.dumps({"sparse_threshold": threshold}))
