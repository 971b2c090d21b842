"""Draw who fires: a picture of the neurons of every layer, hottest first.

It shows what `powerinfer profile` and `powerinfer train-predictors` have written into the file;
nothing is run. The name of the picture says its type: .png, .svg, .pdf.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runtime.gguf_writer import not_onto
from ..runtime.weights import load_model
from ..tools.heat import read_heat
from .arguments import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("-o", "--outfile", type=Path, help="default: MODEL.heat.png")
    add("--json", action="store_true", help="numbers for programs; a picture only with -o")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    heat = read_heat(load_model(args.model))
    target = args.outfile
    if target is None and not args.json:
        target = args.model.with_name(f"{args.model.name.removesuffix('.gguf')}.heat.png")
    if target is not None:
        from ..tools.plots import plot_heat

        not_onto(args.model, target)
        plot_heat(heat, target)
        say(f"wrote {target}")
    if args.json:
        print(json.dumps(heat.numbers(), indent=2, allow_nan=False))
    return 0
