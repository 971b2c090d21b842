"""A device of the Device protocol on the CPU: kernels run in the simulator, and late.

What is queued becomes nodes that wait for other nodes, as streams and events say; of those that
may run, `seed` says which is next. Nothing runs before the host asks the device for something, and
then as little as `eagerness` allows, so that a host that forgets to wait reads what was there
before, and a copy whose source has been overwritten meanwhile copies the wrong thing.

    device = FakeDevice(seed=3, eagerness=0.2)
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from cusim import sim
from powerinfer.runtime.cuda import arguments
from powerinfer.runtime.cuda.device import ALIGNMENT, TIMEOUT_S, DeviceError, wait_until

MEMORY = 256 << 20  # bytes
CLOSING_S = 5.0


@functools.cache
def simulator() -> sim.Simulator:
    """All kernels of this project, fast."""
    return sim.load(*sorted(path.name for path in sim.KERNELS.glob("*.cu")))


def _always() -> bool:
    return True


def _nothing() -> None:
    return None


@dataclasses.dataclass(eq=False)
class Node:
    """A piece of work: it runs when `needs` have run and `may_run()`; and it is an event, too."""

    run: Callable[[], Any]
    needs: list[Node]
    device: FakeDevice
    may_run: Callable[[], bool] = _always
    has_run: bool = False
    graph: FakeGraph | None = None  # that it was captured in: then it never runs itself

    def is_done(self) -> bool:
        if self.graph is not None:
            raise DeviceError("an event that was captured cannot be asked for")
        self.device.poll()
        return self.has_run


class FakeGraph:
    """Nodes in the order in which they were captured."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.nodes: list[Node] = []
        self.ends: dict[FakeStream, Node | None] = {}  # of the streams that take part: last nodes
        self.is_whole = False

    def launch(self, stream: FakeStream) -> None:
        assert self.is_whole, "it is still being captured"
        first = stream.add(_nothing)
        made: dict[int, Node] = {}
        for node in self.nodes:
            needs = [made[id(need)] for need in node.needs] or [first]
            made[id(node)] = self.device.queue(Node(node.run, needs, self.device, node.may_run))
        stream.add(_nothing, list(made.values()))


