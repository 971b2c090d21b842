"""Decoding without the host in between: a token is one graph, and device and CPU wait for each
other.

Where the CPU has a part of the work there is an exchange of two words in pinned memory. The device
writes a flag when what the part needs is there, or some of it, and waits for an answer before what
uses it. The CPU's parts are one program of the pool, whose jobs poll the flag and answer.

The words are numbers that grow from mark to mark, so that none is ever reset. Nothing
waits for ever: a poll that has waited some milliseconds ends the program, for Python to look after
Ctrl-C, a failed device and the time-out, and to go on from there; and whatever ends a token, the
last of its answers is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..cpu.block import Block, address, build
from ..cpu.exchange import EXCHANGE, await_flag
from ..cpu.jit import load_kernels
from ..cpu.pool import Call, Pool, Program, program
from .device import Device, Stream, wait_until
from .tape import Tape

PATIENCE = 20_000  # looks at a flag before Python may see to things: some 10 ms

_LINE = 64  # bytes


class AheadTape(Tape):
    """A tape whose captures go without the host; `device` must have wait values.

    `notify` is told what takes long.
    """

    def __init__(
        self,
        stream: Stream,
        pool: Pool,
        device: Device,
        notify: Callable[[str], Any] = lambda _: None,
    ) -> None:
        super().__init__(stream, pool)
        self._exclusive = device.exclusive
        load_kernels([await_flag], notify)
        # A line each: one is written while others are polled. The device knows the lower halves.
        words, at = device.pinned(3 * _LINE)
        self._flag, self._answer, self._base = (
            words[i * _LINE :][:8].view(np.int64) for i in range(3)
        )
        self._flag_at, self._answer_at, self._base_at = at, at + _LINE, at + 2 * _LINE
        self._stop = np.zeros(1, np.int64)
        self._last = 0  # number of the last mark there was
        self._coming = 0  # how many the program that is played has
        self._blocks: list[np.ndarray] = []  # that programs point to
        # While capturing: the numbers of marks by name, and of the last one; jobs that are not yet
        # in a step.
        self._numbers: dict[str, int] = {}
        self._n = 0
        self._calls: list[Call] = []

    def begin(self) -> None:
        self._base[0] = self._last
        self._last += self._coming

    def mark(self, name: str) -> None:
        if self._steps is None:
            super().mark(name)
            return
        self._n += 1
        self._numbers[name] = self._n
        self._go_on()
        self.stream.write_value(self._flag_at, self._base_at, self._n)

    def mark_early(self, name: str) -> None:
        if self._steps is not None:
            self.mark(name)

    def wait(self, name: str) -> None:
        if self._steps is None:
            super().wait(name)
        else:
            self._calls.append((await_flag.address, address(self._block(name, name))))

    def exchange(self, name: str, early: str) -> Block | None:
        return super().exchange(name, early) if self._steps is None else self._block(name, early)

    def host(self, work: Callable[[], Any]) -> None:
        if self._steps is not None:
            self._work_so_far()
        super().host(work)

    def jobs(self, calls: Sequence[Call]) -> None:
        if self._steps is None:
            super().jobs(calls)
        else:
            self._calls += calls

    def resume(self, name: str) -> None:
        if self._steps is not None:
            self._go_on()
            self.stream.wait_value(self._answer_at, self._base_at, self._numbers[name])

    def capture(self, run: Callable[[], Any]) -> Callable[[], None]:
        def whole() -> None:
            run()
            self._work_so_far()

        self._n, self._calls = 0, []
        steps, n = super().capture(whole), self._n

        def play() -> None:
            with self._exclusive():
                self._coming = n
                try:
                    steps()
                finally:  # if it has failed, the device must not wait for ever
                    self._answer[0] = self._last
                    self._coming = 0

        return play if n else steps

    def _block(self, name: str, early: str) -> Block:
        """Return the argument block of an exchange."""
        block = build(
            EXCHANGE,
            flag=self._flag,
            answer=self._answer,
            base=self._base,
            early=self._numbers[early],
            number=self._numbers[name],
            patience=PATIENCE,
            stop=self._stop,
        )
        self._blocks.append(block)
        return block

    def _work_so_far(self) -> None:
        """Let the CPU do its part of what has been queued."""
        if self._calls:
            jobs, self._calls = program(self._calls), []
            self._step(lambda: self._work(jobs))

    def _work(self, jobs: Program) -> None:
        """Do the jobs. DeviceError if a flag does not come."""
        done = 0

        def goes_on() -> bool:
            nonlocal done
            self._stop[0] = 0
            n = self.pool.run(jobs[done:], address(self._stop))
            done += n
            if done < len(jobs):  # a flag is late
                self.stream.is_done()  # raises what the device has died of; some send work now
            return n > 0

        while done < len(jobs):
            wait_until(goes_on)
