"""Decoding that is queued ahead: the same bits as with a host between graphs; and no wait hangs."""

import contextlib
import functools
import os
import signal
import threading
import time
from unittest import mock

import numpy as np
import pytest
from cuda_engine import KINDS, decoded, hybrid, note_calls, on_gpu, survives
from cusim import sim
from fake_device import FakeDevice, FakeGraph, FakeStream, simulator
from powerinfer.runtime.cpu import exchange
from powerinfer.runtime.cpu.block import address
from powerinfer.runtime.cpu.pool import Pool
from powerinfer.runtime.cuda import ahead, operators
from powerinfer.runtime.cuda import device as seam
from powerinfer.runtime.cuda.device import DeviceError

pytestmark = pytest.mark.skipif(bool(sim.unavailable()), reason=sim.unavailable())


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Compiled once, and not in the time of a test."""
    return simulator()


@pytest.fixture
def right(model):
    """Return a function: the logits that a kind of model gives where the host is in the loop."""

    def find(path, where):
        with hybrid(path, where, FakeDevice(has_wait_value=False)) as llm:
            return decoded(llm)

    return find


def of_kind(model, kind):
    name, share, n_layer = KINDS[kind]
    return model(name, "q4_0"), on_gpu(share, n_layer)


@pytest.mark.parametrize(
    "kind", ["llama", "falcon 7b", "falcon, one layer", "opt", "no neurons", "biases, one layer"]
)
def test_the_same_bits_in_any_interleaving(kind, model, right):
    path, where = of_kind(model, kind)
    device, expected = FakeDevice(1), right(path, where)
    with hybrid(path, where, device) as llm:
        for eagerness in np.linspace(0, 0.95, 12):
            device.eagerness = eagerness
            assert np.array_equal(decoded(llm), expected)


@pytest.mark.parametrize("kind", ["llama", "falcon, one layer"])
def test_a_token_is_one_graph(kind, model, monkeypatch):
    """Nothing is queued behind a wait for the CPU but by that graph: no queue can be full."""
    graphs, launch = [], FakeGraph.launch
    monkeypatch.setattr(
        FakeGraph, "launch", lambda g, stream: graphs.append(g) or launch(g, stream)
    )
    with hybrid(*of_kind(model, kind)) as llm:
        decoded(llm, 0)
        graphs.clear()
        decoded(llm, 2)
    head, token = graphs[0], graphs[1]  # of the prompt
    assert graphs == [head, token, head, token, head]


@pytest.mark.parametrize("start", [2**31 - 5, 2**32 - 5])
def test_numbers_wrap(start, model, right):
    path, where = of_kind(model, "llama")
    with hybrid(path, where) as llm:
        tape = llm._ops._tape
        tape._flag[0] = tape._answer[0] = tape._last = start
        assert np.array_equal(decoded(llm, 5)[:4], right(path, where))
        assert tape._last == start + 4 * 5  # of each layer two marks


@contextlib.contextmanager
def by_itself(device):
    """Let a device go on in a thread of its own: jobs can wait for it."""
    lock, is_over, poll = threading.Lock(), threading.Event(), device.poll

    def locked_poll():
        with lock:
            poll()

    def go_on():
        while not is_over.is_set():
            locked_poll()
            time.sleep(0)

    thread = threading.Thread(target=go_on)
    with mock.patch.object(device, "poll", locked_poll):
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def patient():
    """Return a device that jobs wait for as long as it takes."""
    device = FakeDevice()
    device.patience = 50_000_000
    return device


@pytest.mark.parametrize("kind", ["llama", "falcon, one layer"])
def test_a_token_is_one_program(kind, model, right, monkeypatch):
    """While the device goes on by itself, the CPU waits in its jobs, and Python does nothing."""
    path, where = of_kind(model, kind)
    device, expected, stops, run = patient(), right(path, where), [], Pool.run

    def noting_run(pool, jobs, stop=0):
        stops.append(stop)
        return run(pool, jobs, stop)

    with hybrid(path, where, device) as llm:
        monkeypatch.setattr(Pool, "run", noting_run)
        with by_itself(device):
            found = decoded(llm)
    assert np.array_equal(found, expected)
    assert np.count_nonzero(stops) == 3  # a token each


@pytest.mark.parametrize("is_left_out", [False, True])
def test_the_wait_for_the_input_is_needed(is_left_out, model, right):
    path, where = of_kind(model, "llama")
    device, expected = patient(), right(path, where)
    with hybrid(path, where, device) as llm:
        for block in llm._ops._tape._blocks:
            if is_left_out:
                block[exchange.EXCHANGE.early] = -(1 << 20)
        with by_itself(device):
            found = decoded(llm)
    assert np.array_equal(found, expected) != is_left_out


HAS_COME = np.array([1 << 30])
LEFT_OUT = {  # owner, name, in which method of operators.CUDA
    "the device's wait for the CPU's part": (FakeStream, "wait_value", None),
    "the CPU's wait for what its part needs": (ahead.AheadTape, "exchange", "ffn"),
    "the CPU's wait for x of its layers": (ahead.AheadTape, "wait", "_layer"),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_every_wait_is_needed(what, model, right, monkeypatch):
    path, where = of_kind(model, "biases, one layer")
    expected, inside = right(path, where), []
    owner, name, method = LEFT_OUT[what]
    if method is not None:
        real = getattr(owner, name)
        note_calls(monkeypatch, operators.CUDA, method, inside)

        def wait(tape, *marks):
            if not inside or tape._steps is None:
                return real(tape, *marks)
            if name == "wait":
                return None
            block = real(tape, *marks)  # of which the answer stays
            block[exchange.EXCHANGE.flag] = address(HAS_COME)
            return block

    else:

        def wait(*_):
            return None

    def is_right(*how):
        with hybrid(path, where, FakeDevice(*how)) as llm:
            return np.array_equal(decoded(llm), expected)

    assert is_right(1, 0.5)
    monkeypatch.setattr(owner, name, wait)
    late = [functools.partial(is_right, *how) for how in ((0, 0), (1, 0.5), (1, 0.98))]
    assert not all(map(survives, late))


# ---- what goes wrong ----


@pytest.fixture
def at_once(monkeypatch):
    """What does not answer is given up soon."""
    soon = functools.partial(seam.wait_until, timeout_s=0.3)
    monkeypatch.setattr(ahead, "wait_until", soon)


@pytest.mark.parametrize("word", ["flag", "answer"])
def test_a_word_that_does_not_come(word, model, right, at_once):
    """It is a sentence; and what the device was waiting for then comes, so that it goes on."""
    path, where = of_kind(model, "llama")
    expected = right(path, where)
    with hybrid(path, where) as llm:
        tape = llm._ops._tape
        elsewhere = np.zeros(1, np.int64)
        for where_it_is in (elsewhere, getattr(tape, f"_{word}")):
            for block in tape._blocks:
                block[getattr(exchange.EXCHANGE, word)] = address(where_it_is)
            if where_it_is is elsewhere:
                for _ in range(2):
                    with pytest.raises(DeviceError, match="the GPU does not answer: nothing came"):
                        decoded(llm)
        assert np.array_equal(decoded(llm), expected)


@pytest.mark.parametrize("later", [1, 30, 60])
def test_a_real_ctrl_c_while_the_device_hangs(later, model, right):
    path, where = of_kind(model, "llama")
    device, expected = FakeDevice(), right(path, where)
    with hybrid(path, where, device) as llm:
        before = device.n_run
        decoded(llm, 0)
        prompt = device.n_run - before
        device.patience = 20_000
        device.hangs_after = device.n_run + prompt + later
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                decoded(llm)
        finally:
            timer.join()
        device.hangs_after = float("inf")
        assert np.array_equal(decoded(llm), expected)


@pytest.mark.parametrize("kind", ["llama", "falcon, one layer"])
def test_ctrl_c_and_failures_wherever_queueing_is(kind, model, right, monkeypatch):
    """The token ends with what has been raised; the next ones are as if nothing had been."""
    path, where = of_kind(model, kind)
    expected, n_calls, at = right(path, where), [0], [-1]

    def counting(real, error):
        def call(*args):
            n_calls[0] += 1
            if n_calls[0] == at[0]:
                raise error
            return real(*args)

        return call

    with hybrid(path, where) as llm:
        for error in (KeyboardInterrupt(), DeviceError("it is out of memory")):
            with monkeypatch.context() as patched:
                for owner, name in ((FakeGraph, "launch"), (FakeStream, "copy"), (Pool, "run")):
                    patched.setattr(owner, name, counting(getattr(owner, name), error))
                n_calls[0] = 0
                decoded(llm, 1)
                for number in range(1, n_calls[0] + 1, n_calls[0] // 8 + 1):
                    n_calls[0], at[0] = 0, number
                    with pytest.raises(type(error)):
                        decoded(llm, 1)
                    at[0] = -1
                    assert np.array_equal(decoded(llm, 1), expected[:2])