class FakeStream:
    """Nodes, each after the one before."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self._last: Node | None = None

    def add(
        self,
        run: Callable[[], Any],
        needs: list[Node] | None = None,
        may_run: Callable[[], bool] = _always,
    ) -> Node:
        """Queue or capture a node after the last one and `needs`; let the device run some."""
        graph, needs = self.device.capturing, list(needs or [])
        if graph is not None and (self in graph.ends or any(n.graph is graph for n in needs)):
            before = graph.ends.get(self)
            self.device.check()
            node = Node(run, needs + ([before] if before else []), self.device, may_run)
            assert all(need.graph is graph for need in node.needs), "waits for what is not in it"
            node.graph, graph.ends[self] = graph, node
            graph.nodes.append(node)
            return node
        assert all(need.graph is None for need in needs), "waits for a captured event"
        self._last = Node(run, needs + ([self._last] if self._last else []), self.device, may_run)
        return self.device.queue(self._last)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        def run() -> None:
            self.device.locate(src, nbytes)
            self.device.locate(dst, nbytes)
            ctypes.memmove(dst, src, nbytes)

        self.add(run)

    def memset(self, dst: int, byte: int, nbytes: int) -> None:
        def run() -> None:
            self.device.locate(dst, nbytes)
            ctypes.memset(dst, byte, nbytes)

        self.add(run)

    def launch(
        self, kernel: str, grid: tuple[int, ...], block: int, args: np.ndarray, shared: int = 0
    ) -> None:
        known = arguments.kernels()[kernel]
        assert args.dtype == known.arguments and args.shape == (1,)
        assert block == known.block, f"{kernel} is for {known.block} threads"
        data = args.tobytes()
        self.add(lambda: self.device.simulator.launch(kernel, grid, block, data, shared))

    def record(self) -> Node:
        return self.add(_nothing)

    def wait(self, event: Node) -> None:
        self.add(_nothing, [event])

    def write_value(self, address: int, base: int, number: int) -> None:
        word, first = self._word(address), self._word(base)
        self.add(lambda: word.__setitem__(0, np.uint32(int(first[0]) + number & 0xFFFFFFFF)))

    def wait_value(self, address: int, base: int, number: int) -> None:
        word, first = self._word(address), self._word(base)
        self.add(_nothing, may_run=lambda: int(word[0]) - int(first[0]) - number & 0x80000000 == 0)

    def _word(self, address: int) -> np.ndarray:
        assert self.device.has_wait_value
        return self.device.locate(address, 4).view(np.uint32)

    def is_done(self) -> bool:
        self.device.poll()
        return self._last is None or self._last.has_run

    def synchronize(self, timeout_s: float = TIMEOUT_S) -> None:
        try:
            wait_until(self.is_done, timeout_s, self.device.name)
        except DeviceError as error:
            self.device.lost = self.device.lost or str(error)
            raise

    @contextlib.contextmanager
    def capture(self) -> Iterator[FakeGraph]:
        device = self.device
        device.check()
        graph = device.capturing = FakeGraph(device)
        graph.ends[self] = None
        try:
            yield graph
        finally:
            device.capturing = None
        reached, look = set(), [graph.ends[self]]
        while look:
            node = look.pop()
            if node is not None and id(node) not in reached:
                reached.add(id(node))
                look += node.needs
        ends = (end for end in graph.ends.values() if end is not None)
        assert all(id(end) in reached for end in ends), "a stream has not come back"
        graph.is_whole = True


class FakeDevice:
    """The device. `seed`: of the order in which nodes run, as far as streams leave it open.

    `eagerness`: how likely, whenever something is queued, the device runs another node; 0: only
    when it is polled, and one at a time. `live` and `peak`: bytes that are, and have been,
    allocated. Faults to plant: with `fails_after` nodes run it is lost, with `hangs_after` it does
    nothing any more; `interrupt_at` is the number of a poll at which Ctrl-C comes. `patience`: for
    ahead.PATIENCE, none, since only what polls lets the device go on.
    """

    name = "a fake GPU"

    def __init__(
        self,
        seed: int = 0,
        eagerness: float = 0.0,
        memory_total: int = MEMORY,
        has_wait_value: bool = True,
    ) -> None:
        self.simulator = simulator()
        self.memory_total, self.has_wait_value = memory_total, has_wait_value
        self.eagerness = eagerness
        self.capturing: FakeGraph | None = None
        self.lost = ""  # why every call fails
        self.live = self.peak = self.n_run = self.n_polls = 0
        self.hangs_after = self.fails_after = float("inf")
        self.interrupt_at = -1
        self.patience = 0
        self._random = np.random.default_rng(seed)
        self._queue: list[Node] = []
        self._memory: dict[int, np.ndarray] = {}
        self._pinned: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    # -- memory -----------------------------------------------------------------------------------

    def memory_free(self) -> int:
        self.check()
        return self.memory_total - self.live

    def allocate(self, nbytes: int) -> int:
        assert self.capturing is None and nbytes > 0
        if nbytes > self.memory_free():
            raise DeviceError(f"{self.name} has no room for {nbytes} bytes")
        memory = _aligned(nbytes)
        memory[:] = 0xFF  # NaN, and the worst of indices
        self._memory[memory.ctypes.data] = memory
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        return memory.ctypes.data

    def free(self, address: int) -> None:
        self.check()
        self.live -= len(self._memory.pop(address))

    def pinned(self, nbytes: int) -> tuple[np.ndarray, int]:
        self.check()
        memory = _aligned(nbytes)
        memory[:] = 0
        # Views keep their base alive, not each other.
        base = memory.base
        assert isinstance(base, np.ndarray)
        self._pinned[base.ctypes.data] = base
        return memory, memory.ctypes.data

    def locate(self, address: int, nbytes: int) -> np.ndarray:
        """Return the memory at an address; it must be of this device, or pinned, and still be."""
        for begin, memory in (*self._memory.items(), *self._pinned.items()):
            if begin <= address and address + nbytes <= begin + len(memory):
                return memory[address - begin : address - begin + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are nobody's")

    # -- running ----------------------------------------------------------------------------------

    def stream(self) -> FakeStream:
        self.check()
        return FakeStream(self)

    def check(self) -> None:
        """Raise what the device died of."""
        if self.lost:
            raise DeviceError(self.lost)

    def queue(self, node: Node) -> Node:
        """Take a node, and perhaps run some, of whatever stream."""
        self.check()
        self._queue.append(node)
        while self._random.random() < self.eagerness and self._run_one():
            pass
        return node

    def poll(self) -> None:
        """Run a node if any may run: whoever waits, waits long."""
        assert self.capturing is None, "nothing is asked for while capturing"
        self.check()
        self.n_polls += 1
        if self.n_polls == self.interrupt_at:
            raise KeyboardInterrupt
        self._run_one()

    def _run_one(self) -> bool:
        if self.n_run >= self.fails_after:
            self.lost = f"a kernel failed on {self.name}"
            self.check()
        if self.n_run >= self.hangs_after:
            return False
        ready = [
            i
            for i, node in enumerate(self._queue)
            if all(need.has_run for need in node.needs) and node.may_run()
        ]
        if not ready:
            return False
        node = self._queue.pop(ready[self._random.integers(len(ready))])
        try:
            node.run()
        finally:
            node.has_run, node.needs = True, []
            self.n_run += 1
        return True

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        try:
            wait_until(lambda: not self._run_one() and not self._queue, CLOSING_S, self.name)
        except DeviceError as error:
            self.lost = self.lost or str(error)
            return
        for address in list(self._memory):
            self.free(address)


def _aligned(nbytes: int) -> np.ndarray:
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]
