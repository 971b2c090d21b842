"""Blocks of neurons that move to the device while a text is written, on the fake device."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import tiny
from conftest import convert, random_predictors
from cuda_engine import Recorder, close_enough, hybrid, note_calls, on_cpu, on_gpu, survives
from cusim import sim
from fake_device import FakeDevice, FakeStream, simulator
from powerinfer.predictors.order import Changes, rewrite
from powerinfer.predictors.profile import Firing
from powerinfer.runtime.cache import Sequence
from powerinfer.runtime.cuda import device as seam
from powerinfer.runtime.cuda import replace
from powerinfer.runtime.cuda.device import Uploader
from powerinfer.runtime.cuda.loading import Loader, repack
from powerinfer.runtime.footprint import BLOCK, planes
from powerinfer.runtime.model import Watcher

pytestmark = pytest.mark.skipif(bool(sim.unavailable()), reason=sim.unavailable())

IDS = tiny.token_ids()
N_PROMPT = 9
F32 = {"kv_type": "f32"}  # where logits are compared: rounding K and V would say what is rounding
WRITTEN = {"max_tokens": 45, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Compiled once, and not in the time of a test."""
    return simulator()


class Predicted(Watcher):
    """Counts how often each neuron is predicted."""

    def __init__(self, n_layer, n_ff):
        self.counts = np.zeros((n_layer, n_ff))

    def before_ffn(self, ops, il):
        self.counts[il] += ops.plan.buffers.mask[: ops.plan.step.n_tok].sum(axis=0)


def demand(path, ids):
    """Return how often each neuron is predicted in a text: [n_layer, n_ff]."""
    with on_cpu(path) as llm:
        seen = Predicted(llm.config.n_layer, llm.config.n_ff)
        with llm.watched(seen):
            llm.read(ids)
    return seen.counts


def in_blocks(counts):
    return np.add.reduceat(counts, np.arange(0, counts.shape[1], BLOCK), axis=1)


