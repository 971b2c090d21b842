"""The Device protocol on a stand-in for CuPy and on a real GPU; slabs and uploads."""

import ctypes
import gc
import importlib
import importlib.util
import inspect
import re
import shutil
import sys
import threading

import numpy as np
import pytest
from fake_cupy import CUDAError, FakeCuda
from powerinfer.runtime.cuda import arguments, compiler, detect
from powerinfer.runtime.cuda.device import DeviceError, Slab, Uploader, aligned, wait_until

KERNELS = """
#include "common.cuh"
// y[i] += a * x[i] for i < n.   x, y [n]
// launch: grid (ceil(n / 64)), block 64
struct axpy_args { int n; const float* x; float* y; float a; };
extern "C" __global__ void __launch_bounds__(64) axpy(const axpy_args p) {
    after_predecessors();
    int i = blockIdx.x * 64 + threadIdx.x;
    if (i < p.n) p.y[i] += p.a * p.x[i];
}
// y[i] = y[i] + 1 through dynamic shared memory of n floats
// launch: grid (1), block 64, shared 4 * n
struct shared_args { int n; float* y; };
extern "C" __global__ void __launch_bounds__(64) shared(const shared_args p) {
    extern __shared__ float room[];
    after_predecessors();
    for (int i = threadIdx.x; i < p.n; i += 64) room[i] = p.y[i] + 1;
    __syncthreads();
    for (int i = threadIdx.x; i < p.n; i += 64) p.y[i] = room[p.n - 1 - i];
}
"""


def floats(address, n):
    """View memory of the stand-in."""
    return np.ctypeslib.as_array((ctypes.c_float * n).from_address(int(address)))


def axpy(p):
    floats(p["y"], p["n"])[:] += p["a"] * floats(p["x"], p["n"])


def shared(p):
    floats(p["y"], p["n"])[:] = floats(p["y"], p["n"])[::-1] + 1


def words(p):
    """Return the word, as an array, and the number that it is about."""
    word, base = (np.ctypeslib.as_array(ctypes.c_uint32.from_address(int(p[n]))) for n in WORDS)
    return word.reshape(1), int(base) + int(p["number"])


WORDS = ("word", "base")


def write_word(p):
    word, number = words(p)
    word[0] = number % 2**32


def wait_word(p):
    word, number = words(p)
    return (int(word[0]) - number) % 2**32 < 2**31


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "kernels"
    path.mkdir()
    (path / "test.cu").write_text(KERNELS)
    for name in (arguments.COMMON, "exchange.cu"):
        shutil.copy(arguments.FOLDER / name, path)
    return path


@pytest.fixture
def fake(monkeypatch, folder):
    """The bindings that gpu.py sees, in place of CuPy's."""
    made = {k.name: k.arguments for k in arguments.kernels(folder).values()}
    functions = (axpy, shared, write_word, wait_word)
    cuda = FakeCuda({f.__name__: (made[f.__name__], f) for f in functions})
    for name, module in cuda.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "powerinfer.runtime.cuda.gpu", raising=False)
    load = ctypes.CDLL
    monkeypatch.setattr(
        ctypes,
        "CDLL",
        lambda name, **k: cuda.libcuda if name == detect.LIBRARY else load(name, **k),
    )
    monkeypatch.setattr(
        compiler,
        "compile_all",
        lambda *a: {"test.cu": b"axpy shared", "exchange.cu": b"write_word wait_word"},
    )
    yield cuda
    sys.modules.pop("powerinfer.runtime.cuda.gpu", None)


def gpu_class():
    return importlib.import_module("powerinfer.runtime.cuda.gpu").GPU


@pytest.fixture(params=["stand-in", pytest.param("GPU", marks=pytest.mark.gpu)])
def device(request, folder, monkeypatch, tmp_path):
    """What implements Device; the tests that use it hold for all of them."""
    if request.param == "stand-in":
        request.getfixturevalue("fake")
    else:
        found = detect.find()
        if found.reason:
            pytest.skip(found.reason)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = gpu_class()(0, folder=folder)
    yield gpu
    gpu.close()


def fill(kernel, folder, **values):
    args = np.zeros(1, arguments.kernels(folder)[kernel].arguments)
    for name, value in values.items():
        args[name] = value
    return args


