"""Measure speed: prompts, decoding and batches, beside what the memory of this machine allows.

The bound is what decoding could reach if it did nothing but read, once, the weights and the cache
that a token needs, at the bandwidth measured in the same run. Rounds of all tests (and of --vs)
take turns; the table shows medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import statistics
from pathlib import Path

from tqdm import tqdm

from ..runtime.config import RunOptions
from ..runtime.errors import RequestError
from ..runtime.weights import load_model
from ..tools.bench import RATE, Bench, Test, as_json, as_table, file_line, other_rate, parts_table
from .arguments import add_gpu, add_isa, add_memory, add_mode, at_least, mode_of, numbers, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", type=Path, metavar="FILE", required=True)
    add("-p", "--prompt", type=numbers, default=[64, 512], help="prompt lengths (64,512; 0: none)")
    add("-n", "--decode", type=numbers, default=[128], help="tokens to write (128; 0: none)")
    add("-t", "--threads", type=numbers, help="numbers of threads, like 1,2 (physical cores)")
    add("-b", "--batch", type=numbers, default=[1], help="texts side by side, like 1,4,8")
    add("-d", "--depth", type=numbers, default=[0], help="tokens before those, like 0,2000")
    add("-r", "--rounds", type=at_least(1), default=5, help="default: 5")
    add(
        "--vs",
        type=_command,
        metavar="COMMAND",
        help="another program to take turns with; it prints its rate",
    )
    add("--vs-pattern", type=_pattern, default=RATE, metavar="REGEX", help="finds its rate")
    add_mode(parser)
    add_memory(parser)
    add_isa(parser)
    add_gpu(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--md", action="store_true", help="only the table")


def _command(text: str) -> list[str]:
    """Be an argparse type: a program and its arguments, as a shell would take them apart."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("it names no program")
    return words


def _pattern(text: str) -> re.Pattern[str]:
    """Be an argparse type: a regular expression that finds one thing."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    if pattern.groups > 1:
        raise argparse.ArgumentTypeError(f"{text}: more than one group")
    return pattern


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from ..runtime.cpu.isa import physical_cores

    threads = [t for t in args.threads or [physical_cores()] if t]
    tests = [
        Test(t, n_prompt=p, depth=d)
        for t, p, d in itertools.product(threads, args.prompt, args.depth)
        if p
    ]
    tests += [
        Test(t, n_decode=n, batch=b, depth=d)
        for t, n, b, d in itertools.product(threads, args.decode, args.batch, args.depth)
        if n and b
    ]
    if not tests:
        parser.error("nothing to measure: -p, -n, -t and -b leave no test")
    try:
        options = RunOptions(
            mode=mode_of(args),
            isa=args.isa,
            backend=args.backend,
            vram_budget=args.vram_budget,
            gpu=args.gpu,
        )
    except RequestError as error:
        parser.error(str(error))
    model = load_model(args.model, load=args.no_mmap, lock=args.mlock)
    others: list[float] = []
    with Bench(model, options, tests, notify=say) as bench:
        with tqdm(total=args.rounds, unit=" rounds", desc="measuring") as bar:
            for _ in range(args.rounds):
                bench.round(bar.set_postfix_str)
                if args.vs:
                    others.append(other_rate(args.vs, args.vs_pattern))
                bar.update(1)
        results = bench.results()
    if args.json:
        print(json.dumps(as_json(results, others), indent=2))
        return 0
    if not args.md:
        print(f"{model.config.name}: {model.file.tensor_bytes / 2**20:.0f} MiB")
    print(as_table(results))
    decode = next((r.traffic for r in results if r.traffic is not None), None)
    if decode is not None and not args.md:
        print(parts_table(decode))
    if line := file_line(results):
        print(line)
    if others:
        rate = statistics.median(others)
        print(f"{shlex.join(args.vs)}: {rate:.1f} t/s ({min(others):.1f}-{max(others):.1f})")
        for r in results:
            print(f"{r.test.name}, {r.test.threads} threads: {r.rate / rate:.2f} times that")
    return 0
