"""Who fires, as far as a model file says it: what pictures and programs need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..predictors.profile import carrying_share
from ..runtime.errors import ModelError, RequestError
from ..runtime.formats import F32Array
from ..runtime.gguf import ValueType
from ..runtime.weights import Model

CARRIED = 0.8  # of all activations: how far the hot neurons are counted
F64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """What a model's predictors were measured to do when they were made."""

    recall: F64Array  # [n_layer], of the neurons that fire, the share predicted
    predicted_share: F64Array  # [n_layer], of all neurons
    target_recall: float | None  # what the thresholds were set for


@dataclass(frozen=True)
class Heat:
    """Who fires in a model; all numbers are shares from 0 to 1."""

    model: str  # its name
    frequencies: list[F32Array]  # per layer [n_ff]: of tokens, the hottest neuron first
    record: Record | None  # None: no predictors, or nothing is recorded of them

    @property
    def firing_share(self) -> F64Array:
        """Return which share of the neurons fires for a token, on average: [n_layer]."""
        return np.array([f.mean(dtype=np.float64) for f in self.frequencies])

    @property
    def carrying_share(self) -> F64Array:
        """Return which share of the neurons makes CARRIED of all activations: [n_layer]."""
        return np.array([carrying_share(f, CARRIED) for f in self.frequencies])

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of every layer, ready for JSON; None where nothing is recorded."""
        record = self.record
        return {
            "model": self.model,
            "carried": CARRIED,
            "target_recall": record.target_recall if record else None,
            "layers": [
                {
                    "firing_share": float(firing),
                    "carrying_share": float(carrying),
                    "recall": float(record.recall[il]) if record else None,
                    "predicted_share": float(record.predicted_share[il]) if record else None,
                }
                for il, (firing, carrying) in enumerate(
                    zip(self.firing_share, self.carrying_share, strict=True)
                )
            ],
        }


def read_heat(model: Model) -> Heat:
    """Gather who fires from a model's file.

    RequestError if the model has not been profiled, ModelError for a record that makes no sense.
    """
    names = [f"blk.{il}.ffn_freq" for il in range(model.config.n_layer)]
    if any(name not in model.file.tensors for name in names):
        raise RequestError(
            f"{model.file.path} does not say how often its neurons fire (no ffn_freq): "
            "run `powerinfer profile` on it first"
        )
    frequencies = [model.file.tensors[name].float32() for name in names]
    return Heat(model.config.name, frequencies, _record(model))


def _record(model: Model) -> Record | None:
    recall, predicted = (_shares(model, name) for name in ("recall", "predicted_share"))
    if not model.weights.has_predictors or recall is None or predicted is None:
        return None
    target = model.file.get_float("powerinfer.calibration.target_recall", -1.0)
    return Record(recall, predicted, target if 0 <= target <= 1 else None)


def _shares(model: Model, name: str) -> F64Array | None:
    """Return one array of the calibration record, a number for each layer."""
    file, n_layer, key = model.file, model.config.n_layer, f"powerinfer.calibration.{name}"
    values = file.get_array(key, [ValueType.FLOAT32, ValueType.FLOAT64])
    if values is None:
        return None
    # The comparisons are false for NaN too.
    if len(values) != n_layer or not ((values >= 0) & (values <= 1)).all():
        raise ModelError(f"{file.path}: {key} is not {n_layer} numbers from 0 to 1")
    return np.asarray(values, np.float64)
