"""The CUDA backend on the fake device: as the CPU's, whatever lives where and whatever is late."""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny
from conftest import convert, kl
from cuda_engine import (
    IDS,
    KINDS,
    Recorder,
    close_enough,
    decoded,
    hot_first,
    hybrid,
    note_calls,
    on_cpu,
    on_gpu,
    relative,
    retyped,
    same_reading,
    survives,
    watched,
)
from cusim import sim
from fake_device import FakeDevice, FakeStream, simulator
from powerinfer.predictors.capture import capture
from powerinfer.predictors.measure import RecallWatcher, measure
from powerinfer.predictors.profile import profile
from powerinfer.runtime import reference
from powerinfer.runtime.cache import Sequence
from powerinfer.runtime.cuda import device as seam
from powerinfer.runtime.cuda import operators, tape
from powerinfer.runtime.cuda.device import DeviceError
from powerinfer.runtime.errors import RequestError
from powerinfer.runtime.formats import INTEGER_DOT, GGMLType
from powerinfer.runtime.gguf import Value
from powerinfer.runtime.model import Watcher, forward

pytestmark = pytest.mark.skipif(bool(sim.unavailable()), reason=sim.unavailable())


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Compiled once, and not in the time of a test."""
    return simulator()


# ---- what it computes ----


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_cpu(kind, outtype, model):
    name, share, n_layer = KINDS[kind]
    path = model(name, outtype)
    options = {"kv_type": "f32"}
    with hybrid(path, on_gpu(share, n_layer), **options) as ours, on_cpu(path, **options) as cpu:
        assert ours._ops.placement.is_everything == (share == 1)
        same_reading(ours, cpu, IDS, outtype)
        written = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
        tokens = list(ours.generate_tokens(IDS[:40], **written))
        gaps = np.sort(cpu.logits(IDS[:40] + tokens)[39:-1], axis=-1)
        for i, token in enumerate(cpu.generate_tokens(IDS[:40], **written)):
            if gaps[i, -1] - gaps[i, -2] < 0.02:  # nearly a tie: both go on as they like
                break
            assert token == tokens[i]
        assert ours.timings.fired_share == pytest.approx(cpu.timings.fired_share, rel=0.02)


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("mode", ["exact", "dense"])
@pytest.mark.parametrize(
    "kind", ["llama", "llama, all", "falcon 40b", "drelu", "biases, one layer"]
)
def test_without_predictors(kind, mode, outtype, model):
    name, share, n_layer = KINDS[kind]
    path = model(name, outtype)
    options = {"kv_type": "f32", "mode": mode}
    with hybrid(path, on_gpu(share, n_layer), **options) as ours, on_cpu(path, **options) as cpu:
        for ids in (IDS[:20], IDS[:1]):
            same_reading(ours, cpu, ids, outtype)


@pytest.mark.parametrize("n_ff", [96, 128])  # not in whole blocks of 64, and in such
@pytest.mark.parametrize("share", [0, 1])
def test_standard_layout_of_down(share, n_ff, small_tokenizer, tmp_path):
    shape = dataclasses.replace(tiny.MODELS["bias"], activation="silu", n_ff=n_ff)
    folder = tiny.write_checkpoint(shape, tmp_path / "checkpoint")
    (folder / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    for outtype in ("f32", "q8_0"):
        path = convert(folder, tmp_path / f"{outtype}.gguf", outtype, dense=True)
        options = {"kv_type": "f32"}
        with hybrid(path, on_gpu(share, 2), **options) as ours, on_cpu(path, **options) as cpu:
            for ids in (IDS[:20], IDS[:1]):
                same_reading(ours, cpu, ids, outtype)


@pytest.mark.parametrize("type_", ["q6_k", "q5_0", "q5_1", "bf16"])
def test_other_formats(type_, wide_gguf, tmp_path):
    """Q6_K has its kernels; the others become what the device has."""
    path = hot_first(wide_gguf(type_), tmp_path / "x.gguf", tiny.WIDE)
    share, backend = (1, "numpy") if type_ == "q5_0" else (0.5, "cpu")
    with (
        # Where all is Q8_0, it meets rounded activations, unlike Q5_0 on the CPU.
        mock.patch.object(reference, "INTEGER_DOT", {*INTEGER_DOT, GGMLType.Q5_0}),
        hybrid(path, on_gpu(share, 2)) as ours,
        on_cpu(path, backend=backend) as cpu,
    ):
        for ids in (IDS[:9], IDS[:1]):
            close_enough(ours.logits(ids), cpu.logits(ids), type_)


@pytest.mark.parametrize("types", [("f16", "q8_0"), ("q8_0", "f32")])
def test_gate_and_up_of_two_formats(types, model, tmp_path):
    """Two kernels do the work of one, and count once."""
    wanted = dict(zip(("ffn_gate.weight", "ffn_up.weight"), types, strict=True))
    path = retyped(model("gqa", "f32"), tmp_path / "x.gguf", wanted)
    with hybrid(path, on_gpu(0.7, 2)) as ours, on_cpu(path) as cpu:
        for ids in (IDS[:9], IDS[:1]):
            same_reading(ours, cpu, ids, "q8_0")


def test_what_makes_activations_of_one_token_packs_them(model):
    """Of two layers only x, which these predictors read, is packed by a kernel of its own."""
    launched = []
    real = FakeStream.launch

    def launch(stream, kernel, *rest):
        launched.append(kernel)
        real(stream, kernel, *rest)

    with (
        mock.patch.object(FakeStream, "launch", launch),
        hybrid(model("gqa", "q8_0"), on_gpu(1, 2)) as llm,
    ):
        llm.logits(IDS[:1])
        assert launched.count("gemv_packed_q8_0") == launched.count("pack") == 2
        launched.clear()
        llm.logits(IDS[:9])
        assert launched.count("gemv_packed_q8_0") == 0 and launched.count("pack") == 6


def test_chunks_and_neighbours_change_nothing(model):
    path, where = model("gqa", "q8_0"), on_gpu(0.5, 2)
    with hybrid(path, where, chunk=64, sequences=3) as llm:
        whole = llm.logits(IDS)
        texts = [(Sequence(), IDS[:7]), (Sequence(), IDS[20:37]), (Sequence(), IDS[5:7])]
        ends = np.cumsum([len(ids) for _, ids in texts])
        together = [llm.feed(texts, range(ends[-1]), llm.no_counts())]
        for i in range(2):  # and on, a token each: all are alone of their texts
            more = [(text, [IDS[30 + i]]) for text, _ in texts]
            together.append(llm.feed(more, range(3), llm.no_counts()))
        for (text, ids), end, first in zip(texts, ends, range(3), strict=True):
            llm.release(text)
            alone = llm.logits([*ids, *IDS[30:32]])
            assert np.array_equal(together[0][end - len(ids) : end], alone[:-2])
            for i in range(2):
                close_enough(together[1 + i][first][None], alone[len(ids) + i][None], "q8_0")
    with hybrid(path, where, chunk=7) as llm:
        assert np.array_equal(llm.logits(IDS), whole)
    with hybrid(path, where, chunk=1) as llm:  # another order of sums
        close_enough(llm.logits(IDS), whole, "q8_0")


def test_rows_in_pieces(broad_gguf):
    """The CPU's part packs its input in pieces, and has columns shared between its threads."""
    path, found = broad_gguf("q4_0"), []
    for threads in (1, 8):
        with hybrid(path, on_gpu(0.3, 2), threads=threads, chunk=1) as ours:
            found.append(ours.logits(IDS[:12]))
    with on_cpu(path, chunk=1) as cpu:
        assert kl(cpu.logits(IDS[:12]), found[0]) < 5e-3  # see test_operators on this model
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("share", "spare", "is_there"), [(1, None, True), (1, 0, False), (0.5, 1 << 20, False)]
)
def test_embedding_on_either_side(share, spare, is_there, model):
    path = model("opt", "q4_0")
    with hybrid(path, on_gpu(share, 2, spare)) as ours, on_cpu(path) as cpu:
        assert ours._ops.placement.has_embedding == is_there
        close_enough(ours.logits(IDS[:9]), cpu.logits(IDS[:9]), "q4_0")