@pytest.fixture(scope="module")
def model(small_tokenizer, tmp_path_factory):
    """(name, type, n_ff, is_right) -> a model stored by what its predictors say of IDS.

    The neurons that are predicted most come first; or, if not `is_right`, last.
    """

    @functools.cache
    def make(name="gqa", outtype="f16", n_ff=400, is_right=False):
        folder = tmp_path_factory.mktemp(name)
        shape = dataclasses.replace(tiny.MODELS[name], n_ff=n_ff)
        checkpoint = tiny.write_checkpoint(shape, folder / "checkpoint")
        (checkpoint / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
        predictors = random_predictors(shape, folder / "predictors", 40)
        plain = convert(checkpoint, folder / "plain.gguf", outtype, predictors)
        share = demand(plain, IDS) / len(IDS)
        share = (share if is_right else 1 - share).astype(np.float32)
        orders = [np.argsort(-s, kind="stable").astype(np.int32) for s in share]
        rewrite(plain, folder / "x.gguf", Changes(Firing(None, orders, list(share))))
        return folder / "x.gguf"

    return make


def tables(llm):
    return [slot.copy() for slot in llm._ops._replacer.slots]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def check_device(llm, device):
    """Assert that tables and rows on the device are what the host takes them for."""
    assert device._queue == []
    for layer, slot in zip(llm._ops._layers, llm._ops._replacer.slots, strict=True):
        resident = layer.resident

        def there(address, count):
            return device.locate(address, 4 * count).view(np.int32)

        assert np.array_equal(there(resident.slot, len(slot)), slot)
        blocks = np.flatnonzero(slot >= 0)
        assert np.array_equal(there(resident.neuron_of, len(blocks))[slot[blocks]], blocks)
        for matrix, tensor in resident.matrices:
            size = planes(tensor.type, 1, tensor.cols)
            for block in blocks:
                rows = tensor.data[block * BLOCK : (block + 1) * BLOCK]
                for at, row, part in zip(
                    (matrix.q, matrix.d), size, repack(tensor.type, rows), strict=False
                ):
                    found = device.locate(at + row * BLOCK * int(slot[block]), row * len(rows))
                    assert np.array_equal(found, np.ascontiguousarray(part).reshape(-1))


def followed(llm, ids, each=lambda: None, n_prompt=N_PROMPT):
    """Write a given text as generate() would; return the logits after the prompt, and all tokens.

    `each` is called between passes.
    """
    sequence, counts, residency = Sequence(), llm.no_counts(), llm._ops.residency()
    parts = [ids[:n_prompt], *([token] for token in ids[n_prompt:])]
    rows = []
    try:
        for part in parts:
            rows.append(llm.feed([(sequence, part)], [len(part) - 1], counts, None, residency)[0])
            residency.settle()
            each()
    finally:
        llm.release(sequence)
    return np.array(rows)


def moved(llm):
    """Return where a text has blocks that are absent at first, and the others elsewhere."""
    text = llm._ops.residency()
    for slot in text.slots:
        slot[:] = np.where(slot < 0, slot, slot.max() - slot)
        slot[[0, -1]] = slot[[-1, 0]]
    return text


def prompt(llm, text, ids=IDS):
    """Return the logits of all tokens in one pass of a text."""
    sequence = Sequence()
    try:
        return llm.feed([(sequence, ids)], range(len(ids)), llm.no_counts(), None, text)
    finally:
        llm.release(sequence)


# ---- what moves ----


@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
@pytest.mark.parametrize("name", ["gqa", "falcon40", "opt", "bamboo"])
def test_hot_blocks_end_up_on_the_device(name, outtype, model):
    path, device, history = model(name, outtype), FakeDevice(eagerness=0.5), []
    with hybrid(path, on_gpu(0.3, 2), device, **F32) as llm, on_cpu(path, **F32) as cpu:
        first = tables(llm)
        logits = followed(llm, IDS, lambda: history.append(tables(llm)))
        check_device(llm, device)
        close_enough(logits, cpu.logits(IDS)[N_PROMPT - 1 :], outtype)
        used, last = llm._ops.placement.used, history[-1]
    assert used == llm._ops.placement.used
    assert same(history[0], first) and not same(last, first)
    for slot, needed in zip(last, in_blocks(demand(path, IDS[: replace.TURN])), strict=True):
        there = slot >= 0
        assert there.sum() == 2
        assert needed[there].min() > needed[~there].max() - replace.TURN


def test_nothing_moves_where_the_file_is_right(model):
    with hybrid(model(is_right=True), on_gpu(0.3, 2)) as llm:
        first = tables(llm)
        followed(llm, IDS, lambda: same(tables(llm), first) or pytest.fail("it moved"))


def test_prompts_after_swaps(model):
    """Products over all that is resident, in whatever order."""
    for outtype in ("f32", "q8_0"):
        path = model("falcon40", outtype)
        with hybrid(path, on_gpu(0.6, 2), **F32) as llm, on_cpu(path, **F32) as cpu:
            first, text = tables(llm), moved(llm)
            ours, cpus = Recorder(), Recorder()
            with llm.watched(ours), cpu.watched(cpus):
                close_enough(prompt(llm, text), cpu.logits(IDS), outtype)
            assert same(tables(llm), text.slots) and not same(first, text.slots)
            for a, b in zip(ours.seen, cpus.seen, strict=True):
                if outtype == "f32":  # else it may fall on the other side of a threshold
                    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(b.std(), 1e-3))


def test_a_prompt_settles_nothing_by_itself(model):
    """However it was cut, blocks move when it has ended, and then by all of it."""
    path, found = model(), []
    for chunk in (48, 7):
        with hybrid(path, on_gpu(0.3, 2), chunk=chunk) as llm:
            first = tables(llm)
            tokens = llm.generate_tokens(IDS[:40], max_tokens=2, temperature=0, ignore_eos=True)
            next(tokens)
            assert same(tables(llm), first)
            next(tokens)
            assert not same(tables(llm), first)
            found.append(tables(llm))
    assert same(*found)


