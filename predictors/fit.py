"""Predictors for a whole model: how large in which layer, at which thresholds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..runtime.backend import Backend
from ..runtime.config import RunOptions
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.formats import F32Array, GGMLType
from ..runtime.gguf import Tensor, Value
from ..runtime.model import Watcher, audit
from ..runtime.weights import Layer, Model
from . import refine
from .capture import CHUNK, LayerCapture
from .factors import Factors
from .measure import Quality, measure
from .predictor import RANK_MULTIPLE, Predictor, with_predictors

Method = Literal["trained", "factors"]
VALIDATION = 0.15  # of the text, its end: for ranks and thresholds, never for training
MAX_SCORES = 1 << 21  # scores of firing neurons kept per layer while calibrating: 8 MiB
_MAX_TRIES = 6  # of halving the missed share to reach --max-kl


@dataclass(frozen=True)
class Goals:
    """What predictors must reach; ratios."""

    recall: float = 0.95  # of the neurons that fire, the share predicted, in every layer
    max_share: float = 2.5  # predicted neurons, in multiples of those that fire
    max_size: float = 0.08  # of the model's weights
    max_kl: float | None = None  # nats a token, from the model without predictors


@dataclass(frozen=True)
class Candidate:
    """A predictor of one rank, and what it costs a token."""

    predictor: Predictor  # as it comes back from storage; its threshold holds the recall
    share: float  # of all neurons, predicted
    firing: float  # of all neurons, firing
    nbytes: int  # of the predictor
    cost: float  # bytes a token: the predictor, and the decider's rows that it names


def predictor_type(model: Model) -> GGMLType:
    """Return the type that predictors of a model are stored in by default.

    Where the decider has less than a byte a weight they are Q4_0: on the demo model a q4_0
    predictor names a tenth more neurons than one in q8_0, and costs half its bytes.
    """
    decider = model.weights.layers[0].decider
    return GGMLType.Q4_0 if decider.nbytes < decider.rows * decider.cols else GGMLType.Q8_0


def ranks_for(n_embd: int) -> list[int]:
    """Return the ranks to try, smallest first: up to half of n_embd, doubling."""
    ranks = {
        max(RANK_MULTIPLE, n_embd // part // RANK_MULTIPLE * RANK_MULTIPLE)
        for part in (32, 16, 8, 4, 2)
    }
    return sorted(ranks)


def threshold_for(scores: F32Array, recall: float) -> float:
    """Return the largest threshold that lets a share `recall` of firing neurons' scores pass."""
    if len(scores) == 0:
        return 0.0
    index = int((1 - recall) * len(scores))
    return float(np.partition(scores, index)[index])


def assess(
    predictor: Predictor, data: LayerCapture, type_: GGMLType, layer: Layer, recall: float
) -> Candidate:
    """Store a predictor, set its threshold for `recall` on some data, and say what it costs."""
    stored = predictor.stored(type_)
    hits = [stored.scores(data.x(rows))[data.fired(rows)] for rows in slices(data)]
    threshold = threshold_for(np.concatenate(hits), recall)
    predicted = sum(
        int(np.count_nonzero(stored.scores(data.x(rows)) >= threshold)) for rows in slices(data)
    )
    n_ff = layer.decider.rows
    share = predicted / len(data) / n_ff
    nbytes = predictor.nbytes(type_)
    return Candidate(
        predictor=dataclasses.replace(stored, threshold=threshold),
        share=share,
        firing=sum(map(len, hits)) / len(data) / n_ff,
        nbytes=nbytes,
        cost=nbytes + share * layer.decider.nbytes,
    )


def slices(data: LayerCapture) -> list[slice]:
    """Return pieces of CHUNK tokens."""
    return [slice(start, start + CHUNK) for start in range(0, len(data), CHUNK)]