# ---- the order of things ----


@pytest.mark.parametrize("kind", ["llama", "llama, all", "falcon, one layer"])
def test_graphs_equal_what_they_were_made_of(kind, model):
    name, share, n_layer = KINDS[kind]
    with hybrid(model(name, "q4_0"), on_gpu(share, n_layer)) as llm:
        replayed = decoded(llm)
        llm._decode = lambda: forward(llm._plan, llm._ops)
        assert np.array_equal(decoded(llm), replayed)


@pytest.mark.parametrize("name", ["gqa", "falcon40"])
def test_any_interleaving_gives_the_same(name, model):
    path, found = model(name, "q4_0"), []
    for seed in range(25):  # of each of two models
        device = FakeDevice(seed, eagerness=seed / 25)
        with hybrid(path, on_gpu(0.5, 1), device) as llm:
            found.append(decoded(llm))
    assert all(np.array_equal(x, found[0]) for x in found)


def everything(path, device, interrupts):
    """Return what an engine gives that is watched, and interrupted at polls of those numbers."""
    recorder = Recorder()
    with hybrid(path, on_gpu(0.5, 1), device) as llm:
        with llm.watched(recorder):
            results = [decoded(llm, 1)]
        for number in interrupts:
            device.interrupt_at = device.n_polls + number
            with contextlib.suppress(KeyboardInterrupt):
                decoded(llm, 1)
            device.interrupt_at = -1  # where all was done before
            results.append(decoded(llm, 1))
    return results + recorder.seen


