"""Write a GGUF file again in a smaller type: quantize in.gguf [out.gguf] TYPE [threads]."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from tqdm import tqdm

from ..quantize.encoder import quantize_file
from ..quantize.policy import TARGETS, Policy, parse_type
from ..runtime.gguf import GGUFFile
from .arguments import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    types = ", ".join(TARGETS)
    parser.usage = "%(prog)s [options] in.gguf [out.gguf] TYPE [threads]"
    parser.add_argument("input", type=Path, metavar="in.gguf")
    parser.add_argument(
        "rest",
        nargs="+",
        metavar="[out.gguf] TYPE [threads]",
        help=f"TYPE is one of {types}, in any case",
    )
    parser.add_argument("--output-type", metavar="TYPE", help="type of output and token_embd")
    parser.add_argument("--predictor-type", metavar="TYPE", help="type of the predictors fc1, fc2")
    parser.add_argument(
        "--allow-requantize",
        action="store_true",
        help="quantise tensors that are quantised already, at a loss",
    )


def default_target(source: Path, type_: str) -> Path:
    """Return the name for `source` in another type: x.f16.gguf -> x.q4_0.gguf."""
    parts = source.name.split(".")
    for i, part in enumerate(parts):
        if i and part.lower() in TARGETS:
            return source.with_name(".".join([*parts[:i], type_, *parts[i + 1 :]]))
    return source.with_name(f"{source.name.removesuffix('.gguf')}.{type_}.gguf")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    rest = list(args.rest)
    is_type = [word.lower() in TARGETS for word in rest]
    if True not in is_type[:2]:
        parser.error(f"no TYPE among {' '.join(rest)!r}; choose from {', '.join(TARGETS)}")
    at = is_type.index(True)
    threads = None
    if len(rest) > at + 1:
        if len(rest) > at + 2 or not re.fullmatch("0*[1-9][0-9]{0,2}", rest[at + 1]):
            parser.error(f"the number of threads is {' '.join(rest[at + 1 :])!r}")
        threads = int(rest[at + 1])
    for option in (args.output_type, args.predictor_type):
        if option is not None and option.lower() not in TARGETS:
            parser.error(f"unknown type {option!r}; choose from {', '.join(TARGETS)}")
    policy = Policy(
        parse_type(rest[at]),
        parse_type(args.output_type) if args.output_type else None,
        parse_type(args.predictor_type) if args.predictor_type else None,
    )
    target = Path(rest[0]) if at else default_target(args.input, rest[at].lower())
    total = sum(math.prod(t.shape) for t in GGUFFile(args.input).tensors.values())
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="quantising") as bar:
        quantize_file(args.input, target, policy, threads, args.allow_requantize, bar.update)
    before, after = args.input.stat().st_size, target.stat().st_size
    say(f"wrote {target} ({before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB)")
    return 0
