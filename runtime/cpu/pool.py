"""A pool of threads that run jobs inside nogil code, without a lock on the way.

A job is divided into phases, a phase into tasks. Every thread takes tasks of a phase from an
atomic counter until there are none, then waits until all of them are finished, then goes on to
the next phase. No thread waits for another to *arrive*: the calling thread can do a whole job
alone, so a worker that the system has put aside costs no more than the task it holds.

Counters carry the job's epoch in their upper half. A worker that comes late, when the job it was
called for is over, sees another epoch and leaves without having touched anything. So a job may
read what changes between jobs (how many tasks there are), but write only inside its tasks.

Control block, in 64-byte lines: [epoch] [job address, args address, last epoch]
[epoch << 32 | next task, for each phase] [epoch << 32 | finished tasks, for each phase].
All phases have their counters in the same two lines: one is at work at a time, and a line that
others have written takes as long to get as a row of weights to read.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np

from ..errors import RequestError
from ..locks import Lock
from .jit import inline, nogil
from .simd import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_job,
    compare_and_swap,
    load_i64,
    pause,
    yield_core,
)

PHASES = 6  # at most 8: their counters fit in a line
_LINE = 64
_NEXT, _FINISHED = 2 * _LINE, 3 * _LINE
_BUSY = -1  # the epoch while a job is being published
_EPOCHS = (1 << 31) - 1
_SPINS = 1000  # pauses (some 40 us) before the core is offered to others
_IDLE_YIELDS = 1000  # offers of 64 pauses each (some ms in all) before a worker goes to sleep


@inline
def take(control, phase, epoch, n_tasks):
    """Return the next task of a phase, or -1 when there is none left (or the job is over)."""
    counter = control + _NEXT + 8 * phase
    while True:
        seen = atomic_load(counter)
        if seen >> 32 != epoch:
            return -1
        task = seen & 0xFFFFFFFF
        if task >= n_tasks:
            return -1
        if compare_and_swap(counter, seen, seen + 1):
            return task


@inline
def finish(control, phase):
    """Say that a task taken from this phase is done; return how many were before."""
    return atomic_add(control + _FINISHED + 8 * phase, 1) & 0xFFFFFFFF


@inline
def wait(control, phase, epoch, n_tasks):
    """Wait until all tasks of a phase are done; False when the job is over already."""
    counter = control + _FINISHED + 8 * phase
    spins = 0
    while True:
        seen = atomic_load(counter)
        if seen >> 32 != epoch:
            return False
        if seen & 0xFFFFFFFF >= n_tasks:
            return True
        spins += 1
        pause()
        if spins > _SPINS:
            yield_core()


@inline
def _set_counters(control, epoch):
    for phase in range(PHASES):
        atomic_store(control + _NEXT + 8 * phase, epoch << 32)
        atomic_store(control + _FINISHED + 8 * phase, epoch << 32)


@inline
def _publish(control, function, args):
    """Publish a job, work on it as thread 0, and return when it is done."""
    epoch = (load_i64(control + _LINE + 16) + 1) & _EPOCHS
    atomic_store(control, _BUSY)
    atomic_store(control + _LINE, function)
    atomic_store(control + _LINE + 8, args)
    atomic_store(control + _LINE + 16, epoch)
    _set_counters(control, epoch)
    atomic_store(control, epoch)
    if function != 0:
        call_job(function, args, control, epoch, 0)
    # Close the counters before the caller changes what the job read: a worker that starts on it
    # only now must not find more tasks than there were.
    _set_counters(control, (epoch + 1) & _EPOCHS)


@nogil("int64(intp, intp, int64, intp)")
def _run(control, program, n, stop):
    """Run n jobs, one after the other; `program`: the addresses of each and of its block.

    Returns n, or the number of the job that has set the word at address `stop` (0: there is none).
    """
    for i in range(n):
        _publish(control, load_i64(program + 16 * i), load_i64(program + 16 * i + 8))
        if stop != 0 and atomic_load(stop) != 0:
            return i
    return n


@nogil("int64(intp, intp, intp)")
def _work(control, thread, last):
    """Work on jobs until there has been none for a few milliseconds.

    Returns the last epoch seen, or -1 when the pool closes.
    """
    idle = 0
    while True:
        epoch = atomic_load(control)
        if epoch != last and epoch != _BUSY:
            function = atomic_load(control + _LINE)
            args = atomic_load(control + _LINE + 8)
            if atomic_load(control) == epoch:  # else another job is being published
                if function == 0:
                    return -1
                call_job(function, args, control, epoch, thread)
                last = epoch
            idle = 0
            continue
        idle += 1
        pause()
        if idle & 63 == 0:
            yield_core()
        if idle > 64 * _IDLE_YIELDS:
            return last


class _Shared:
    """What the worker threads hold on to; never the Pool, so that it can be collected."""

    def __init__(self) -> None:
        memory = np.zeros(_FINISHED + 2 * _LINE, np.uint8)
        self.memory = memory
        self.control = -(-memory.ctypes.data // _LINE) * _LINE
        self.condition = threading.Condition()
        self.asleep = 0
        self.wakes = 0


def _worker(shared: _Shared, thread: int) -> None:
    last = 0
    while True:
        last = _work(shared.control, thread, last)
        if last < 0:
            return
        with shared.condition:
            shared.asleep += 1
            wakes = shared.wakes
            while shared.wakes == wakes and load_epoch(shared.control) == last:
                # The time limit only guards against a wake-up lost to a signal.
                shared.condition.wait(1.0)
            shared.asleep -= 1


@nogil("int64(intp)")
def load_epoch(control):
    """Return the epoch published last."""
    return atomic_load(control)


def _wake(shared: _Shared) -> None:
    with shared.condition:
        shared.wakes += 1
        shared.condition.notify_all()


Call = tuple[int, int]  # the addresses of a Kernel and of its argument block
Program = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def program(jobs: Sequence[Call]) -> Program:
    """Return jobs for Pool.run."""
    return np.array(jobs, np.int64)


def _stop(shared: _Shared, threads: list[threading.Thread]) -> None:
    end = program([(0, 0)])
    _run(shared.control, end.ctypes.data, 1, 0)
    _wake(shared)
    for thread in threads:
        thread.join(5.0)


class Pool:
    """`n_threads` threads, of which the caller of `run` is one."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._lock = Lock()
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._shared = _Shared()
        threads = [
            threading.Thread(
                target=_worker, args=(self._shared, i), name=f"powerinfer-{i}", daemon=True
            )
            for i in range(1, self.n_threads)
        ]
        started: list[threading.Thread] = []
        self._stopper = weakref.finalize(self, _stop, self._shared, started)
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
        except RuntimeError:
            self._stopper()
            raise RequestError(f"the system does not allow {self.n_threads} threads") from None

    def run(self, jobs: Program, stop: int = 0) -> int:
        """Run some jobs, one after the other, each on all threads; return how many are done.

        `stop`: the address of a word, by setting which a job ends this and says it is not done.
        """
        with self._lock:
            if not self._stopper.alive:
                raise RequestError("the engine is closed")
            if os.getpid() != self._pid:  # after a fork only the calling thread is left
                self._stopper.detach()
                self._start()
            if self._shared.asleep:
                _wake(self._shared)
            return _run(self._shared.control, jobs.ctypes.data, len(jobs), stop)

    def close(self) -> None:
        """End the threads, after the job that may be running; `run` raises RequestError then."""
        with self._lock:
            self._stopper()
