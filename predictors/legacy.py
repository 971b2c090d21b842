"""Firing data in the original PowerInfer's layouts, found beside a model and validated.

`activation/activation_{i}.pt`: how often each neuron of layer i fired, a tensor [n_ff].
`MODEL.generated.gpuidx`: a GGUF file of arch generic.gpu_index with, per layer, `gpu_idx`
I32 [n_ff] (1: the neuron goes to the GPU) and `gpu_bucket` I32, those neurons' numbers in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..convert.checkpoint import read_tensors
from ..runtime.errors import FileFormatError
from ..runtime.formats import F32Array, GGMLType
from ..runtime.gguf import GGUFFile

GPUIDX_SUFFIX = ".generated.gpuidx"
Order = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Firing:
    """What is known about who fires, per layer, in the file's own numbering of neurons."""

    source: Path
    orders: list[Order]  # [n_ff] neuron numbers, the one that fires most first
    frequencies: list[F32Array] | None  # [n_ff] in 0 to 1; None: only the order is known


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
    orders = [np.argsort(-count, kind="stable").astype(np.int32) for count in counts]
    return Firing(folder, orders, [(count / most).astype(np.float32) for count in counts])


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
    return Firing(path, orders, None)