class Vector:
    """n floats on a device, with pinned memory to write and read them through."""

    def __init__(self, device, stream, values):
        self.n, self.stream = len(values), stream
        self.bytes, self.host = device.pinned(4 * self.n)
        self.address = device.allocate(4 * self.n)
        self.bytes.view(np.float32)[:] = values
        stream.copy(self.address, self.host, 4 * self.n)

    def read(self):
        self.stream.copy(self.host, self.address, 4 * self.n)
        self.stream.synchronize()
        return self.bytes.view(np.float32).copy()


# ---- the protocol, on all devices ----


def is_stand_in(device):
    return device.name == "Fake 1000"


def test_memory(device):
    assert device.name and 0 < device.memory_free() <= device.memory_total
    before = device.memory_free()
    address = device.allocate(300_000)
    assert address % 256 == 0
    if is_stand_in(device):  # a real GPU gives memory in large pieces, and to others too
        assert device.memory_free() == before - 300_000
    device.free(address)
    if is_stand_in(device):
        assert device.memory_free() == before
    with pytest.raises(DeviceError, match=r"has no room for [\d.]+ GiB; [\d.]+ GiB are free"):
        device.allocate(2 * device.memory_total)
    device.free(device.allocate(256))  # it goes on after that


def test_copies_and_memset(device):
    stream = device.stream()
    host, at = device.pinned(1000)
    assert host.dtype == np.uint8 and host.shape == (1000,) and not host.any()
    host[:] = np.arange(1000) % 251
    a, b = device.allocate(1000), device.allocate(1000)
    stream.copy(a, at, 1000)
    stream.copy(b, a + 3, 997)  # within the device, unaligned
    stream.memset(b + 500, 7, 10)
    stream.copy(at, b, 997)
    stream.synchronize()
    assert stream.is_done()
    expected = np.concatenate([np.arange(3, 1000), [997, 998, 999]]) % 251
    expected[500:510] = 7
    assert host.tolist() == expected.tolist()


def test_launch_takes_the_struct_by_value(device, folder):
    stream = device.stream()
    x, y = (Vector(device, stream, np.full(100, v)) for v in (2, 1))
    args = fill("axpy", folder, n=99, x=x.address, y=y.address, a=0.5)
    stream.launch("axpy", (2,), 64, args)
    args["n"], args["a"] = 3, 100  # another launch with the same array, the first still queued
    stream.launch("axpy", (2, 1), 64, args)
    other = args.copy()
    other["n"], other["a"] = 1, 1000
    stream.launch("axpy", (1, 1, 1), 64, other)
    assert y.read().tolist() == [2202.0] + [202.0] * 2 + [2.0] * 96 + [1.0]
    for wrong in (args[0], np.zeros(2, args.dtype), np.zeros(1, np.int32)):
        with pytest.raises(TypeError, match="axpy takes one axpy_args"):
            stream.launch("axpy", (1,), 64, wrong)
    with pytest.raises(KeyError):
        stream.launch("nothing", (1,), 64, args)
    with pytest.raises(DeviceError, match="fails"):
        stream.launch("axpy", (0,), 64, args)
    assert y.read()[0] == 2202  # none of these has hurt


def test_shared_memory(device, folder):
    stream = device.stream()
    for n in (10, 15000, 100):  # the second takes more than a kernel gets without asking
        y = Vector(device, stream, np.arange(n))
        stream.launch("shared", (1,), 64, fill("shared", folder, n=n, y=y.address), 4 * n)
        assert y.read().tolist() == np.arange(1, n + 1)[::-1].tolist()
        device.free(y.address)


def test_kernels_may_begin_early_where_they_can(fake, folder):
    for capability, attributes in (((8, 9), []), ((9, 0), [(6, 1)]), ((12, 0), [(6, 1)])):
        fake.capability = capability
        stream = gpu_class()(0, folder=folder).stream()
        stream.launch("axpy", (1, 2), 64, fill("axpy", folder))
        assert fake.launched.pop() == ("axpy", (1, 2, 1), (64, 1, 1), 0, attributes)


