"""Show what is in a GGUF or PWRI file: keys, tensors, types, sizes, sparsity data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runtime.gguf import GGUFFile
from ..tools.inspect import describe, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    description = describe(GGUFFile(args.file))
    print(json.dumps(description, indent=2, allow_nan=False) if args.json else render(description))
    return 0
