"""Measuring speed: prompts, decoding and batches, against what memory allows and other programs.

What is written does not matter here: tokens are fixed random ones, as in llama-bench, so that
every run does the same work and greedy repetition makes nothing look fast.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.cache import Sequence as TextSequence
from ..runtime.config import RunOptions
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.traffic import Traffic, traffic
from ..runtime.weights import Model

WARM_UP = 4  # tokens before the clock starts
SLOWER = 0.8  # of the bandwidth: what is said about the memory that a file lies in
RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:tokens per second|tok/s|t/s)")


@dataclass(frozen=True)
class Test:
    """One line of the table: `n_prompt` tokens read at once, or `n_decode` written one by one."""

    threads: int
    n_prompt: int = 0
    n_decode: int = 0
    batch: int = 1  # texts written side by side
    depth: int = 0  # tokens that each text has before

    @property
    def name(self) -> str:
        name = f"prompt {self.n_prompt}" if self.n_prompt else f"decode {self.n_decode}"
        return f"{name} at {self.depth}" if self.depth else name

    @property
    def length(self) -> int:
        """How many tokens a text has in the end."""
        return self.depth + (self.n_prompt or WARM_UP + self.n_decode)

    @property
    def mean_length(self) -> float:
        """How many tokens a text has while it is written, the one that is being run included."""
        return self.length - (self.n_decode - 1) / 2


@dataclass(frozen=True)
class Result:
    """What a test came to; rates in tokens per second, traffic in bytes per token."""

    test: Test
    rates: list[float]  # of every round
    traffic: Traffic | None  # of decoding
    computed: float  # share of the neurons
    bandwidth: float  # bytes per second that the CPU reads, in the same run
    file_bandwidth: float  # the same of the model's own bytes, where they lie; 0: too few to tell
    placed: float | None = None  # the bound of what lives where, with a GPU

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def bound(self) -> float | None:
        """Tokens per second if weights and cache were read, once for one text, and no more done."""
        if self.traffic is None or self.test.batch > 1:
            return None
        return self.placed or self.bandwidth / self.traffic.total


class Bench:
    """A model opened once per number of threads, measured round by round."""

    def __init__(
        self,
        model: Model,
        options: RunOptions,
        tests: Sequence[Test],
        notify: Callable[[str], Any] = lambda _: None,
    ) -> None:
        self._tests = tests
        self._engines: dict[int, Engine] = {}
        self._rates: dict[Test, list[float]] = {test: [] for test in tests}
        self._counts: dict[Test, np.ndarray] = {}
        self._bandwidth: dict[int, list[tuple[float, float]]] = {}  # of memory, of the file
        batch = max(test.batch for test in tests)
        longest = max(test.length for test in tests)
        for threads in sorted({test.threads for test in tests}):
            own = dataclasses.replace(
                options, threads=threads, sequences=batch, context=longest, adapt=False
            )
            self._engines[threads] = Engine(model, own, notify)
            self._bandwidth[threads] = []
        # Behind the engines, which choose the instructions of all kernels.
        from ..runtime.cpu.bandwidth import Reader

        self._reader, self._file_reader = Reader(), Reader(model.file.data)
        draws = np.random.default_rng(22).integers(0, model.config.n_vocab, (batch, longest))
        self._ids: list[list[int]] = draws.tolist()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.close()

    def round(self, progress: Callable[[str], Any] = lambda _: None) -> None:
        """Run every test once, and read memory beside it."""
        for threads, rates in self._bandwidth.items():
            rates.append((self._reader.measure(threads), self._file_reader.measure(threads)))
        for test in self._tests:
            progress(f"{test.name}, {test.threads} threads")
            seconds, counts = self._run(test)
            n = test.n_prompt or test.n_decode * test.batch
            self._rates[test].append(n / seconds)
            self._counts[test] = counts

    def _run(self, test: Test) -> tuple[float, np.ndarray]:
        """Return the seconds of a test and what its FFNs computed."""
        engine = self._engines[test.threads]
        sequences = [TextSequence() for _ in range(test.batch)]
        counts = engine.no_counts()
        wanted = list(range(test.batch))
        try:
            for sequence, ids in zip(sequences, self._ids, strict=False):
                self._read(engine, sequence, ids[: test.depth], engine.no_counts())
            if test.n_prompt:
                ids = self._ids[0][test.depth : test.length]
                started = time.perf_counter()
                self._read(engine, sequences[0], ids, counts)
                return time.perf_counter() - started, counts
            started = 0.0
            for step in range(test.depth, test.length):
                if step == test.depth + WARM_UP:
                    counts[:] = 0
                    started = time.perf_counter()
                tokens = [self._ids[i][step : step + 1] for i in range(test.batch)]
                engine.feed(list(zip(sequences, tokens, strict=True)), wanted, counts)
            return time.perf_counter() - started, counts
        finally:
            for sequence in sequences:
                engine.release(sequence)

    @staticmethod
    def _read(
        engine: Engine, sequence: TextSequence, ids: Sequence[int], counts: np.ndarray
    ) -> None:
        """Feed tokens to a text by chunks, asking for the last one's logits."""
        chunk = engine.chunk
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            engine.feed([(sequence, part)], [len(part) - 1] * (at + chunk >= len(ids)), counts)

    def _traffic(self, test: Test) -> Traffic | None:
        """What a token of a decoding test read: of weights, and of its text's cache."""
        if not test.n_decode:
            return None
        engine, mean = self._engines[test.threads], test.mean_length
        weights = traffic(engine.weights, engine.mode, self._counts[test])
        return dataclasses.replace(weights, cache=engine.cache_bytes(mean))

    def results(self) -> list[Result]:
        out = []
        for test in self._tests:
            engine, counts = self._engines[test.threads], self._counts[test]
            tokens, rows = counts[:, 0].sum(), counts[:, 1].sum()
            bandwidth, file_bandwidth = map(max, zip(*self._bandwidth[test.threads], strict=True))
            out.append(
                Result(
                    test=test,
                    rates=self._rates[test],
                    traffic=self._traffic(test),
                    computed=float(rows / max(tokens, 1) / engine.config.n_ff),
                    bandwidth=bandwidth,
                    file_bandwidth=file_bandwidth,
                    placed=engine.bound_of(1, test.mean_length)
                    if engine.backend == "cuda"
                    else None,
                )
            )
        return out