def test_streams_meet_by_events(device):
    first, second = device.stream(), device.stream()
    host, at = device.pinned(12)
    a = device.allocate(4)
    first.wait_value(at, at + 8, 1)
    first.memset(a, 5, 4)
    event = first.record()
    second.wait(event)
    second.copy(at + 4, a, 4)
    assert not event.is_done() and not second.is_done() and not first.is_done()
    host[:4].view(np.int32)[0] = 1
    second.synchronize()
    assert event.is_done() and host[4:8].tolist() == [5] * 4


def test_values(device):
    stream = device.stream()
    host, at = device.pinned(12)
    words, base = host.view(np.int32), at + 8
    words[2] = 30
    stream.write_value(at, base, 11)
    stream.wait_value(at + 4, base, -35)  # 0 is more
    stream.synchronize()
    assert words.tolist() == [41, 0, 30]
    words[1] = 2**31 - 1
    stream.wait_value(at + 4, base, 2**31 - 30)  # one further, counting on
    stream.write_value(at, base, -31)
    with pytest.raises(DeviceError, match="the word does not answer"):
        wait_until(stream.is_done, 0.05, "the word")
    assert words[0] == 41
    words[1] = -(2**31)
    stream.synchronize()
    assert words[0] == -1


def test_graph(device, folder):
    stream, other = device.stream(), device.stream()
    x, y = (Vector(device, stream, np.full(64, v)) for v in (1, 10))
    args = fill("axpy", folder, n=64, x=x.address, y=y.address, a=1)
    stream.synchronize()
    with stream.capture() as graph:
        stream.launch("axpy", (1,), 64, args)
        stream.copy(x.address, y.address, 4)  # x[0] = y[0]
    args["a"] = 1000  # the graph has what it was captured with
    assert y.read()[0] == 10  # captured, not run
    for _ in range(3):
        graph.launch(stream)
    assert y.read().tolist() == [44.0] + [13.0] * 63
    graph.launch(other)
    other.synchronize()
    assert y.read().tolist() == [88.0] + [14.0] * 63


def test_graph_over_two_streams(device):
    first, second = device.stream(), device.stream()
    y = Vector(device, first, np.zeros(2))
    first.synchronize()
    with first.capture() as graph:
        second.wait(first.record())
        second.memset(y.address, 1, 4)
        first.memset(y.address + 4, 2, 4)
        first.wait(second.record())
    second.synchronize()
    assert not y.read().any()
    for _ in range(2):
        graph.launch(first)
        assert y.read().view(np.uint8).tolist() == [1] * 4 + [2] * 4
        second.memset(y.address, 0, 8)
        second.synchronize()


def test_error_while_capturing(device, folder):
    stream = device.stream()
    y = Vector(device, stream, np.zeros(64))
    stream.synchronize()
    with pytest.raises(ZeroDivisionError), stream.capture():
        stream.memset(y.address, 1, 4)
        raise ZeroDivisionError
    assert y.read()[0] == 0  # the stream is usable
    with stream.capture() as graph:
        stream.memset(y.address, 0, 4)
    graph.launch(stream)
    stream.synchronize()


def test_pinned_memory_lives_as_long_as_its_array(device):
    stream = device.stream()
    views = []
    for i in range(20):
        array, at = device.pinned(4096)
        stream.memset(at, i, 4096)
        views.append(array[100:200])
        del array
    gc.collect()
    stream.synchronize()
    assert [view.tolist() for view in views] == [[i] * 100 for i in range(20)]


def test_upload(device):
    rng = np.random.default_rng(1)
    stream, told = device.stream(), []
    uploader = Uploader(device, stream, told.append, nbytes=1000)
    sizes = [0, 1, 999, 1, 2500, 7, 0, 5000, 3]
    data = rng.integers(0, 256, sum(sizes)).astype(np.uint8)
    scratch = np.zeros(max(sizes), np.uint8)

    def pieces():
        at = 0
        for size in sizes:
            scratch[:size] = data[at : at + size]
            yield scratch[:size]
            scratch[:] = 0xEE  # a piece is used up when the next is asked for
            at += size

    a, b = device.allocate(len(data)), device.allocate(24)
    uploader.upload(a, pieces())
    uploader.upload(b, [data[:48].reshape(4, 12)[:, ::2]])  # any shape, any strides
    uploader.finish()
    assert stream.is_done() and sum(told) == len(data) + 24 and max(told) <= 1000
    host, at = device.pinned(len(data) + 24)
    stream.copy(at, a, len(data))
    stream.copy(at + len(data), b, 24)
    stream.synchronize()
    assert np.array_equal(host[: len(data)], data)
    assert np.array_equal(host[len(data) :], data[:48].reshape(4, 12)[:, ::2].reshape(-1))


