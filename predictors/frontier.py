"""The curve that decides which predictors to ship: bytes a token against KL, for every kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime.backend import Backend
from ..runtime.config import Mode, RunOptions
from ..runtime.engine import Engine
from ..runtime.formats import F32Array, GGMLType
from ..runtime.weights import Model
from .capture import LayerCapture
from .factors import Signs
from .fit import Fitted, evaluate, firing_scores, slices, threshold_for, with_thresholds
from .measure import Quality, measure
from .predictor import Predictor, with_predictors

RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)
Point = dict[str, Any]


def frontier(
    model: Model,
    kinds: Mapping[str, Sequence[Predictor]],
    fitted: Fitted,
    data: Sequence[LayerCapture],
    options: RunOptions,
    texts: Sequence[Sequence[int]],
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Measure every kind of predictor at every recall of RECALLS, and the modes without any.

    `kinds`: name -> a predictor for each layer; `data`: what to set the sign predictor's
    thresholds on; `texts`: what to measure on. Returns the report, ready for JSON: sizes in
    bytes, KL in nats a token.
    """
    points = []
    with Engine(model, dataclasses.replace(options, mode="exact")) as base:
        for mode in ("dense", "exact"):
            points.append(_point(mode, None, _without(model, mode, options, texts, base)))
            progress(1)
        for kind, predictors in kinds.items():
            scores = firing_scores(model, predictors, fitted.type, options, texts)
            for recall in RECALLS:
                at = with_thresholds(predictors, scores, recall)
                quality = evaluate(model, at, fitted.type, options, texts, base)
                points.append(_point(kind, recall, quality))
                progress(1)
        for recall, quality in _by_signs(model, fitted, data, options, texts, base):
            points.append(_point("signs", recall, quality))
            progress(1)
    for point in points:
        point["on_frontier"] = not any(
            other["kl"] < point["kl"] and other["bytes_per_token"] < point["bytes_per_token"]
            for other in points
        )
    return {
        "model": model.config.name,
        "tokens": sum(map(len, texts)),
        "ranks": [p.rank for p in fitted.predictors],
        "predictor_type": fitted.type.name,
        "shipped": _point("shipped", fitted.recall, fitted.quality),
        "points": points,
    }


def _without(
    model: Model, mode: Mode, options: RunOptions, texts: Sequence[Sequence[int]], base: Engine
) -> Quality:
    with Engine(model, dataclasses.replace(options, mode=mode)) as engine:
        return measure(engine, texts, base)


def _by_signs(
    model: Model,
    fitted: Fitted,
    data: Sequence[LayerCapture],
    options: RunOptions,
    texts: Sequence[Sequence[int]],
    base: Engine,
) -> list[tuple[float, Quality]]:
    """Measure the sign predictor: masks computed here, everything else by the runtime."""
    signs = [Signs(layer) for layer in model.weights.layers]
    hits: list[F32Array] = [
        np.concatenate([s.scores(d.x(rows))[d.fired(rows)] for rows in slices(d)])
        for s, d in zip(signs, data, strict=True)
    ]
    nbytes = sum(s.nbytes for s in signs)
    amended = with_predictors(model, fitted.predictors, GGMLType.Q8_0)  # their masks are replaced
    results = []
    with Engine(amended, dataclasses.replace(options, mode="predicted")) as engine:
        for recall in RECALLS:
            thresholds = [threshold_for(h, recall) for h in hits]

            def masks(ops: Backend, il: int, thresholds: list[float] = thresholds) -> None:
                n, b = ops.plan.step.n_tok, ops.plan.buffers
                b.mask[:n] = signs[il].scores(b.h[:n]) >= thresholds[il]

            quality = measure(engine, texts, base, masks=masks)
            traffic = dataclasses.replace(quality.traffic, predictor=nbytes)
            results.append((recall, dataclasses.replace(quality, traffic=traffic)))
    return results


def _point(kind: str, target: float | None, quality: Quality) -> Point:
    d, t, layers = quality.divergence, quality.traffic, quality.layers
    assert d is not None

    def mean(name: str) -> float | None:
        return float(np.mean([getattr(r, name) for r in layers])) if layers else None

    return {
        "kind": kind,
        "target_recall": target,
        "recall": mean("recall"),
        "predicted_share": mean("predicted_share"),
        "firing_share": mean("firing_share"),
        "kl": d.kl.mean,
        "perplexity_ratio": float(np.exp(d.log_ratio.mean)),
        "bytes_per_token": t.total,
        "ffn_bytes_per_token": t.ffn,
        "predictor_bytes": t.predictor,
    }
