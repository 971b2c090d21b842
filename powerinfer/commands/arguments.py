"""What the command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ..runtime.config import BackendName, Isa, Mode


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number not below `low`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}")
        return value

    return parse


def say(text: str) -> None:
    """Tell the user something; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def beside(source: Path, word: str) -> Path:
    """Return the default name of an output: model.gguf -> model.WORD.gguf."""
    return source.with_name(f"{source.name.removesuffix('.gguf')}.{word}.gguf")


def add_mode(parser: argparse.ArgumentParser) -> None:
    """Add --exact and --dense."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--exact", action="store_true", help="no predictor: lossless sparsity")
    mode.add_argument("--dense", action="store_true", help="compute everything")


def mode_of(args: argparse.Namespace) -> Mode | None:
    """Return the mode asked for; None: what the model allows."""
    return "exact" if args.exact else "dense" if args.dense else None


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add --no-mmap and --mlock, as llama.cpp has them."""
    parser.add_argument("--no-mmap", action="store_true", help="read the whole file into memory")
    parser.add_argument("--mlock", action="store_true", help="keep the model in memory")


def add_isa(parser: argparse.ArgumentParser) -> None:
    """Add --isa, for trying what other machines would run."""
    parser.add_argument(
        "--isa",
        choices=get_args(Isa),
        default="auto",
        help="instructions of the CPU kernels (default: the best that this CPU has)",
    )


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Add --backend, --vram-budget, --gpu and --no-gpu."""
    add = parser.add_argument
    add("--backend", choices=get_args(BackendName), default="auto", help="numpy: the reference")
    add("--vram-budget", type=float, metavar="GiB", help="GPU memory to use; 0: CPU only")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", type=at_least(0), default=0, metavar="N", help="which GPU")
    which.add_argument("--no-gpu", dest="gpu", action="store_const", const=None, help="CPU only")


def share(text: str) -> float:
    """Parse a share between 0 and 1, as 0.95 or 95%."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def numbers(text: str) -> list[int]:
    """Parse whole numbers from 0 on, as in 1,2,8."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text} has a number below 0")
    return values