# ---- which ----


def turn(counts, slot, n_tok=1000, block_bytes=1):
    """Return the slots of a layer after a turn with these counts of so many tokens."""
    text = replace.BlockResidency([np.array(slot, np.int32)])
    text.counted[:], text.n_tok = counts, n_tok
    text.take_turn([block_bytes])
    assert not text.counted.any() and text.n_tok == 0 and not text.is_due
    return text.slots[0].tolist()


def test_the_hottest_take_the_places_of_the_coldest():
    slot = [0, 1, 2, -1, -1, -1]
    assert turn([9000, 1000, 5000, 0, 7000, 8000], slot) == [0, -1, -1, -1, 2, 1]
    assert turn([9000, 1000, 5000, 0, 4000, 8000], slot) == [0, -1, 2, -1, -1, 1]
    assert turn([9000, 8000, 7000, 6000, 5000, 4000], slot) == slot
    # Equal ones: by number.
    assert turn([0, 0, 5000, 9000, 9000, 9000], slot) == [-1, -1, -1, 0, 1, 2]


def test_what_does_not_pay_stays():
    margin = replace.COST * BLOCK / replace.HORIZON  # rows a token
    share = 1000 / (1000 + replace.DOUBT * 0.5 ** (1000 / replace.HALF_LIFE))
    for more, is_enough in ((0.99, False), (1.01, True)):
        counts = [5000, 5000 + int(1000 * margin / share * more)]
        assert (turn(counts, [0, -1]) == [-1, 0]) == is_enough
    # The same demand, but seen for a few tokens only.
    assert turn([5 * 8, 7 * 8], [0, -1], n_tok=8) == [0, -1]
    assert turn([5 * 1000, 7 * 1000], [0, -1]) == [-1, 0]


def test_no_more_moves_in_a_turn_than_may(monkeypatch):
    monkeypatch.setattr(replace, "MOST", 100)
    counts, slot = [0, 0, 0, 9000, 8000, 7000], [0, 1, 2, -1, -1, -1]
    for size, n in ((33, 3), (34, 2), (50, 2), (51, 1), (1000, 1)):
        assert turn(counts, slot, block_bytes=size)[3:].count(-1) == 3 - n
    # Most useful first, of all layers; those that come first are not worth a pass of small ones.
    text = replace.BlockResidency([np.array([0, -1], np.int32)] * 3)
    text.counted[:], text.n_tok = [[0, 7000], [0, 9000], [0, 8000]], 1000
    text.take_turn([50] * 3)
    assert [slot.tolist() for slot in text.slots] == [[0, -1], [-1, 0], [-1, 0]]


def test_old_demand_is_forgotten():
    text = replace.BlockResidency([np.array([0, -1], np.int32)])
    text.counted[:], text.n_tok = [9000, 0], 1000
    text.take_turn([1])
    assert text.slots[0].tolist() == [0, -1]
    n = 0
    while text.slots[0][0] == 0:
        n += replace.TURN
        text.counted[:], text.n_tok = [0, 9 * replace.TURN], replace.TURN
        text.take_turn([1])
    assert replace.HALF_LIFE < n < 3 * replace.HALF_LIFE


# ---- the same again ----


def test_runs_repeat(model, monkeypatch):
    """For any threads, any interleaving, and whatever else the engine did before or meanwhile."""
    monkeypatch.setattr(replace, "TURN", 5)
    monkeypatch.setattr(replace, "MOST", 1)
    path, found = model("gqa", "q4_0"), []

    def write(llm, other=()):
        history, others = [], iter(other)

        def each():
            history.append(tables(llm))
            if next(others, None) is not None:
                llm.logits(IDS[:3])

        found.append((followed(llm, IDS[:32], each), history))

    for seed, threads in ((0, 1), (1, 2), (2, 3)):
        device = FakeDevice(seed, eagerness=seed / 3)
        with hybrid(path, on_gpu(0.3, 2), device, threads=threads, sequences=2) as llm:
            for _ in range(2):
                write(llm)
            other = llm.generate_tokens(IDS[::-1], **WRITTEN)
            write(llm, other)
            assert sum(1 for _ in other) < 30  # of 45: they were written by turns
    swaps = [not same(a, b) for a, b in zip(found[0][1], found[0][1][1:], strict=False)]
    assert sum(swaps) > 2
    for logits, history in found[1:]:
        assert np.array_equal(logits, found[0][0])
        assert all(same(a, b) for a, b in zip(history, found[0][1], strict=True))


