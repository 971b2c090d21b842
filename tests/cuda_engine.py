"""Engines on a GPU, real or not, and on the CPU: what lives where, and whether both agree."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny
from conftest import kl
from fake_device import FakeDevice
from powerinfer.predictors.order import Changes, rewrite
from powerinfer.predictors.profile import Firing
from powerinfer.runtime.cache import Sequence
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.cuda import ahead, choose, detect
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.formats import GGMLType, encode
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.runtime.gguf_writer import GGUFWriter
from powerinfer.runtime.model import Watcher
from powerinfer.runtime.plan import Placement, Rates, place

IDS = tiny.token_ids()
RATES = Rates(gpu=1e12, cpu=3e10, link=2e-5)
FOUND = detect.Found((detect.FoundGPU(0, "a fake GPU", 1 << 30, (8, 9)),), (13, 0))
KINDS = {  # model, share of the neurons on the GPU, layers there
    "llama": ("gqa", 0.3, 2),
    "llama, all": ("gqa", 1.0, 2),
    "falcon 7b": ("falcon7", 0.7, 2),
    "falcon 40b": ("falcon40", 0.3, 2),
    "falcon, one layer": ("falcon40", 0.7, 1),
    "opt": ("opt", 0.3, 2),
    "opt, all": ("opt", 1.0, 2),
    "drelu": ("bamboo", 0.5, 2),
    "no neurons": ("mha", 0.0, 2),
    "biases, one layer": ("bias", 0.5, 1),
    "tied": ("tied", 0.3, 2),
    "fatrelu": ("prosparse", 0.5, 2),
}


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


def hot_first(source, path, shape, **keys):
    """Return a file with a tiny model's neurons as a profile would order them, made up here."""
    rng = np.random.default_rng(1)
    frequencies = [rng.random(shape.n_ff, np.float32) for _ in range(shape.n_layer)]
    orders = [np.argsort(-f, kind="stable").astype(np.int32) for f in frequencies]
    rewrite(source, path, Changes(Firing(None, orders, frequencies), keys=keys))
    return path


def retyped(source, path, types):
    """Return a file with some tensors of an f32 model in other types: {name in a layer: type}."""
    file = GGUFFile(source)
    of = {
        t.name: GGMLType[types.get(t.name.split(".", 2)[-1], t.type.name).upper()]
        for t in file.tensors.values()
    }
    with GGUFWriter(path, "llama") as writer:
        for key, value in file.metadata.items():
            if key != "general.architecture":
                writer.add(key, value)
        for t in file.tensors.values():
            writer.declare(t.name, of[t.name], t.shape)
        for t in file.tensors.values():
            is_same = of[t.name] is t.type
            writer.write(t.name, t.data if is_same else encode(of[t.name], t.float32()))
    return path


@contextlib.contextmanager
def hybrid(path, where, device=None, **options):
    """Open a model on a fake device; `where`: see on_gpu. What it allocates is in the budget."""
    device = device or FakeDevice(eagerness=0.5)
    options = {"threads": 2, "context": 96, "chunk": 64, **options}
    with (
        mock.patch.object(choose, "open_device", lambda number, notify: device),
        mock.patch.object(choose, "place", where),
        mock.patch.object(detect, "find", lambda: FOUND),
        mock.patch.object(ahead, "PATIENCE", device.patience),
    ):
        engine = Engine(path, RunOptions(**options))
    with engine:
        yield engine
        assert engine.backend == "cuda"
        placement = engine._ops.placement
        assert device.peak == placement.slab <= placement.used <= placement.budget
    assert device.live == 0 or device.lost


def same_reading(ours, cpu, ids, outtype):
    """Assert that both compute the same, logits of all tokens, and count the same."""
    logits = np.empty((2, len(ids), tiny.N_VOCAB), np.float32)
    counts = ours.read(ids, logits[0]), cpu.read(ids, logits[1])
    close_enough(*logits, outtype)
    np.testing.assert_allclose(*counts, rtol=0 if outtype in ("f32", "f16") else 0.02)


def decoded(engine, n=3):
    """Return the logits [1 + n, n_vocab] after a prompt, and after each of the tokens fed then."""
    sequence, counts = Sequence(), engine.no_counts()
    try:
        rows = [engine.feed([(sequence, IDS[:9])], [8], counts)]
        rows += [engine.feed([(sequence, [token])], [0], counts) for token in IDS[9 : 9 + n]]
    finally:
        engine.release(sequence)
    return np.concatenate(rows)


def note_calls(monkeypatch, owner, name, inside):
    """Let `inside` have the name of a function as long as it runs."""
    real = getattr(owner, name)

    def noting(*args, **kwargs):
        inside.append(name)
        try:
            return real(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(owner, name, noting)


def watched(engine, ids):
    """Return what a Recorder sees while ids are read by an engine, which is closed then."""
    recorder = Recorder()
    with engine as llm, llm.watched(recorder):
        llm.read(ids)
    return recorder.seen


class Recorder(Watcher):
    """Keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def after_ffn(self, ops, il):
        b, n = ops.plan.buffers, ops.plan.step.n_tok
        self.seen += [x[:n].copy() for x in (b.x, b.h, b.scores, b.mask, b.fired)]
        self.seen.append(np.where(b.fired[:n] != 0, b.act[:n], 0))


HANGS_AFTER = 10  # seconds; what does not takes one


def survives(is_right):
    """Return what a function does in a child process, False if it fails there, or hangs.

    Kernels that are given nonsense may bring their process down.
    """
    child = os.fork()
    if not child:
        faulthandler.disable()
        signal.alarm(HANGS_AFTER)
        with contextlib.suppress(BaseException):
            os._exit(0 if is_right() else 1)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0