WAITS = {  # in which method which wait is left out
    "for what the CPU's neurons need": (operators.CUDA, "ffn", tape.Tape, "wait"),
    "for x of the CPU's layers": (operators.CUDA, "_layer", tape.Tape, "wait"),
    "before watchers look": (operators.CUDA, "show", tape.Tape, "wait"),
    "for logits": (operators.CUDA, "finish", FakeStream, "synchronize"),
    "after an interruption": (operators.CUDA, "_begin", FakeStream, "synchronize"),
    "for the last weights": (seam.Uploader, "finish", FakeStream, "synchronize"),
    "for a staging buffer": (seam.Uploader, "_room", seam, "wait_until"),
}


@pytest.fixture
def inside(monkeypatch):
    """Note in which of WAITS's methods we are; and stage weights in small pieces."""
    methods = []
    for owner, name, _, _ in WAITS.values():
        note_calls(monkeypatch, owner, name, methods)
    small = functools.partial(seam.Uploader, nbytes=5000)
    monkeypatch.setattr(operators, "Uploader", small)
    return methods


INTERRUPTS = range(1, 60, 7)


@pytest.mark.parametrize("left_out", WAITS)
def test_every_wait_is_needed(left_out, model, inside, monkeypatch):
    path = model("gqa", "f16")
    _, method, owner, name = WAITS[left_out]
    interrupts = INTERRUPTS if method == "_begin" else ()
    right = everything(path, FakeDevice(), interrupts)
    for x, y in zip(everything(path, FakeDevice(1, 0.9), interrupts), right, strict=True):
        assert np.array_equal(x, y)
    real = getattr(owner, name)

    def wait(*args, **kwargs):
        return None if method in inside else real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wait)

    def is_right(device):
        found = everything(path, device, interrupts)  # or memory is nobody's any more
        return all(np.array_equal(x, y) for x, y in zip(found, right, strict=True))

    late = [functools.partial(is_right, FakeDevice(*how)) for how in ((0, 0), (1, 0.5))]
    assert not all(map(survives, late))


