"""Long prompts on the fake device: neurons that are not resident pass through two windows."""

import contextlib
import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest
import tiny
from cuda_engine import (
    Recorder,
    close_enough,
    hot_first,
    hybrid,
    on_cpu,
    on_gpu,
    retyped,
    same_reading,
    survives,
    watched,
)
from cusim import sim
from fake_device import FakeDevice, FakeStream, simulator
from powerinfer.runtime import footprint
from powerinfer.runtime.cache import Sequence
from powerinfer.runtime.cpu.operators import CPU
from powerinfer.runtime.cuda import device as seam
from powerinfer.runtime.cuda import streaming
from powerinfer.runtime.model import Watcher

pytestmark = pytest.mark.skipif(bool(sim.unavailable()), reason=sim.unavailable())

IDS = tiny.token_ids()
F32 = {"kv_type": "f32"}  # rounding of K and V would make more of a difference of rounding
# None has a number of neurons in whole blocks of 64; windows have room for two blocks of the large.
SHAPES = {
    "llama": tiny.Tiny(n_ff=608),
    "odd rows": tiny.Tiny(n_embd=96, n_ff=352, n_head=3, n_head_kv=1, head_dim=32),
    "biases": tiny.Tiny(n_ff=352, has_biases=True),
    "drelu": tiny.Tiny(n_ff=352, n_head_kv=2, architecture="BambooForCausalLM"),
    "falcon 7b": dataclasses.replace(tiny.MODELS["falcon7"], n_ff=352),
    "falcon 40b": dataclasses.replace(tiny.MODELS["falcon40"], n_ff=352),
    "opt, wide": tiny.Tiny(n_ff=352, architecture="OPTForCausalLM"),
}


