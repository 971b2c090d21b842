"""A predictor of one layer: scores = fc2 . relu(fc1 . x) + bias, predicted where >= threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..quantize.encoder import encode_rows
from ..runtime.formats import BLOCK_SIZES, F32Array, GGMLType, decode, row_bytes
from ..runtime.gguf import Tensor
from ..runtime.weights import Model

RANK_MULTIPLE = 32  # block formats and vector registers want whole blocks


def storable(type_: GGMLType, cols: int) -> GGMLType:
    """Return the type, or F16 where rows of `cols` are not whole blocks of it."""
    return GGMLType.F16 if cols % BLOCK_SIZES[type_][0] else type_


@dataclass(frozen=True)
class Predictor:
    """Matrices as float32, whatever they will be stored as; x is what the FFN sees (`normed`)."""

    fc1: F32Array  # [rank, n_embd], rank a multiple of 32
    fc2: F32Array  # [n_ff, rank]
    bias: F32Array  # [n_ff]
    threshold: float = 0.0

    @property
    def rank(self) -> int:
        return int(self.fc1.shape[0])

    def scores(self, x: F32Array) -> F32Array:
        """Return the scores [n_tok, n_ff] of inputs [n_tok, n_embd], in float32."""
        return np.maximum(x @ self.fc1.T, 0) @ self.fc2.T + self.bias

    def stored(self, type_: GGMLType) -> Predictor:
        """Return the predictor as it comes back after being stored in a type."""

        def back(x: F32Array) -> F32Array:
            fits = storable(type_, x.shape[1])
            return decode(fits, encode_rows(fits, x, "predictor")).reshape(x.shape)

        return dataclasses.replace(self, fc1=back(self.fc1), fc2=back(self.fc2))

    def nbytes(self, type_: GGMLType) -> int:
        """Return the bytes of fc1 and fc2 when stored in a type."""
        matrices = (self.fc1, self.fc2)
        return sum(len(x) * row_bytes(storable(type_, x.shape[1]), x.shape[1]) for x in matrices)

    def tensors(self, il: int, type_: GGMLType) -> tuple[Tensor, Tensor, Tensor]:
        """Return fc1, fc2 and fc2.bias as tensors of layer `il`, encoded."""

        def tensor(name: str, x: F32Array, type_: GGMLType) -> Tensor:
            type_ = storable(type_, x.shape[-1])
            rows = x.reshape(-1, x.shape[-1])
            return Tensor(f"blk.{il}.{name}", type_, x.shape, encode_rows(type_, rows, name))

        return (
            tensor("fc1.weight", self.fc1, type_),
            tensor("fc2.weight", self.fc2, type_),
            tensor("fc2.bias", self.bias, GGMLType.F32),
        )


def with_predictors(model: Model, predictors: Sequence[Predictor], type_: GGMLType) -> Model:
    """Return the model as if its file held these predictors, stored in `type_`."""
    layers = []
    for il, (layer, predictor) in enumerate(zip(model.weights.layers, predictors, strict=True)):
        fc1, fc2, bias = predictor.tensors(il, type_)
        layers.append(dataclasses.replace(layer, fc1=fc1, fc2=fc2, fc2_bias=bias))
    return dataclasses.replace(
        model,
        weights=dataclasses.replace(model.weights, layers=tuple(layers)),
        config=dataclasses.replace(
            model.config,
            predictor_input="normed",
            layer_thresholds=tuple(p.threshold for p in predictors),
        ),
    )