def test_frozen_where_nobody_generates(model):
    path, device = model("gqa", "q4_0"), FakeDevice(eagerness=0.5)
    with hybrid(path, on_gpu(0.3, 2), device) as llm:
        first, logits = tables(llm), llm.logits(IDS)
        assert np.array_equal(llm.logits(IDS), logits) and same(tables(llm), first)
        llm.read(IDS, adapter=None)
        list(llm.generate_many([IDS, IDS], max_tokens=4, ignore_eos=True))
        assert same(tables(llm), first)
        tokens = list(llm.generate_tokens(IDS[:40], **WRITTEN))
        assert not same(tables(llm), first)
        assert np.array_equal(llm.logits(IDS), logits) and same(tables(llm), first)
        check_device(llm, device)
        assert list(llm.generate_tokens(IDS[:40], **WRITTEN)) == tokens
    with hybrid(path, on_gpu(0.3, 2), adapt=False) as llm:
        list(llm.generate_tokens(IDS[:40], **WRITTEN))
        assert same(tables(llm), first) and np.array_equal(llm.logits(IDS), logits)


@pytest.mark.parametrize(("share", "mode"), [(0, "predicted"), (1, "predicted"), (0.3, "exact")])
def test_where_nothing_can_move(share, mode, model):
    with hybrid(model(), on_gpu(share, 2), mode=mode) as llm, on_cpu(model()) as cpu:
        assert llm._ops.residency() is None and cpu._ops.residency() is None
        first = tables(llm)
        list(llm.generate_tokens(IDS[:40], max_tokens=3, ignore_eos=True))
        assert same(tables(llm), first)


# ---- what goes wrong ----


INTERRUPTS = range(1, 40, 3)
FEW = IDS[:8]


def everything(path, device, interrupts=()):
    """Return logits of tokens and prompts before, while and after blocks move.

    Some moves are interrupted at polls of these numbers.
    """
    with hybrid(path, on_gpu(0.3, 2), device) as llm:
        found = [followed(llm, IDS), llm.logits(IDS), prompt(llm, moved(llm))]
        for number in interrupts:
            llm.logits(IDS[:1])
            text = moved(llm)
            device.interrupt_at = device.n_polls + number
            with contextlib.suppress(KeyboardInterrupt):
                llm._ops.use(text)
            device.interrupt_at = -1
            found.append(prompt(llm, text, FEW))
            check_device(llm, device)
        llm.logits(IDS[:1])
        check_device(llm, device)
    return found


def differs(path, right, interrupts=()):
    """Whether on some device a run does not give what it should."""

    def is_right(device):
        found = everything(path, device, interrupts)
        return all(np.array_equal(x, y) for x, y in zip(found, right, strict=True))

    devices = [FakeDevice(*how) for how in ((0, 0), (1, 0.5))]
    return not all(survives(functools.partial(is_right, device)) for device in devices)


@pytest.fixture
def small(monkeypatch):
    """Weights are staged in small pieces."""
    monkeypatch.setattr(replace, "STAGING", 5000)


