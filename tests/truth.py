"""Who fires, found another way: in float64, from decoded weights and what a watcher has kept.

And what the tests of predictors have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from powerinfer.predictors.capture import capture
from powerinfer.predictors.predictor import Predictor
from powerinfer.runtime.backend import Backend
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.weights import Model
from test_cli import run

HELDOUT = Path(__file__).parent.parent / "tools" / "demo" / "heldout.txt"


class Keep:
    """A watcher that keeps a copy of buffers, token after token: keep["h", il] [n_tok, ...]."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], list[np.ndarray]] = {}

    def __getitem__(self, key: tuple[str, int]) -> np.ndarray:
        return np.concatenate(self._kept[key])

    def _keep(self, ops: Backend, il: int, *names: str) -> None:
        n = ops.plan.step.n_tok
        for name in names:
            kept = getattr(ops.plan.buffers, name)[:n].copy()
            self._kept.setdefault((name, il), []).append(kept)

    def before_ffn(self, ops: Backend, il: int) -> None:
        self._keep(ops, il, "x", "h", "scores", "mask")

    def after_ffn(self, ops: Backend, il: int) -> None:
        self._keep(ops, il, "fired", "act")


def kept(engine: Engine, texts: Sequence[Sequence[int]]) -> Keep:
    """Run texts through an engine and return what its FFNs saw and did."""
    engine.watcher = watcher = Keep()
    for ids in texts:
        engine.read(ids)
    engine.watcher = None
    return watcher


@dataclass(frozen=True)
class Truth:
    """What the neurons of a layer do, all arrays [n_tok, n_ff]."""

    act: np.ndarray  # decider's activation times up
    fires: np.ndarray
    reads_up: np.ndarray  # the decider fires
    sure: np.ndarray  # False so near a threshold that rounding decides

    @property
    def slack(self) -> int:
        return int(np.count_nonzero(~self.sure))


def truth(model: Model | Engine, il: int, h: np.ndarray) -> Truth:
    """Return what layer `il` does for inputs h [n_tok, n_embd]."""
    layer, c = model.weights.layers[il], model.config

    def product(weight: Any, bias: Any) -> np.ndarray:
        y = h.astype(np.float64) @ weight.float32().astype(np.float64).T
        return y if bias is None else y + bias.numpy()

    gate = product(layer.decider, layer.decider_bias)
    least = c.activation_threshold if c.activation == "fatrelu" else 0.0
    reads_up = fires = gate > least
    sure = np.abs(gate - least) > 1e-5
    act = np.where(fires, gate**2 if c.activation == "relu2" else gate, 0)
    if layer.up is not None:
        up = product(layer.up, layer.up_bias)
        if c.activation == "drelu":
            fires = fires & (up > 0)
            sure = sure & (np.abs(up) > 1e-5)
        act = act * np.where(fires, up, 0)
    return Truth(act, fires, reads_up, sure)


def random_texts(n: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return texts of random tokens for the tiny models."""
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, tiny.N_VOCAB, length - 1).tolist()] for _ in range(n)]


EXACT = RunOptions(mode="exact", threads=2)
TEXTS = random_texts(4, 61)


def captured(path, folder, texts=TEXTS, chunk=16):
    with Engine(path, dataclasses.replace(EXACT, chunk=chunk)) as engine:
        return capture(engine, texts, folder)


def random_predictor(seed, n_embd, n_ff, rank=32):
    rng = np.random.default_rng(seed)
    fc1, fc2 = rng.standard_normal((rank, n_embd)), rng.standard_normal((n_ff, rank))
    bias = rng.standard_normal(n_ff)
    return Predictor(*(x.astype(np.float32) for x in (fc1, fc2, bias)), threshold=0.5 - seed)


def train(capfd, source, text, target, *args):
    common = ("-f", text, "-o", target, "--method", "factors", "-t", 2, "--max-size", "20%")
    return run(capfd, "train-predictors", source, *common, *args)
