"""Whether a GPU is used, and how much of it; what is said about it, and without one."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny
from conftest import kl
from cusim import sim
from fake_device import FakeDevice
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.cpu import bandwidth
from powerinfer.runtime.cuda import choose, detect
from powerinfer.runtime.cuda.arguments import FOLDER
from powerinfer.runtime.cuda.device import DeviceError
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import RequestError
from test_cli import last_line, run

GPU = detect.FoundGPU(0, "a fake GPU", 1 << 30, (8, 9))
NONE = detect.Found(reason="no GPU: none is plugged in")
MIB = 1 / 1024  # GiB


@pytest.fixture
def device(monkeypatch):
    """The one GPU of this machine, much faster than its CPU, and close to it."""
    if why := sim.unavailable():
        pytest.skip(why)
    device = FakeDevice(memory_total=64 << 20)
    monkeypatch.setattr(detect, "find", lambda: detect.Found((GPU,), (13, 0)))
    monkeypatch.setattr(choose, "open_device", lambda number, notify: device)
    monkeypatch.setattr(choose, "read_rate", lambda device: 1e12)
    monkeypatch.setattr(choose, "CROSSING", 1e-9)
    monkeypatch.setattr(bandwidth.Reader, "measure", lambda *args: 1e10)
    return device


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(detect, "find", lambda: NONE)


def opened(path, **options):
    said = []
    options = {"threads": 2, "context": 64, "chunk": 16, "vram_budget": 2 * MIB, **options}
    return Engine(path, RunOptions(**options), said.append), said


def test_budgets(device, tiny_gguf):
    path, places = tiny_gguf("opt", "f16", True), set()
    with Engine(path, RunOptions(backend="cpu", context=64)) as llm:
        right = llm.logits(tiny.token_ids()[:5])
    for mib in np.linspace(0.3, 2, 12).tolist():
        engine, said = opened(path, vram_budget=mib * MIB)
        with engine as llm:
            assert kl(right, llm.logits(tiny.token_ids()[:5])) < 1e-6
            if llm.backend == "cuda":
                p = llm._ops.placement
                assert device.live == p.slab <= p.used <= p.budget == int(mib * 2**20)
                places.add(p.gpu_layers + p.is_everything + p.has_embedding)
                ends = "all 2 layers", f"{p.gpu_layers} of 2 layers"
                text = f"a fake GPU: 0.00 of 0.00 GiB, {ends[not p.is_everything]}"
            else:
                assert device.live == 0
                places.add(0)
                text = "a fake GPU: CPU only: one layer with the head and buffers takes"
            assert said[-1].startswith(text), said
        assert device.live == 0
    assert {0, 2, 4} <= places  # nothing; layers without their neurons; all, embedding too


def test_the_default_budget_leaves_a_reserve(device, tiny_gguf, monkeypatch):
    monkeypatch.setattr(choose, "RESERVE", 62 << 20)
    engine, _ = opened(tiny_gguf("gqa", "f16", True), vram_budget=None)
    with engine as llm:
        assert llm._ops.placement.budget == 2 << 20


def test_what_cannot_be(device, tiny_gguf):
    path = tiny_gguf("gqa", "f16", True)
    for options, error, message in (
        ({"vram_budget": 1}, DeviceError, "a fake GPU has 0.06 GiB free, less than the budget"),
        ({"vram_budget": 1e-6, "backend": "cuda"}, RequestError, "CPU only: one layer"),
        ({"gpu": 3, "backend": "cuda"}, RequestError, "no GPU 3: there are 0"),
        ({"gpu": None, "backend": "cuda"}, RequestError, "the backend cuda needs a GPU"),
        ({"vram_budget": 0, "backend": "cuda"}, RequestError, "the backend cuda needs a GPU"),
    ):
        with pytest.raises(error, match=message):
            opened(path, **options)
        assert device.live == 0
    engine, said = opened(path, gpu=3)
    with engine as llm:
        assert llm.backend == "cpu" and said[-1] == "no GPU 3: there are 0; running on the CPU"


@pytest.mark.parametrize("most", [30, 16])
def test_heads_that_the_kernels_have_no_room_for(device, tiny_gguf, monkeypatch, most):
    path = tiny_gguf("gqa", "f16", True)  # heads of 32
    monkeypatch.setattr(choose, "MAX_HEAD_DIM", most)
    engine, said = opened(path)
    with engine as llm:
        assert llm.backend == "cpu"
    text = f"kernels take heads of even sizes up to {most}, and this model's have 32"
    assert text in said[-1] and said[-1].endswith("; running on the CPU")
    with pytest.raises(RequestError, match=text):
        opened(path, backend="cuda")


def test_odd_heads_are_for_the_cpu(device):
    for head_dim, is_fine in ((15, False), (16, True), (256, True), (257, False), (258, False)):
        model = SimpleNamespace(config=SimpleNamespace(head_dim=head_dim))
        with nullcontext() if is_fine else pytest.raises(RequestError, match="even sizes"):
            assert choose._open(model, 0, print) is device
    assert f"MAX_HEAD_DIM = {choose.MAX_HEAD_DIM};" in (FOLDER / "attention.cu").read_text()


def test_a_gpu_that_cannot_be_opened(device, tiny_gguf, monkeypatch):
    """The CPU does it all, and it is said why; an error for those who asked for the GPU."""
    path = tiny_gguf("gqa", "f16", True)

    def fails(number, notify):
        raise DeviceError("a fake GPU: out of memory")

    monkeypatch.setattr(choose, "open_device", fails)
    engine, said = opened(path)
    with engine as llm:
        assert llm.backend == "cpu" and said[-1] == "a fake GPU: out of memory; running on the CPU"
    with pytest.raises(DeviceError, match="out of memory"):
        opened(path, backend="cuda")


def test_a_cupy_that_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "powerinfer.runtime.cuda.gpu", raising=False)
    with pytest.raises(DeviceError, match="no GPU: CuPy cannot be imported"):
        choose.open_device(0, print)


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_other_backends_look_for_no_gpu(backend, tiny_gguf):
    with mock.patch.object(detect, "find", side_effect=AssertionError):
        engine, said = opened(tiny_gguf("gqa", "f16"), backend=backend)
    with engine as llm:
        assert llm.backend == backend and not any("GPU" in text for text in said)


def test_rate_of_a_device():
    """Copies within it are timed, and nothing is left there."""
    if why := sim.unavailable():
        pytest.skip(why)
    device = FakeDevice(memory_total=8 << 20)
    rate = choose.read_rate(device, 1 << 20)
    assert 1e8 < rate < 1e13 and device.live == 0 and device.peak == 2 << 20
    assert choose.read_rate(device) > 0 and device.peak == 4 << 20  # half of what is free


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ((), "no GPU: none is plugged in; running on the CPU"),
        (("--gpu", 3), "no GPU: none is plugged in; running on the CPU"),
        (("--vram-budget", 4), "no GPU: none is plugged in; running on the CPU"),
        (("--vram-budget", 0), ""),
        (("--no-gpu",), ""),
        (("--backend", "cpu"), ""),
    ],
)
def test_infer_without_a_gpu(option, says, no_gpu, capfd, tiny_gguf):
    args = ("-m", tiny_gguf("gqa", "f16", True), "-p", "x", "-n", 2, "-t", 1, "--temp", 0)
    code, out, err = run(capfd, "infer", *args, *option)
    assert code == 0 and out.startswith("x") and "cpu backend" in err
    assert [line for line in err.splitlines() if "no GPU" in line] == ([says] if says else [])


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ((), "no GPU: none is plugged in"),
        (("--no-gpu",), "the backend cuda needs a GPU"),
        (("--vram-budget", 0), "the backend cuda needs a GPU"),
    ],
)
def test_infer_that_needs_a_gpu(option, says, no_gpu, capfd, tiny_gguf):
    args = ("-m", tiny_gguf("gqa", "f16", True), "-p", "x", "-n", 2, "--backend", "cuda")
    code, out, err = run(capfd, "infer", *args, *option)
    assert code == 1 and out == "" and says in last_line(err) and "Traceback" not in err
