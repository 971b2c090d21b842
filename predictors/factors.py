"""Predictors without training, from the weights of the decider and the inputs that it meets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..runtime.formats import F32Array
from ..runtime.weights import Layer
from .capture import CHUNK, LayerCapture
from .predictor import Predictor


class Factors:
    """Closed-form predictors of every rank for one layer.

    The decider W [n_ff, n_embd] is replaced by the product A B of rank k that is nearest to it on
    the inputs it meets: min E|W x - A B x|^2, solved by the singular vectors of W C^(1/2), where
    C = E[x x^T] (activation-weighted SVD, as in ASVD, arXiv 2312.05821). As relu stands between
    fc1 and fc2, fc1 = [B; -B] and fc2 = [A, -A]: relu(Bx) - relu(-Bx) = Bx. So a predictor of
    rank r has r / 2 such directions.
    """

    def __init__(self, layer: Layer, data: LayerCapture) -> None:
        n = data.inputs.shape[1]
        moment, mean = np.zeros((n, n)), np.zeros(n)
        for x in _chunks(data):
            moment += x.T @ x
            mean += x.sum(axis=0)
        moment, self._mean = moment / len(data), (mean / len(data)).astype(np.float32)
        values, vectors = np.linalg.eigh(moment)
        scale = np.sqrt(np.maximum(values, 1e-6 * values[-1]))
        root = (vectors * scale).astype(np.float32)  # [n_embd, n_embd], root root^T = C
        self._w = layer.decider.float32()  # [n_ff, n_embd]
        self._bias = 0 if layer.decider_bias is None else layer.decider_bias.numpy()
        product = self._w @ root  # [n_ff, n_embd]
        # Right singular vectors of the product, strongest first: n_embd^2 is less than n_ff n_embd.
        _, right = np.linalg.eigh(product.T @ product)
        right = right[:, ::-1]
        self._a = product @ right  # [n_ff, n_embd]: the first k columns are A
        inverse = (vectors / scale).astype(np.float32)
        self._b = right.T @ inverse.T  # [n_embd, n_embd]: the first k rows are B

    def predictor(self, rank: int) -> Predictor:
        """Return the best predictor of a rank (a multiple of 32), its threshold not set."""
        k = rank // 2
        a, b = self._a[:, :k], self._b[:k]
        # What the factors leave out has a mean, too.
        bias = self._bias + self._w @ self._mean - a @ (b @ self._mean)
        # Spread evenly, so that neither half suffers when they are quantised.
        of_a, of_b = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)  # [k]
        is_there = (of_a > 0) & (of_b > 0)  # else the decider has rows of no other direction
        size = np.sqrt(np.divide(of_a, of_b, out=np.ones_like(of_a), where=is_there))
        a, b = a / size, b * size[:, None]
        return Predictor(
            np.concatenate([b, -b]).astype(np.float32),
            np.concatenate([a, -a], axis=1).astype(np.float32),
            bias.astype(np.float32),
        )


class Signs:
    """SparseInfer's predictor (arXiv 2411.12692): how many signs of a row agree with the input's.

    It needs one bit for each weight of the decider, and no training.
    """

    def __init__(self, layer: Layer) -> None:
        self._signs = np.where(layer.decider.float32() < 0, np.float32(-1), np.float32(1))
        self.nbytes = self._signs.size // 8

    def scores(self, x: F32Array) -> F32Array:
        """Return (signs that agree) - (signs that do not) [n_tok, n_ff] of inputs [n_tok, n]."""
        return np.where(x < 0, np.float32(-1), np.float32(1)) @ self._signs.T


def _chunks(data: LayerCapture) -> Iterator[F32Array]:
    for start in range(0, len(data), CHUNK):
        yield data.x(slice(start, start + CHUNK))
