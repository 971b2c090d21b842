"""What is done for a token, in order: work queued on the device, and the host's in between.

A tape is played as it is made, or, while capturing, kept: the device's work as graphs, cut where
the host has something to do. So the operators are written once, for both. In this way the host
waits for the device between graphs; ahead.py has another, for devices that can wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..cpu.block import Block
from ..cpu.pool import Call, Pool, program
from .device import Event, Graph, Stream, wait_until


class Tape:
    """The queue of a stream, marks in it that the host waits for, and what `pool` does then."""

    def __init__(self, stream: Stream, pool: Pool) -> None:
        self.stream, self.pool = stream, pool
        self._marks: dict[str, Event] = {}
        self._steps: list[Callable[[], Any]] | None = None  # while capturing
        self._open = ExitStack()  # the graph that is being captured
        self._graph: Graph | None = None

    def launch(self, kernel: str, grid: tuple[int, ...], block: int, args: np.ndarray) -> None:
        """Queue a kernel."""
        self._go_on()
        self.stream.launch(kernel, grid, block, args)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """Queue a copy."""
        self._go_on()
        self.stream.copy(dst, src, nbytes)

    def memset(self, dst: int, byte: int, nbytes: int) -> None:
        """Queue setting bytes."""
        self._go_on()
        self.stream.memset(dst, byte, nbytes)

    def begin(self) -> None:
        """Begin a token, or several: all that has been queued before is done."""

    def mark(self, name: str) -> None:
        """Remember this point of the queue under a name."""

        def record() -> None:
            self._marks[name] = self.stream.record()

        self.host(record)

    def mark_early(self, name: str) -> None:
        """Remember a point that only a job waits for: see exchange()."""

    def wait(self, name: str) -> None:
        """Let the host wait until the device has come to a mark. DeviceError if it does not."""
        self.host(lambda: wait_until(self._marks[name].is_done))

    def host(self, work: Callable[[], Any]) -> None:
        """Do something on the host when all before it has been queued."""
        if self._steps is None:
            work()
        else:
            self._step(work)

    def jobs(self, calls: Sequence[Call]) -> None:
        """Let the CPU do jobs when it has waited for what they need."""
        jobs = program(calls)
        self.host(lambda: self.pool.run(jobs))

    def exchange(self, name: str, early: str) -> Block | None:
        """Return what a job has to wait for and to answer; None where the host waits for a mark.

        `early`: the early mark at which the job's input is there, `name`: that at which all is.
        """
        self.wait(name)
        return None

    def resume(self, name: str) -> None:
        """Let what is queued from here on find the job done that had a mark's exchange."""

    def capture(self, run: Callable[[], Any]) -> Callable[[], None]:
        """Return what repeats the device's and the host's work that `run` asks for."""
        steps: list[Callable[[], Any]] = []
        self._steps = steps
        try:
            run()
            self._cut()
        finally:
            self._open.close()
            self._graph, self._steps = None, None

        def play() -> None:
            for step in steps:
                step()

        return play

    def _go_on(self) -> None:
        """Capture what follows, if we are capturing."""
        if self._steps is not None and self._graph is None:
            self._graph = self._open.enter_context(self.stream.capture())

    def _step(self, work: Callable[[], Any]) -> None:
        """Keep something to do between graphs."""
        assert self._steps is not None
        self._cut()
        self._steps.append(work)

    def _cut(self) -> None:
        """End the graph that is being captured, if there is one."""
        graph, self._graph = self._graph, None
        if graph is not None:
            assert self._steps is not None
            self._open.close()
            self._steps.append(lambda: graph.launch(self.stream))