def other_rate(command: Sequence[str], pattern: re.Pattern[str] = RATE) -> float:
    """Run another program and return the last rate in its output, in tokens per second.

    pattern: finds rates, by its one group or as a whole. RequestError if the program fails or says
    no rate.
    """
    name = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise RequestError(f"{name}: {error.strerror}") from None
    if done.returncode != 0:
        raise RequestError(f"{name} ended with code {done.returncode}")
    found = pattern.findall(done.stdout + done.stderr)
    if not found:
        raise RequestError(f"{name} printed nothing like '12.3 tokens per second'")
    try:
        return float(found[-1])
    except ValueError:
        raise RequestError(f"{found[-1]!r}, which {name} printed, is no rate") from None


def as_json(results: Sequence[Result], others: Sequence[float]) -> dict[str, Any]:
    """Return all figures, ready for JSON."""
    rows = []
    for r in results:
        rows.append(
            {
                **dataclasses.asdict(r.test),
                "tokens_per_second": r.rate,
                "rounds": r.rates,
                "bytes_per_token": None if r.traffic is None else dataclasses.asdict(r.traffic),
                "neurons_computed": r.computed,
                "bandwidth": r.bandwidth,
                "file_bandwidth": r.file_bandwidth,
                "bound": r.bound,
            }
        )
    return {"results": rows, "other_tokens_per_second": list(others)}


def as_table(results: Sequence[Result]) -> str:
    """Return a Markdown table."""
    lines = [
        "| test | threads | batch | t/s | spread | MB/token | neurons | GB/s | bound t/s | of it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        spread = f"{min(r.rates):.1f}-{max(r.rates):.1f}"
        cells = [r.test.name, str(r.test.threads), str(r.test.batch), f"{r.rate:.1f}", spread]
        if r.traffic is None:
            cells += ["", f"{r.computed:.1%}", f"{r.bandwidth / 1e9:.1f}", "", ""]
        else:
            cells += [
                f"{r.traffic.total / 1e6:.1f}",
                f"{r.computed:.1%}",
                f"{r.bandwidth / 1e9:.1f}",
                "" if r.bound is None else f"{r.bound:.1f}",
                "" if r.bound is None else f"{r.rate / r.bound:.0%}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(traffic: Traffic) -> str:
    """Return what a token reads, by part."""
    parts = ("attention", "predictor", "decider", "up", "down", "head", "cache")
    values = ", ".join(f"{part} {getattr(traffic, part) / 1e6:.1f}" for part in parts)
    return f"MB a token by part: {values}"


def file_line(results: Sequence[Result]) -> str:
    """Return how fast the model's own bytes are read, "" if that is no less than other memory.

    Files that were written in small pieces lie in small pages, here and there, until they are read
    from the disk again; their bound is lower than that of the table.
    """
    slow = {
        r.test.threads: r.file_bandwidth
        for r in results
        if 0 < r.file_bandwidth < SLOWER * r.bandwidth
    }
    if not slow:
        return ""
    rates = ", ".join(f"{rate / 1e9:.1f} GB/s ({n} threads)" for n, rate in slow.items())
    return f"the file lies in slower memory than its bound is made of: {rates}; try --no-mmap"
