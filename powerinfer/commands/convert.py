"""Convert a checkpoint of a ReLU model, with its predictors, to a GGUF file.

MODEL_DIR is a Hugging Face checkpoint; or a file of the original PowerInfer, which becomes one of
ours, with its hot neurons first where activation/ or a .generated.gpuidx lies beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ..convert.converter import plan_conversion, write_conversion
from ..convert.pwri import PwriPolicy
from ..quantize.policy import TARGETS, Policy, parse_type
from ..runtime.config import DENSE_ACTIVATIONS, SPARSE_ACTIVATIONS, model_config
from ..runtime.gguf import GGUFFile
from .arguments import beside, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    types = ", ".join(TARGETS)
    parser.add_argument(
        "model_dir", type=Path, metavar="MODEL_DIR", help="the checkpoint, or a PWRI file"
    )
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
    if args.model_dir.is_file():
        if args.predictor_dir or args.dense or args.pwri or args.activation or args.outtype:
            parser.error("a file is rewritten as it is: only --outfile goes with it; see quantize")
        return _upgrade(args.model_dir, args.outfile)
    outtype = args.outtype or "f16"
    type_ = parse_type(outtype)
    policy = PwriPolicy(type_) if args.pwri else Policy(type_)
    conversion = plan_conversion(
        args.model_dir, args.predictor_dir, policy, args.dense, args.activation, args.pwri
    )
    for warning in conversion.warnings:
        say(f"warning: {warning}")
    name = args.model_dir.resolve().name
    kind = "" if args.dense else ".powerinfer"
    target = args.outfile or args.model_dir / f"{name}.{outtype}{kind}.gguf"
    with tqdm(
        total=conversion.n_weights, unit=" weights", unit_scale=True, desc="converting"
    ) as bar:
        write_conversion(conversion, target, bar.update)
    say(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MiB)")
    return 0


def _upgrade(source: Path, target: Path | None) -> int:
    """Rewrite a model file as one of ours, hot-first if somebody counted who fires."""
    from ..predictors.legacy import find_firing
    from ..predictors.order import Changes, in_order_of
    from .rewriting import rewrite_shown

    file = GGUFFile(source)
    config = model_config(file)
    firing = find_firing(source, config.n_layer, config.n_ff)
    target = target or beside(source, "upgraded")
    if firing is None:
        say("no activation/ and no .generated.gpuidx beside it: the order stays")
    else:
        say(f"firing order from {firing.source}")
        firing = in_order_of(file, firing)
    rewrite_shown(source, target, Changes(firing))
    return 0