def test_there_are_no_other_waits(model, inside, monkeypatch):
    """Wherever the host waits, it is one of those that the test above leaves out."""
    places = set()

    def noting(owner, name):
        real = getattr(owner, name)

        def wait(*args, **kwargs):
            places.add((inside[-1] if inside else "", name))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wait)

    for owner, name in {(owner, name) for _, _, owner, name in WAITS.values()}:
        noting(owner, name)
    everything(model("gqa", "f16"), FakeDevice(), (5, 20))
    assert places == {(method, name) for _, method, _, name in WAITS.values()}


# ---- what goes wrong ----


def test_ctrl_c_anywhere(model):
    """Wherever a token is interrupted, the texts after it are as if nothing had been."""
    for seed, eagerness in ((0, 0), (1, 0.7)):
        device = FakeDevice(seed, eagerness)
        with hybrid(model("gqa", "q4_0"), on_gpu(0.5, 1), device) as llm:
            right, before = decoded(llm), device.n_polls
            decoded(llm)
            n_polls, n_cut = device.n_polls - before, 0
            for number in range(1, n_polls, n_polls // 9 + 1):
                device.interrupt_at = device.n_polls + number
                try:
                    decoded(llm)
                except KeyboardInterrupt:  # else it has taken fewer polls, this time
                    n_cut += 1
                device.interrupt_at = -1
                assert np.array_equal(decoded(llm), right)
            assert n_cut > 3


@pytest.fixture
def clock(monkeypatch):
    """A clock by which waiting for a device that hangs takes no time: `device` is to be set."""
    now = SimpleNamespace(s=0.0, device=None)

    def sleep(seconds):
        now.s += 7.0 if now.device.n_run >= now.device.hangs_after else 0.0

    fake = SimpleNamespace(monotonic=lambda: now.s, sleep=sleep)
    monkeypatch.setattr(seam, "time", fake)
    return now


FAULTS = {
    "fails_after": "^a kernel failed on a fake GPU$",
    "hangs_after": "does not answer: nothing came back for 60 s$",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_device_is_a_sentence(fault, model, clock):
    path, where = model("gqa", "q4_0"), on_gpu(0.5, 1)
    for later in (0, 10, 40, 100):
        device = clock.device = FakeDevice(later, 0.3)
        with hybrid(path, where, device) as llm:
            setattr(device, fault, device.n_run + later)
            for _ in range(2):
                with pytest.raises(DeviceError, match=FAULTS[fault]):
                    for _ in range(3):
                        decoded(llm)
        with pytest.raises(RequestError, match="the engine is closed"):
            decoded(llm)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_lost_while_a_model_is_loaded(fault, model, clock):
    device = clock.device = FakeDevice(eagerness=0.3)
    setattr(device, fault, 5)
    with (
        pytest.raises(DeviceError, match=FAULTS[fault]),
        hybrid(model("gqa", "q4_0"), on_gpu(0.5, 1), device),
    ):
        pass


def test_no_memory(model):
    """Nothing is left on a device that the model did not fit on after all."""
    device = FakeDevice(memory_total=50_000)
    with (
        pytest.raises(DeviceError, match="a fake GPU has no room for"),
        hybrid(model("gqa", "q4_0"), on_gpu(1, 2), device),
    ):
        pass
    assert device.peak == 0
    with (
        mock.patch.object(operators.Builder, "head", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
        hybrid(model("gqa", "q4_0"), on_gpu(1, 2), device := FakeDevice()),
    ):
        pass
    assert device.peak > 0 and device.live == 0


# ---- who watches ----


@pytest.mark.parametrize("kind", ["llama", "llama, all", "falcon, one layer", "drelu"])
def test_watchers_see_what_they_see_on_the_cpu(kind, model):
    name, share, n_layer = KINDS[kind]
    path = model(name, "f32")
    for mode, n in (("predicted", 20), ("predicted", 1), ("exact", 20), ("exact", 1)):
        seen = []
        for engine in (hybrid(path, on_gpu(share, n_layer), mode=mode), on_cpu(path, mode=mode)):
            seen.append(watched(engine, IDS[:n]))
        for i, (ours, cpus) in enumerate(zip(*seen, strict=True)):
            if mode == "predicted" or i % 6 not in (2, 3):  # else scores, mask
                np.testing.assert_allclose(ours, cpus, rtol=0, atol=1e-4 * max(cpus.std(), 1e-3))


def test_masks_can_be_changed(model):
    class All(Watcher):
        def before_ffn(self, ops, il):
            ops.plan.buffers.mask[: ops.plan.step.n_tok] = 1

    path, where = model("falcon7", "f32"), on_gpu(0.7, 1)
    with hybrid(path, where, mode="exact") as llm:
        exact = llm.logits(IDS[:20]), llm.logits(IDS[:1])
    with hybrid(path, where) as llm:
        assert relative(llm.logits(IDS[:20]), exact[0]) > 0.01
        with llm.watched(All()):
            # Of several tokens each takes its own rows, where "exact" takes all rows at once.
            assert relative(llm.logits(IDS[:20]), exact[0]) < 1e-5
            assert np.array_equal(llm.logits(IDS[:1]), exact[1])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_traffic_is_that_of_the_changed_mask(share, model):
    """Of one token and of several, whose layers are streamed."""
    path, found = model("gqa", "f32"), []

    def few(ops, il):
        ops.plan.buffers.mask[: ops.plan.step.n_tok, 8 * (il + 1) :] = 0

    for engine in (hybrid(path, on_gpu(share, 2)), on_cpu(path)):
        with engine as llm:
            found.append([measure(llm, [IDS[:n]], masks=few).traffic for n in (20, 2)])
            with llm.watched(RecallWatcher(2, llm.config.n_ff, few)):
                found[-1].append(llm.read(IDS[:1]).tolist())
    assert found[0] == found[1]


def test_profile_capture_and_measure(model, tmp_path):
    path, where, texts = model("gqa", "f32"), on_gpu(0.7, 1), [IDS[:20], IDS[20:30]]
    found = []
    for side, engine in (
        ("gpu", functools.partial(hybrid, path, where)),
        ("cpu", functools.partial(on_cpu, path)),
    ):
        with engine(mode="exact") as llm:
            frequencies = profile(llm, texts, "test").frequencies
            (tmp_path / side).mkdir()
            layers = capture(llm, texts, tmp_path / side)
        with engine() as llm:
            quality = measure(llm, texts)
        found.append((frequencies, layers, quality))
    (ours, our_layers, our_quality), (cpus, cpu_layers, cpu_quality) = found
    assert np.array_equal(ours, cpus)
    for a, b in zip(our_layers, cpu_layers, strict=True):
        np.testing.assert_allclose(a.inputs, b.inputs, rtol=1e-2, atol=1e-3)
        assert np.array_equal(a.bits, b.bits)
        np.testing.assert_allclose(a.effects, b.effects, rtol=1e-2, atol=1e-3)
    assert our_quality.layers == cpu_quality.layers
    assert our_quality.perplexity.mean == pytest.approx(cpu_quality.perplexity.mean, rel=1e-4)


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_thresholds_adapt(outtype, model):
    keys = {"powerinfer.calibration.target_recall": Value.of(0.9)}
    path, found = model("gqa", outtype, **keys), []
    for engine in (hybrid(path, on_gpu(0.5, 1)), on_cpu(path)):
        with engine as llm:
            adapter = llm.adapter()
            before = adapter.thresholds.copy()
            counts = llm.read(IDS[:40], adapter=adapter)
            assert not np.array_equal(before, adapter.thresholds)
            found.append((adapter.thresholds, counts))
    # A token's scores, as far as activations that are rounded to int8 let them agree.
    np.testing.assert_allclose(*(f[0] for f in found), rtol=1e-4 if outtype == "f32" else 1e-2)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0.01)
