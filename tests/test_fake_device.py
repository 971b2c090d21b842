"""The fake device: it does what streams, events, values and graphs say, and no earlier."""

import gc
from functools import partial

import fake_device
import numpy as np
import pytest
from fake_device import FakeDevice
from powerinfer.runtime.cuda.device import DeviceError


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(fake_device, "simulator", lambda: None)


def words(device, n):
    """Return pinned int32 words, and the address of each."""
    memory, address = device.pinned(4 * n)
    return memory.view(np.int32), [address + 4 * i for i in range(n)]


def test_work_is_late_and_reads_its_source_then():
    device = FakeDevice()
    stream, (x, at) = device.stream(), words(device, 2)
    x[0] = 1
    stream.copy(at[1], at[0], 4)
    x[0] = 2
    assert x[1] == 0  # nobody has waited
    stream.synchronize()
    assert x[1] == 2


def test_streams_go_their_own_ways_but_for_events():
    orders = set()
    for seed in range(400):
        device = FakeDevice(seed, 0.4 * (seed % 2))
        a, b, done = device.stream(), device.stream(), []
        a.add(partial(done.append, "a1"))
        event = a.record()
        a.add(partial(done.append, "a2"))
        b.add(partial(done.append, "b1"))
        b.wait(event)
        b.add(partial(done.append, "b2"))
        for stream in (a, b):
            stream.synchronize()
        orders.add(tuple(done))
    first, last = ("a1", "a2", "b1", "b2"), ("b1", "a1", "b2", "a2")
    assert {first, last} <= orders
    for order in orders:
        assert order.index("a1") < order.index("a2") and order.index("a1") < order.index("b2")
        assert order.index("b1") < order.index("b2")
    assert len(orders) == 5  # of six ways to merge two pairs, one breaks the event's rule


def test_values_are_waited_for():
    for seed in range(10):
        device = FakeDevice(seed)
        a, b, (x, at) = device.stream(), device.stream(), words(device, 3)
        x[2] = 2
        b.wait_value(at[0], at[2], 5)
        b.memset(at[1], 1, 4)
        with pytest.raises(DeviceError, match="does not answer"):
            FakeDevice.stream(device).wait(b.record())
            b.synchronize(0.01)
        assert x[1] == 0
        device.lost = ""
        a.write_value(at[0], at[2], 7)
        b.synchronize()
        assert x[0] == 9 and x[1] == 0x01010101
        x[0] = 3  # counters may wrap
        b.wait_value(at[0], at[2], -18)
        b.synchronize()


def test_graphs_keep_their_order_over_streams():
    ends = set()
    for seed in range(20):
        device = FakeDevice(seed, 0.3)
        a, b, done = device.stream(), device.stream(), []
        with a.capture() as graph:
            a.add(partial(done.append, "first"))
            b.wait(a.record())
            b.add(partial(done.append, "b"))
            a.add(partial(done.append, "a"))
            a.wait(b.record())
            a.add(partial(done.append, "last"))
        a.synchronize()
        assert not done  # captured, not done
        for _ in range(2):
            graph.launch(a)
        a.synchronize()
        for once in (done[:4], done[4:]):
            assert once[0] == "first" and once[3] == "last" and set(once[1:3]) == {"a", "b"}
            ends.add(tuple(once[1:3]))
    assert len(ends) == 2
    with pytest.raises(AssertionError, match="has not come back"), a.capture():
        b.wait(a.record())
        b.memset(0, 0, 0)
    with pytest.raises(AssertionError, match="while capturing"), a.capture():
        a.synchronize()


def test_memory_is_counted_and_looked_after():
    device = FakeDevice(memory_total=1000)
    stream, address = device.stream(), device.allocate(600)
    assert device.memory_free() == 400 and (device.locate(address, 600) == 0xFF).all()
    with pytest.raises(DeviceError, match="no room for 401 bytes"):
        device.allocate(401)
    pinned, at = device.pinned(8)
    stream.copy(address, at, 8)
    del pinned
    gc.collect()
    with pytest.raises(AssertionError, match="are nobody's"):
        stream.synchronize()
    stream.memset(address + 593, 0, 8)
    with pytest.raises(AssertionError, match="are nobody's"):
        stream.synchronize()
    device.free(address)
    device.allocate(1000)
    assert (device.live, device.peak) == (1000, 1000)
    device.close()
    assert device.live == 0


def test_planted_faults():
    device = FakeDevice()
    stream = device.stream()
    device.fails_after = 2
    event = [stream.record() for _ in range(3)][1]
    while not event.is_done():
        pass
    for call in (stream.is_done, stream.record, device.memory_free, lambda: device.pinned(1)):
        with pytest.raises(DeviceError, match="a kernel failed on a fake GPU"):
            call()
    device = FakeDevice()
    stream = device.stream()
    device.hangs_after = 1
    events = [stream.record() for _ in range(2)]
    with pytest.raises(DeviceError, match="a fake GPU does not answer"):
        stream.synchronize(0.01)
    assert events[0].has_run and not events[1].has_run and device.lost