@pytest.fixture(scope="module", autouse=True)
def shapes():
    """Kernels, compiled once and not in the time of a test; and the models above."""
    simulator()
    with mock.patch.dict(tiny.MODELS, SHAPES):
        yield


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short prompts are long: 5 tokens with q4_0, 9 with q8_0, 16 with f16, 32 with f32."""
    monkeypatch.setattr(streaming, "PRODUCTS_PER_BYTE", 8)


@pytest.fixture(scope="module")
def model(tiny_gguf, tmp_path_factory):
    """(kind, type) -> a model of SHAPES stored hot-first."""

    @functools.cache
    def make(kind, outtype):
        path = tmp_path_factory.mktemp("streaming") / "x.gguf"
        return hot_first(tiny_gguf(kind, outtype, True), path, SHAPES[kind])

    return make


@contextlib.contextmanager
def cpu_layers():
    """Collect the numbers of the layers of which the CPU computes anything for several tokens."""
    layers, real = set(), CPU._run_ffn

    def run_ffn(self, block):
        if self._captured is None and self.plan.step.n_tok > 1:
            layers.add(next(il for il, own in enumerate(self._ffn) if own is block))
        real(self, block)

    with mock.patch.object(CPU, "_run_ffn", run_ffn):
        yield layers


def n_windows(llm):
    """Return how many windows of each layer there have been."""
    made = llm._ops._streaming._made
    return [len({place for il, place, _ in made if il == i}) for i in range(llm.config.n_layer)]


# ---- what it computes ----


# Every kind in every format, and either with every share.
TYPES, SHARES = ("f32", "f16", "q8_0", "q4_0"), (0, 0.3, 0.7)
SQUARE = [
    (kind, outtype, SHARES[(i + j) % len(SHARES)])
    for i, kind in enumerate(SHAPES)
    for j, outtype in enumerate(TYPES)
]


@pytest.mark.parametrize(("kind", "outtype", "share"), SQUARE)
def test_as_the_cpu(kind, outtype, share, model):
    path = model(kind, outtype)
    with hybrid(path, on_gpu(share, 2), **F32) as ours, on_cpu(path, **F32) as cpu:
        with cpu_layers() as layers:
            ours.logits(IDS)
        assert not layers and min(n_windows(ours)) > 0
        same_reading(ours, cpu, IDS, outtype)
        same_reading(ours, cpu, IDS[:40], outtype)


@pytest.mark.parametrize("mode", ["exact", "dense"])
@pytest.mark.parametrize("kind", ["llama", "falcon 40b", "drelu"])
def test_without_predictors(kind, mode, model):
    path = model(kind, "q8_0")
    options = {**F32, "mode": mode}
    with hybrid(path, on_gpu(0.3, 2), **options) as ours, on_cpu(path, **options) as cpu:
        same_reading(ours, cpu, IDS, "q8_0")
        assert min(n_windows(ours)) > 0


def test_gate_and_up_of_two_formats(model, tmp_path):
    types = {"ffn_gate.weight": "f16", "ffn_up.weight": "q8_0", "ffn_down_t.weight": "q4_0"}
    path = retyped(model("llama", "f32"), tmp_path / "x.gguf", types)
    with hybrid(path, on_gpu(0.3, 2), **F32) as ours, on_cpu(path, **F32) as cpu:
        same_reading(ours, cpu, IDS, "q8_0")
        assert min(n_windows(ours)) > 0


@pytest.mark.parametrize(
    ("window", "share", "n"),
    [
        (footprint.WINDOW, 0, 5),
        (footprint.WINDOW, 0.3, 4),
        (footprint.WINDOW, 0.9, 1),  # larger than what is to pass
        (1, 0, 10),  # room for a block, whatever it takes
        (1, 0.3, 7),
    ],
)
def test_windows(window, share, n, model):
    path = model("llama", "q8_0")
    with (
        mock.patch.object(footprint, "WINDOW", window),
        hybrid(path, on_gpu(share, 2), **F32) as ours,
        on_cpu(path, **F32) as cpu,
    ):
        same_reading(ours, cpu, IDS, "q8_0")
        assert n_windows(ours) == [n, n]


@pytest.mark.parametrize("outtype", ["q4_0", "q8_0", "f32"])
def test_a_block_fits_into_the_least_window(outtype, model):
    """Planes of these rows are not multiples of what everything on the device is aligned to."""
    path = model("odd rows", outtype)
    with (
        mock.patch.object(footprint, "WINDOW", 1),
        hybrid(path, on_gpu(0.3, 2), **F32) as ours,
        on_cpu(path, **F32) as cpu,
    ):
        same_reading(ours, cpu, IDS, outtype)
        assert n_windows(ours) == [4, 4]


@pytest.mark.parametrize("type_", ["q6_k", "q5_1"])
def test_other_formats(type_, wide_gguf, tmp_path):
    """Q6_K has its kernels; the other becomes float32."""
    path = hot_first(wide_gguf(type_), tmp_path / "x.gguf", tiny.WIDE)
    with hybrid(path, on_gpu(0.3, 2), **F32) as ours, on_cpu(path, **F32) as cpu:
        same_reading(ours, cpu, IDS, type_)
        assert min(n_windows(ours)) > 0


def test_blocks_that_have_moved(model):
    """What passes are the blocks that are not there now, wherever gaps between them are."""
    with hybrid(model("llama", "f32"), on_gpu(0.3, 2), **F32) as llm:
        found, text = [], llm._ops.residency()
        for slot in text.slots:
            slot[:] = -1
            slot[[1, 9, 4]] = 2, 0, 1
        for residency in (None, text):
            recorder, counts, sequence = Recorder(), llm.no_counts(), Sequence()
            with llm.watched(recorder):
                llm.feed([(sequence, IDS)], range(len(IDS)), counts, None, residency)
            llm.release(sequence)
            found.append([*recorder.seen, counts])
        assert [s.tolist() for s in llm._ops._replacer.slots] == [s.tolist() for s in text.slots]
        for moved, right in zip(*found, strict=True):
            np.testing.assert_allclose(moved, right, rtol=0, atol=1e-4 * max(right.std(), 1e-3))


def test_the_last_layers_stay_on_the_cpu(model):
    path = model("falcon 40b", "q4_0")
    with hybrid(path, on_gpu(0.3, 1), **F32) as ours, on_cpu(path, **F32) as cpu:
        with cpu_layers() as layers:
            ours.logits(IDS)
        assert layers == {1}
        same_reading(ours, cpu, IDS, "q4_0")
        assert n_windows(ours)[1] == 0


# ---- when ----


@pytest.mark.parametrize(
    ("outtype", "least"), [("q4_0", 36), ("q8_0", 68), ("f16", 128), ("f32", 256)]
)
def test_the_rule(outtype, least, model, monkeypatch):
    monkeypatch.undo()
    with on_cpu(model("odd rows", outtype)) as llm:
        assert {streaming.least_tokens(layer) for layer in llm._plan.weights.layers} == {least}


def test_on_either_side_of_the_rule(model):
    """The numbers of a token are the same but for rounding, and the same for any others beside."""
    path = model("llama", "f16")
    with hybrid(path, on_gpu(0.3, 2), **F32) as llm:
        found = []
        for n, is_streamed in ((15, False), (16, True), (33, True)):
            with cpu_layers() as layers:
                found.append(llm.logits(IDS[:n]))
            assert bool(layers) != is_streamed
        below, at, above = found
        close_enough(at[:15], below, "f16")
        assert np.array_equal(above[:16], at)
    for chunk in (16, 17, 40):
        with hybrid(path, on_gpu(0.3, 2), chunk=chunk, **F32) as llm:
            close_enough(llm.logits(IDS)[:33], above, "f16")


# ---- the order of things ----


@pytest.fixture
def staging(monkeypatch):
    """Pinned memory that a window does not fit in."""
    small = functools.partial(seam.Uploader, nbytes=5000)
    monkeypatch.setattr(streaming, "Uploader", lambda *args, nbytes: small(*args))


def texts(llm):
    """Return logits of prompts, and of tokens between them."""
    found = [llm.logits(ids) for ids in (IDS, IDS[:1], IDS[7:20])]
    return np.concatenate(found)


@pytest.mark.parametrize("kind", ["llama", "falcon 7b"])
def test_any_interleaving_gives_the_same(kind, model, staging):
    found = []
    for seed in range(20):
        device = FakeDevice(seed, eagerness=seed / 20)
        with hybrid(model(kind, "q4_0"), on_gpu(0.3, 2), device) as llm:
            found.append(texts(llm))
    assert all(np.array_equal(x, found[0]) for x in found)


WAITS = ("of the products for the copies", "of the copies for the products", "for pinned memory")


@pytest.mark.parametrize("left_out", WAITS)
def test_every_wait_is_needed(left_out, model, staging):
    path = model("llama", "q4_0")
    with hybrid(path, on_gpu(0.3, 2)) as llm:
        right = texts(llm)

    def is_right(seed, eagerness):
        with hybrid(path, on_gpu(0.3, 2), FakeDevice(seed, eagerness)) as llm:
            stream, copies = llm._ops._streaming._stream, llm._ops._streaming._copies
            real = FakeStream.wait

            def wait(self, event):
                if self is not {WAITS[0]: stream, WAITS[1]: copies}.get(left_out):
                    real(self, event)

            no_room = mock.patch.object(seam, "wait_until", lambda *args: None)
            with (
                mock.patch.object(FakeStream, "wait", wait),
                no_room if left_out == WAITS[2] else contextlib.nullcontext(),
            ):
                return np.array_equal(texts(llm), right)

    orders = [(seed, seed / 6) for seed in range(6)]
    assert not all(survives(functools.partial(is_right, *order)) for order in orders)


def test_ctrl_c_anywhere(model, staging):
    """Wherever a prompt is interrupted, the next one is as if nothing had been."""
    for seed, eagerness in ((0, 0), (1, 0.7)):
        device = FakeDevice(seed, eagerness)
        with hybrid(model("llama", "q4_0"), on_gpu(0.3, 1), device) as llm:
            right, before = llm.logits(IDS), device.n_polls
            llm.logits(IDS)
            n_polls, n_cut = device.n_polls - before, 0
            for number in range(1, n_polls, n_polls // 9 + 1):
                device.interrupt_at = device.n_polls + number
                try:
                    llm.logits(IDS)  # an eager GPU may be done before it is asked so often
                except KeyboardInterrupt:
                    n_cut += 1
                device.interrupt_at = -1
                assert np.array_equal(llm.logits(IDS), right)
            assert n_cut > 3


# ---- who watches ----


@pytest.mark.parametrize("kind", ["llama", "drelu", "falcon 7b"])
def test_watchers_see_what_they_see_on_the_cpu(kind, model):
    path = model(kind, "f32")
    seen = [watched(engine, IDS) for engine in (hybrid(path, on_gpu(0.3, 2)), on_cpu(path))]
    for ours, cpus in zip(*seen, strict=True):
        np.testing.assert_allclose(ours, cpus, rtol=0, atol=1e-4 * max(cpus.std(), 1e-3))


def test_masks_can_be_changed(model):
    class All(Watcher):
        def before_ffn(self, ops, il):
            ops.plan.buffers.mask[: ops.plan.step.n_tok] = 1

    path, where = model("falcon 7b", "f32"), on_gpu(0.3, 2)
    with hybrid(path, where, mode="exact") as llm:
        exact = llm.logits(IDS)
    with hybrid(path, where) as llm, llm.watched(All()):
        assert np.array_equal(llm.logits(IDS), exact)
