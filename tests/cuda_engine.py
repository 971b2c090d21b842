"""Engines on a GPU, real or not, and on the CPU: what lives where, and whether both agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import kl
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.cuda import choose
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.plan import Placement, Rates, place

RATES = Rates(gpu=1e12, cpu=3e10, link=2e-5)


def on_gpu(share: float, n_layer: int, spare: int | None = None) -> Callable[..., Placement]:
    """Return what stands in for choose.place: this share of the neurons of the first layers.

    `spare`: bytes of the budget beyond what that takes without the embedding; None: all it takes.
    """

    def chosen(model: Any, plan: Any, options: Any, device: Any) -> Placement:
        sizes = choose.sizes(model, plan)
        layers = sizes.layers[:n_layer]
        slots = [round(share * layer.n_blocks) // layer.step * layer.step for layer in layers]
        placement = place(sizes, RATES, slots, len(plan.rope))
        if spare is not None:
            budget = placement.used - placement.bytes["embedding"] + spare
            placement = place(sizes, RATES, slots, len(plan.rope), budget)
        return placement

    return chosen


def on_cpu(path: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"backend": "cpu", "threads": 2, "context": 96, "chunk": 64}
    return Engine(path, RunOptions(**(defaults | options)))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / b.std())


def close_enough(ours: np.ndarray, cpus: np.ndarray, outtype: str) -> None:
    """What differs is the order of sums; and, with integers, what falls on the edge of two steps.

    See test_model.test_cpu_equals_reference. On the way here KL is at most 6e-6.
    """
    if outtype in ("f32", "f16"):
        assert relative(ours, cpus) < 1e-4
    else:
        assert kl(cpus, ours) < 1e-4