@pytest.mark.parametrize(
    ("method", "owner", "name"),
    [
        ((replace.Replacer, "_count"), FakeStream, "synchronize"),
        ((Uploader, "_room"), seam, "wait_until"),
        ((replace.Replacer, "_move"), FakeStream, "synchronize"),
    ],
    ids=["for the counts", "for a staging buffer", "after an interruption"],
)
def test_every_wait_is_needed(method, owner, name, model, small, monkeypatch):
    path, inside = model(), []
    interrupts = INTERRUPTS if method[1] == "_move" else ()
    right = everything(path, FakeDevice(), interrupts)
    wait = getattr(owner, name)

    def leave_out(*args, **kwargs):
        return None if inside else wait(*args, **kwargs)

    note_calls(monkeypatch, *method, inside)
    assert not differs(path, right, interrupts)
    monkeypatch.setattr(owner, name, leave_out)
    assert differs(path, right, interrupts)


def wrong_rows(change):
    def fault(monkeypatch):
        real = Loader.rows

        def rows(self, to, tensor, at, first, count):
            if count == to.rows:  # when the model was loaded
                return real(self, to, tensor, at, first, count)
            return real(self, to, tensor, *change(to, at, first), count)

        monkeypatch.setattr(Loader, "rows", rows)

    return fault


def lost_table(name):
    def fault(monkeypatch):
        real = replace.Replacer._move

        def move(self, wanted):
            addresses, upload = [getattr(layer, name) for layer in self._layers], Uploader.upload

            def some(self, dst, pieces):
                return None if dst in addresses else upload(self, dst, pieces)

            with monkeypatch.context() as patch:
                patch.setattr(Uploader, "upload", some)
                real(self, wanted)

        monkeypatch.setattr(replace.Replacer, "_move", move)

    return fault


FAULTS = {
    "rows of another block": wrong_rows(lambda to, at, first: (at, max(first - BLOCK, 0))),
    "the place of another block": wrong_rows(lambda to, at, first: ((at + BLOCK) % to.rows, first)),
    "a slot table that stays": lost_table("slot"),
    "a table of blocks that stays": lost_table("neuron_of"),
}


def test_planted_faults_are_found(model, monkeypatch):
    """By what comes out, without a look at the device."""
    path = model()
    right = everything(path, FakeDevice())
    monkeypatch.setitem(globals(), "check_device", lambda llm, device: None)
    assert not differs(path, right)
    for name, fault in FAULTS.items():
        with monkeypatch.context() as patch:
            fault(patch)
            assert differs(path, right), name


def test_ctrl_c_while_blocks_move(model, small, monkeypatch):
    """Wherever it comes, what runs after it is as if nothing had been."""
    path, device = model("gqa", "q4_0"), FakeDevice(eagerness=0.2)
    with hybrid(path, on_gpu(0.3, 2), device) as llm:
        frozen, with_text = llm.logits(FEW), prompt(llm, moved(llm), FEW)

        def interrupted(prepare):
            """Return whether moving there was interrupted, and nothing has come of it."""
            llm.logits(IDS[:1])
            text = moved(llm)
            was_cut = False
            with monkeypatch.context() as patch:
                prepare(patch)
                try:
                    llm._ops.use(text)
                except KeyboardInterrupt:
                    was_cut = True
            device.interrupt_at = -1
            if was_cut:
                assert np.array_equal(prompt(llm, text, FEW), with_text)
                check_device(llm, device)
            assert np.array_equal(llm.logits(FEW), frozen)
            check_device(llm, device)
            return was_cut

        def at_poll(number, patch):
            device.interrupt_at = device.n_polls + number

        def at_call(owner, name, is_before, number, patch):
            real, calls = getattr(owner, name), []

            def method(*args, **kwargs):
                calls.append(name)
                if is_before and len(calls) == number:
                    raise KeyboardInterrupt
                real(*args, **kwargs)
                if len(calls) == number:
                    raise KeyboardInterrupt

            patch.setattr(owner, name, method)

        places = [at_poll]
        for owner, name in ((Loader, "rows"), (Uploader, "upload"), (FakeStream, "copy")):
            places += [functools.partial(at_call, owner, name, before) for before in (True, False)]
        for place in places:
            number = 1
            while interrupted(functools.partial(place, number)):
                number += 7
            assert number > 7
