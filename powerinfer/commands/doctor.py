"""Say what this machine can do, and what is wrong: CPU, memory, kernels, extras."""

from __future__ import annotations

import argparse
import json

from ..tools.doctor import as_json, as_text, examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--quick", action="store_true", help="do not measure memory")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    found = examine(bandwidth=not args.quick)
    print(json.dumps(as_json(found), indent=2) if args.json else as_text(found))
    return 0
