"""The thread pool: every task once, whatever the threads do; sleep, wake, fork, exit."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from powerinfer.runtime.cpu.block import build, layout
from powerinfer.runtime.cpu.isa import physical_cores
from powerinfer.runtime.cpu.jit import arg, job
from powerinfer.runtime.cpu.pool import Pool, finish, program, take, wait
from powerinfer.runtime.cpu.simd import atomic_add, load_i64
from powerinfer.runtime.errors import RequestError

COUNT = layout("n hits total")


@job
def count(args, control, epoch, thread):
    """Phase 0: hits[i] += 1; phase 1, after all of it: total += hits[i]."""
    n = load_i64(arg(args, COUNT.n))
    while True:
        i = take(control, 0, epoch, n)
        if i < 0:
            break
        atomic_add(arg(args, COUNT.hits) + 8 * i, 1)
        finish(control, 0)
    if not wait(control, 0, epoch, n):
        return
    while True:
        i = take(control, 1, epoch, n)
        if i < 0:
            break
        atomic_add(arg(args, COUNT.total), load_i64(arg(args, COUNT.hits) + 8 * i))
        finish(control, 1)
    wait(control, 1, epoch, n)


class Counter:
    def __init__(self, size=256):
        self.n, self.total = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.hits = np.zeros(size, np.int64)
        self.block = build(COUNT, n=self.n, hits=self.hits, total=self.total)

    def run(self, pool, n, times=1):
        self.n[0] = n
        pool.run(program([(count.address, self.block.ctypes.data)] * times))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_task_once(threads):
    """Many short jobs whose size changes between them: late workers must not find old tasks."""
    pool, counter = Pool(threads), Counter()
    expected, total = np.zeros(256, np.int64), 0
    rng = np.random.default_rng(6)
    for n in rng.integers(0, 257, 5000).tolist():
        counter.run(pool, n)
        expected[:n] += 1
        total += int(expected[:n].sum())
    assert np.array_equal(counter.hits, expected)
    assert counter.total[0] == total
    pool.close()


def test_workers_sleep_and_wake():
    pool, counter = Pool(3), Counter()
    counter.run(pool, 256)
    deadline = time.monotonic() + 10
    while pool._shared.asleep < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool._shared.asleep == 2
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # nobody spins
    counter.run(pool, 256)
    assert counter.hits.tolist() == [2] * 256
    pool.close()


def test_a_closed_pool_refuses():
    pool, counter = Pool(3), Counter()
    counter.run(pool, 10)
    pool.close()
    pool.close()
    with pytest.raises(RequestError, match="closed"):
        counter.run(pool, 10)
    assert counter.hits[:10].tolist() == [1] * 10


def test_closing_waits_for_the_job_that_runs():
    """Threads that call run() and close() at once: no job is cut short, no worker stays."""
    before = set(threading.enumerate())
    for _ in range(20):
        pool, counter = Pool(3), Counter()
        runs = []

        def work(pool=pool, counter=counter, runs=runs):
            with contextlib.suppress(RequestError):
                while True:
                    counter.run(pool, 256)
                    runs.append(1)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.002)
        pool.close()
        thread.join(10)
        assert not thread.is_alive()
        assert counter.hits.tolist() == [len(runs)] * 256
    assert set(threading.enumerate()) <= before


def test_threads_that_cannot_be_started(monkeypatch):
    started = []

    def start(thread, original=threading.Thread.start):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RequestError, match="does not allow 8 threads"):
        Pool(8)
    assert not any(thread.is_alive() for thread in started)


def test_jobs_of_a_program_follow_each_other():
    pool, counter = Pool(3), Counter()
    counter.run(pool, 100, times=50)
    assert counter.hits[:100].tolist() == [50] * 100
    assert counter.total[0] == 100 * sum(range(1, 51))  # each run adds up what it has made so far
    pool.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_fork():
    pool, counter = Pool(2), Counter()
    counter.run(pool, 100)
    child = os.fork()
    if child == 0:
        counter.run(pool, 100)
        os._exit(0 if counter.hits[:100].tolist() == [2] * 100 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    counter.run(pool, 100)
    assert counter.hits[:100].tolist() == [2] * 100
    pool.close()


def test_interpreter_exit_does_not_hang(demo_gguf):
    script = (
        "import sys, powerinfer\n"
        "llm = powerinfer.open(sys.argv[1], threads=3)\n"
        "pieces = llm.generate('And', max_tokens=5)\n"
        "print(next(pieces) != '')\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(demo_gguf("q4_0"))],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (out.returncode, out.stdout.strip(), out.stderr) == (0, "True", "")


def test_physical_cores():
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