def grow(
    layer: Layer,
    data: LayerCapture,
    n_check: int,
    type_: GGMLType,
    goals: Goals,
    method: Method,
    seed: int,
    progress: Callable[[str], Any] = lambda _: None,
) -> list[Candidate]:
    """Return predictors of growing rank for one layer, up to where more rank stops paying.

    The last `n_check` tokens are for checking what was learned on the others.
    Growing goes on while too many neurons are named (max_share) or the last step saved bytes.
    """
    train_data, check = data.split(n_check)
    factors = Factors(layer, train_data) if method == "factors" else None
    found: list[Candidate] = []
    for rank in ranks_for(layer.decider.cols):
        progress(f"rank {rank}")
        predictor = (
            refine.train(train_data, rank, seed) if factors is None else factors.predictor(rank)
        )
        found.append(assess(predictor, check, type_, layer, goals.recall))
        holds = found[-1].share <= goals.max_share * found[-1].firing
        if holds and len(found) > 1 and found[-1].cost >= found[-2].cost:
            break
    return found


def choose(layers: Sequence[Sequence[Candidate]], goals: Goals, budget: int) -> list[Candidate]:
    """Choose a candidate for each layer: fewest bytes a token, within `budget` bytes in all.

    Candidates that name more than max_share are taken only where there is no other, or where the
    others do not fit. RequestError if even the smallest are too large.
    """
    good = [
        [c for c in found if c.share <= goals.max_share * c.firing] or list(found)
        for found in layers
    ]
    for allowed in (good, layers):
        chosen = _cheapest(allowed, budget)
        if chosen is not None:
            return chosen
    raise RequestError(
        f"even the smallest predictors need {sum(f[0].nbytes for f in layers)} bytes, "
        f"--max-size allows {budget}"
    )


def _cheapest(layers: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate] | None:
    """Return the cheapest of each layer; over budget, the layer that loses least for each byte
    saved steps down, again and again. None if that does not suffice."""
    chosen = [min(range(len(found)), key=lambda i: found[i].cost) for found in layers]
    while sum(found[i].nbytes for found, i in zip(layers, chosen, strict=True)) > budget:
        losses = {
            il: (found[i - 1].cost - found[i].cost) / (found[i].nbytes - found[i - 1].nbytes)
            for il, (found, i) in enumerate(zip(layers, chosen, strict=True))
            if i > 0
        }
        if not losses:
            return None
        chosen[min(losses, key=lambda il: losses[il])] -= 1
    return [found[i] for found, i in zip(layers, chosen, strict=True)]


class _ScoreWatcher(Watcher):
    """Keeps the scores of the neurons that fire, on the stream of the model with predictors."""

    def __init__(self, n_layer: int) -> None:
        self.scores: list[list[F32Array]] = [[] for _ in range(n_layer)]
        self._kept = [0] * n_layer

    def before_ffn(self, ops: Backend, il: int) -> None:
        for t in range(ops.plan.step.n_tok):
            if self._kept[il] >= MAX_SCORES:
                break
            fired = audit(ops, il, t)
            self.scores[il].append(ops.plan.buffers.scores[t, fired])
            self._kept[il] += len(self.scores[il][-1])


def firing_scores(
    model: Model,
    predictors: Sequence[Predictor],
    type_: GGMLType,
    options: RunOptions,
    texts: Sequence[Sequence[int]],
) -> list[F32Array]:
    """Return, per layer, the scores that the runtime gives to neurons that fire."""
    watcher = _ScoreWatcher(model.config.n_layer)
    amended = with_predictors(model, predictors, type_)
    options = dataclasses.replace(options, mode="predicted")
    with Engine(amended, options) as engine, engine.watched(watcher):
        for ids in texts:
            engine.read(ids)
    return [np.concatenate(s) if s else np.zeros(0, np.float32) for s in watcher.scores]


def with_thresholds(
    predictors: Sequence[Predictor], scores: Sequence[F32Array], recall: float
) -> list[Predictor]:
    """Return the predictors with each layer's threshold set for `recall` on such scores."""
    return [
        dataclasses.replace(p, threshold=threshold_for(s, recall))
        for p, s in zip(predictors, scores, strict=True)
    ]


def evaluate(
    model: Model,
    predictors: Sequence[Predictor],
    type_: GGMLType,
    options: RunOptions,
    texts: Sequence[Sequence[int]],
    base: Engine,
) -> Quality:
    """Measure the model with predictors against the model without (`base`, in exact mode)."""
    amended = with_predictors(model, predictors, type_)
    with Engine(amended, dataclasses.replace(options, mode="predicted")) as engine:
        return measure(engine, texts, base)