def test_one_buffer_is_filled_while_the_other_travels(device):
    stream = device.stream()
    host, at = device.pinned(8)
    address = device.allocate(2000)
    uploader = Uploader(device, stream, nbytes=1000)  # it allocates, which may wait for all work
    stream.wait_value(at, at + 4, 1)
    uploader.upload(address, [np.zeros(2000, np.uint8)])
    assert not stream.is_done()  # all of it is on its way, and upload has not waited
    host.view(np.int32)[0] = 1
    stream.synchronize()


def test_slab(device):
    slab = Slab(device, 1024)
    addresses = [slab.take(n) for n in (1, 256, 0, 257)]
    assert [a - slab.address for a in addresses] == [0, 256, 512, 512] and slab.used == 1024
    assert slab.address % 256 == 0 and [aligned(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]
    with pytest.raises(
        DeviceError, match="1 bytes do not fit into the 0 that are left of the 1024"
    ):
        slab.take(1)
    with pytest.raises(DeviceError):
        Slab(device, 1000).take(1000)  # 24 bytes short of what it occupies
    assert Slab(device, 0).take(0) == 0


# ---- the stand-in alone: what cannot be provoked on a real GPU ----


def test_everything_is_given_back(fake, folder):
    gpu = gpu_class()(0, folder=folder)
    stream = gpu.stream()
    with stream.capture() as graph:
        stream.memset(gpu.allocate(100), 0, 100)
    event, (host, _) = stream.record(), gpu.pinned(10)
    gpu.close()
    assert fake.released.count("memory") == 1
    before = list(fake.released)
    del gpu, stream, graph, event, host
    gc.collect()
    assert fake.released == before  # not by whoever happens to collect garbage
    other = gpu_class()(0, folder=folder)
    assert not fake.memory and not fake.queues and not fake.events and not fake.graphs
    assert fake.released.count("module") == 2
    other.close()


def test_memory_of_what_is_dropped_is_given_back(fake, folder):
    """As of an engine that nobody closes; before anybody asks how much is free."""
    other = gpu_class()(0, folder=folder)
    free = other.memory_free()
    gpu = gpu_class()(0, folder=folder)
    gpu.allocate(100)
    gpu.free(gpu.allocate(50))
    assert other.memory_free() < free
    del gpu
    gc.collect()
    assert other.memory_free() == free and fake.released.count("memory") == 2
    other.close()


def test_nothing_waits_for_all_work_beside_work_that_waits_for_us(fake, folder):
    """Whatever allocates, frees or loads waits in other threads for the lock of `exclusive`."""
    gpu = gpu_class()(0, folder=folder)
    stream, address = gpu.stream(), gpu.allocate(8)

    def capture():
        with stream.capture():
            pass

    for call in (
        lambda: gpu.allocate(8),
        lambda: gpu.pinned(8),
        lambda: gpu_class()(0, folder=folder),
        capture,
        lambda: gpu.free(address),
        gpu.close,
    ):
        thread = threading.Thread(target=call)
        with gpu.exclusive():
            thread.start()
            thread.join(0.05)
            assert thread.is_alive()
        thread.join(5)
        assert not thread.is_alive()


def test_events_do_not_pile_up(fake, folder):
    stream = gpu_class()(0, folder=folder).stream()
    for _ in range(5000):
        stream.record()
        stream.synchronize()
    assert len(fake.events) < 2000


def test_lost_device(fake, folder):
    gpu = gpu_class()(0, folder=folder)
    stream, (host, _), address = gpu.stream(), gpu.pinned(8), gpu.allocate(8)
    fake.fault, released = 700, list(fake.released)
    pattern = "a kernel failed on Fake 1000, start the program again: cudaError700"
    with pytest.raises(DeviceError, match=pattern):
        stream.synchronize()
    fake.fault = 0
    for call, *args in ((stream.is_done,), (gpu.memory_free,), (gpu.stream,), (gpu.free, address)):
        with pytest.raises(DeviceError, match=pattern):
            call(*args)
    gpu.close()
    del stream, host, gpu, call
    gc.collect()
    assert fake.released == released  # to give back would wait for what never ends


def test_a_device_that_does_not_answer(fake, folder):
    gpu = gpu_class()(0, folder=folder)
    stream, other, (host, at) = gpu.stream(), gpu.stream(), gpu.pinned(8)
    stream.wait_value(at, at + 4, 1)
    released = list(fake.released)
    pattern = r"^Fake 1000 does not answer: nothing came back for 0\.02 s$"
    for stuck in (stream, other):  # the second finds the device given up
        with pytest.raises(DeviceError, match=pattern):
            stuck.synchronize(0.02)
    with pytest.raises(DeviceError, match=pattern):
        gpu.allocate(1)
    gpu.close()
    del gpu, stream, other, stuck, host
    gc.collect()
    assert fake.released == released


def test_close_does_not_wait_for_ever(fake, folder, monkeypatch):
    gpu = gpu_class()(0, folder=folder)
    stream, (_, at), _ = gpu.stream(), gpu.pinned(8), gpu.allocate(4)
    stream.wait_value(at, at + 4, 1)
    monkeypatch.setattr(sys.modules["powerinfer.runtime.cuda.gpu"], "_CLOSING_S", 0.01)
    gpu.close()
    assert "memory" not in fake.released
    with pytest.raises(DeviceError, match="Fake 1000 does not answer"):
        gpu.allocate(1)


def test_other_errors_are_sentences(fake, folder, monkeypatch):
    with pytest.raises(DeviceError, match="GPU 1 fails: cudaError101"):
        gpu_class()(1, folder=folder)
    gpu = gpu_class()(0, folder=folder)
    with pytest.raises(DeviceError, match="Fake 1000 is out of memory"):
        gpu.pinned(2 << 20)
    stream = gpu.stream()
    monkeypatch.setattr(fake.runtime, "eventQuery", lambda event: 999)
    with pytest.raises(DeviceError, match="Fake 1000 fails: cudaError999"):
        stream.record().is_done()
    assert stream.is_done()


@pytest.mark.parametrize(("blocking", "can_wait"), [(None, True), ("0", True), ("1", False)])
def test_launches_that_block_cannot_wait_for_the_host(
    fake, folder, monkeypatch, blocking, can_wait
):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    if blocking:
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", blocking)
    assert gpu_class()(0, folder=folder).has_wait_value is can_wait


def test_values_in_graphs(device):
    """A graph that waits is repeated with other numbers: they count from a word."""
    stream = device.stream()
    host, at = device.pinned(12)
    words, base = host.view(np.int32), at + 8
    with stream.capture() as graph:
        stream.write_value(at, base, 1)
        stream.wait_value(at + 4, base, 2)
        stream.write_value(at, base, 3)
    for first in (0, 100, 2**31 - 2):
        words[2] = first
        graph.launch(stream)
        wait_until(
            lambda at=first + 1: words[0] == np.int64(at).astype(np.int32) or stream.is_done()
        )
        assert not stream.is_done()
        words[1] = np.int64(first + 2).astype(np.int32)
        stream.synchronize()
        assert words[0] == np.int64(first + 3).astype(np.int32)


def test_the_stand_in_has_the_signatures_of_cupy():
    """CuPy's functions have parameters of the same names, in the same order."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy")
    from cupy.cuda import driver, runtime

    fake = FakeCuda({})
    for ours, theirs in ((fake.runtime, runtime), (fake.driver, driver)):
        for name in (n for n in dir(ours) if not n.startswith("_")):
            mine, real = getattr(ours, name), getattr(theirs, name)
            if isinstance(mine, int):
                assert mine == real, name
            elif isinstance(mine, type):
                assert issubclass(mine, CUDAError) and issubclass(real, RuntimeError)
            else:
                declared = re.match(r"\w+\(([^)]*)\)", real.__doc__)[1]
                words = [p.split("=")[0].split()[-1] for p in declared.split(",") if p]
                assert words == list(inspect.signature(mine).parameters), name


def test_wait_until():
    polls = iter([False, False, True])
    wait_until(lambda: next(polls), 5)
    with pytest.raises(DeviceError, match="the printer does not answer"):
        wait_until(lambda: False, 0.03, "the printer")
