"""Convert a Hugging Face checkpoint of a ReLU model, with its predictors, to a GGUF file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ..convert.converter import plan_conversion, write_conversion
from ..convert.pwri import PwriPolicy
from ..quantize.policy import TARGETS, Policy, parse_type
from ..runtime.config import DENSE_ACTIVATIONS, SPARSE_ACTIVATIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    types = ", ".join(TARGETS)
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="the checkpoint")
    parser.add_argument(
        "predictor_dir",
        type=Path,
        metavar="PREDICTOR_DIR",
        nargs="?",
        help="model_0.pt, model_1.pt, ... in PowerInfer's layout",
    )
    parser.add_argument(
        "--outfile",
        type=Path,
        help="where to write (default: MODEL_DIR/NAME.f16.powerinfer.gguf)",
    )
    parser.add_argument(
        "--outtype",
        default="f16",
        type=str.lower,
        choices=TARGETS,
        metavar="TYPE",
        help=f"{types} (default: f16)",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="keep the standard ffn_down and run dense; any Llama converts, not only ReLU ones",
    )
    parser.add_argument(
        "--pwri",
        action="store_true",
        help="write a file for the original PowerInfer (f16 or q4_0, neurons in their order)",
    )
    parser.add_argument(
        "--activation",
        choices=SPARSE_ACTIVATIONS + DENSE_ACTIVATIONS,
        help="of the FFN, where config.json does not say it or is wrong",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    type_ = parse_type(args.outtype)
    policy = PwriPolicy(type_) if args.pwri else Policy(type_)
    conversion = plan_conversion(
        args.model_dir, args.predictor_dir, policy, args.dense, args.activation, args.pwri
    )
    for warning in conversion.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    name = args.model_dir.resolve().name
    kind = "" if args.dense else ".powerinfer"
    target = args.outfile or args.model_dir / f"{name}.{args.outtype}{kind}.gguf"
    with tqdm(
        total=conversion.n_weights, unit=" weights", unit_scale=True, desc="converting"
    ) as bar:
        write_conversion(conversion, target, bar.update)
    print(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MiB)", file=sys.stderr)
    return 0