@dataclass(frozen=True)
class Fitted:
    """Predictors of a whole model, and what they were measured to be worth."""

    predictors: list[Predictor]
    type: GGMLType
    recall: float  # the target that the thresholds were set for
    quality: Quality

    def tensors(self) -> list[Tensor]:
        """Return the tensors of all layers for the file."""
        return [t for il, p in enumerate(self.predictors) for t in p.tensors(il, self.type)]

    def keys(self) -> dict[str, Value | None]:
        """Return the keys of the file: how to use the predictors, and the calibration record."""

        def per_layer(name: str) -> Value:
            return Value.of(np.array([getattr(r, name) for r in self.quality.layers]))

        assert self.quality.divergence is not None
        record = "powerinfer.calibration."
        return {
            "powerinfer.predictor_input": Value.of("normed"),
            "powerinfer.sparse_threshold": None,
            "powerinfer.layer_thresholds": Value.of(
                np.array([p.threshold for p in self.predictors])
            ),
            record + "target_recall": Value.of(self.recall),
            record + "recall": per_layer("recall"),
            record + "predicted_share": per_layer("predicted_share"),
            record + "firing_share": per_layer("firing_share"),
            record + "kl": Value.of(self.quality.divergence.kl.mean),
            record + "perplexity_ratio": Value.of(
                float(np.exp(self.quality.divergence.log_ratio.mean))
            ),
        }


def calibrate(
    model: Model,
    predictors: Sequence[Predictor],
    type_: GGMLType,
    goals: Goals,
    options: RunOptions,
    texts: Sequence[Sequence[int]],
) -> Fitted:
    """Set the thresholds in the runtime itself, for the recall and then for the KL wanted.

    The share missed is halved until max_kl holds; RequestError if that does not get there.
    """
    scores = firing_scores(model, predictors, type_, options, texts)
    recall, kl = goals.recall, 0.0
    with Engine(model, dataclasses.replace(options, mode="exact")) as base:
        for _ in range(_MAX_TRIES):
            fitted = with_thresholds(predictors, scores, recall)
            quality = evaluate(model, fitted, type_, options, texts, base)
            assert quality.divergence is not None
            kl = quality.divergence.kl.mean
            if goals.max_kl is None or kl <= goals.max_kl:
                return Fitted(fitted, type_, recall, quality)
            recall = 1 - (1 - recall) / 2
    raise RequestError(
        f"a KL of {goals.max_kl:g} is not reached: even at a recall of {2 * recall - 1:.4f} it is "
        f"{kl:.2g}"
    )


# -- finished layers on disk, so that an interrupted run goes on where it was -------------------


def save_candidates(path: Path, found: Sequence[Candidate], made_for: dict[str, Any]) -> None:
    """Write one layer's candidates, with what they were made for."""
    arrays: dict[str, Any] = {"made_for": json.dumps(made_for, sort_keys=True)}
    for i, c in enumerate(found):
        p = c.predictor
        arrays |= {f"fc1_{i}": p.fc1, f"fc2_{i}": p.fc2, f"bias_{i}": p.bias}
        arrays[f"numbers_{i}"] = np.array([p.threshold, c.share, c.firing, c.nbytes, c.cost])
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)


def load_candidates(path: Path, made_for: dict[str, Any]) -> list[Candidate] | None:
    """Return one layer's candidates if they are there and made for the same; else None."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["made_for"]) != json.dumps(made_for, sort_keys=True):
                return None
            found = []
            for i in range(sum(name.startswith("fc1_") for name in arrays.files)):
                threshold, share, firing, nbytes, cost = arrays[f"numbers_{i}"].tolist()
                predictor = Predictor(
                    arrays[f"fc1_{i}"], arrays[f"fc2_{i}"], arrays[f"bias_{i}"], threshold
                )
                found.append(Candidate(predictor, share, firing, int(nbytes), cost))
            return found
    except Exception:  # whatever zipfile and NumPy make of a damaged file: it is made again
        return None
