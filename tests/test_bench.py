"""The benchmark measures what it says; how fast is no test's business."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import kl
from powerinfer.runtime.cache import Sequence
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.cpu.bandwidth import Reader
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import RequestError
from powerinfer.tools import bench
from powerinfer.tools.bench import file_line, other_rate
from powerinfer.tools.demo_model import demo_model
from test_cli import run

import powerinfer

SAYS = f"{sys.executable} -c 'print(\"eval: 12.5 tokens per second\")'"


def test_json(capfd):
    options = ["-p", "16", "-n", "4", "-t", "1,2", "-b", "1,3", "-r", "2", "--json", "--vs", SAYS]
    code, out, _ = run(capfd, "bench", "-m", demo_model(), *options)
    assert code == 0
    report = json.loads(out)
    assert report["other_tokens_per_second"] == [12.5, 12.5]
    rows = report["results"]
    assert [(r["threads"], r["n_prompt"], r["n_decode"], r["batch"]) for r in rows] == [
        *[(1, 16, 0, 1), (2, 16, 0, 1)],
        *[(t, 0, 4, b) for t in (1, 2) for b in (1, 3)],
    ]
    for row in rows:
        assert len(row["rounds"]) == 2 and min(row["rounds"]) > 0
        assert 0.1 < row["neurons_computed"] < 0.5
        assert row["bandwidth"] > 1e8 and row["file_bandwidth"] > 1e8
        assert (row["bytes_per_token"] is None) == (row["n_prompt"] > 0)
        if row["bound"] is not None:
            read = sum(row["bytes_per_token"].values())
            assert row["bound"] == pytest.approx(row["bandwidth"] / read)


def test_table(capfd):
    options = ["-p", "0", "-n", "3", "-r", "1", "--dense"]
    code, out, _ = run(capfd, "bench", "-m", demo_model(), *options)
    assert code == 0
    assert "| decode 3 |" in out and "| 100.0% |" in out and "MB a token by part" in out


def test_depth(capfd):
    """Texts that have tokens before: of them the cache is read, too."""
    options = ["-p", "8", "-n", "4", "-d", "0,700", "-t", "1", "-r", "1", "--json"]
    code, out, _ = run(capfd, "bench", "-m", demo_model(), *options)
    assert code == 0
    rows = json.loads(out)["results"]
    assert [(r["n_prompt"], r["n_decode"], r["depth"]) for r in rows] == [
        (8, 0, 0),
        (8, 0, 700),
        (0, 4, 0),
        (0, 4, 700),
    ]
    with powerinfer.open(demo_model()) as llm:
        c = llm.config
    each = 2 * 2 * c.n_layer * c.n_head_kv * c.head_dim  # f16
    for row in rows[2:]:  # tokens 5 to 8 after those before: 6.5 in the mean, itself included
        assert row["bytes_per_token"]["cache"] == each * (row["depth"] + 6.5)


def test_files_in_slow_memory():
    def results(*file_rates):
        return [
            bench.Result(bench.Test(n, n_decode=1), [1.0], None, 0.1, 30e9, rate)
            for n, rate in enumerate(file_rates, 1)
        ]

    assert file_line(results(0, 25e9)) == ""
    said = file_line(results(20e9, 21.04e9, 29e9))
    assert "20.0 GB/s (1 threads), 21.0 GB/s (2 threads); try --no-mmap" in said


def test_usage(capfd, tmp_path):
    for options in (
        ["-p", "0", "-n", "0"],
        ["-p", "-5"],
        ["-t", "x"],
        ["-r", "0"],
        ["--vs", "'x"],
        ["--vs", " "],
        ["--vs", "x", "--vs-pattern", "("],
        ["--vs", "x", "--vs-pattern", "(.)(.)"],
    ):
        assert run(capfd, "bench", "-m", demo_model(), *options)[0] == 2
    assert run(capfd, "bench", "-m", tmp_path / "none.gguf")[0] == 1


def test_other_programs():
    assert other_rate(shlex.split(SAYS)) == 12.5
    says = [sys.executable, "-c", "print('| tg128 | 7 +- 1 t/s | pp 3.25 t/s')"]
    assert other_rate(says) == 3.25
    for command, message in (
        ([sys.executable, "-c", "print(5)"], "printed nothing like"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "code 3"),
        (["/nowhere/at/all"], "No such file"),
    ):
        with pytest.raises(RequestError, match=message):
            other_rate(command)
    with pytest.raises(RequestError, match=r"'pp 3', which .* printed, is no rate"):
        other_rate(says, re.compile("pp [0-9]"))


def test_reader():
    assert Reader().measure(2, times=1) > 1e8
    for size in (100, 40_000, 20 << 20):  # nothing to read, little, more
        reader = Reader(np.ones(size, np.uint8))
        assert reader.size == {100: 0, 40_000: 32768}.get(size, size)
        assert (reader.measure(2, times=1) > 1e6) == (size > 100)


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_texts_side_by_side(backend):
    """Each sequence of a batch gets the logits that it gets alone.

    On the CPU it gets the same to the bit whatever the others are; alone it takes another path.
    """
    rng = np.random.default_rng(8)
    texts = rng.integers(3, 4096, (3, 12)).tolist()
    with Engine(demo_model(), RunOptions(sequences=3, context=64, backend=backend)) as engine:
        sequences = [Sequence() for _ in texts]
        counts = engine.no_counts()
        engine.feed([(s, t[:5]) for s, t in zip(sequences, texts, strict=True)], [], counts)
        for i in range(5, 12):
            chunks = [(s, [t[i]]) for s, t in zip(sequences, texts, strict=True)]
            together = engine.feed(chunks, [0, 1, 2], counts)
        for sequence in sequences:
            engine.release(sequence)
        mates = [Sequence(), Sequence()]
        engine.feed([(s, texts[i][:5]) for s, i in zip(mates, (0, 2), strict=True)], [], counts)
        for i in range(5, 12):
            chunks = [(s, [texts[k][i]]) for s, k in zip(mates, (0, 2), strict=True)]
            two = engine.feed(chunks, [0, 1], counts)
    with powerinfer.open(demo_model(), context=64, backend=backend) as llm:
        alone = np.array([llm.logits(text)[-1] for text in texts])
    assert kl(alone, together) < 1e-3
    if backend == "cpu":
        assert np.array_equal(two, together[[0, 2]])


BEFORE_AN_ENGINE = """
import sys
import powerinfer.tools.bench as bench
from powerinfer.__main__ import main

def engine(*_):
    sys.exit("powerinfer.runtime.cpu.simd" in sys.modules)

bench.Engine = engine
main(["bench", "-m", sys.argv[1], "--isa", "generic", "-n", "1"])
"""


def test_isa_is_left_to_the_engine():
    """What makes kernels is imported behind it: they are all for one path."""
    command = [sys.executable, "-c", BEFORE_AN_ENGINE, str(demo_model())]
    assert subprocess.run(command, check=False).returncode == 0
