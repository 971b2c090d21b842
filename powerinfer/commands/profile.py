"""Count which neurons fire on a text, and write the model again with the hot ones first.

The order changes no result beyond rounding; --undo brings every tensor back as it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ..predictors.legacy import export_activations, read_activations
from ..predictors.order import Changes, in_order_of
from ..predictors.profile import Firing, carrying_share, profile
from ..predictors.text import read_text, windows
from ..runtime.config import RunOptions
from ..runtime.engine import Engine
from ..runtime.gguf import GGUFFile
from ..runtime.gguf_writer import check_target, not_onto
from ..runtime.weights import load_model
from .arguments import at_least, beside, say
from .rewriting import rewrite_shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("-f", "--file", type=Path, help="the text to run")
    add("-n", "--tokens", type=at_least(3), default=32768, help="of the text (default: 32768)")
    add("-c", "--ctx-size", type=at_least(3), help="tokens at a time (default: at most 512)")
    add("-t", "--threads", type=at_least(1), help="default: physical cores")
    add("-o", "--outfile", type=Path, help="default: MODEL.hot.gguf")
    add("--activations", type=Path, metavar="DIR", help="activation_0.pt, ... in place of a text")
    add("--export", type=Path, metavar="DIR", help="also write the counts as activation_0.pt, ...")
    add("--undo", action="store_true", help="back to the order before profiling")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    sources = [args.file is not None, args.activations is not None, args.undo]
    if sum(sources) != 1:
        parser.error("one of -f FILE, --activations DIR and --undo is needed")
    if args.undo and args.export:
        parser.error("--undo counts nothing that could be exported")
    target = args.outfile or beside(args.model, "original" if args.undo else "hot")
    not_onto(args.model, target)
    check_target(target)
    if args.undo:
        firing = None
        changes = Changes(undo_order=True)
    else:
        firing = _count(args) if args.file else _imported(args)
        changes = Changes(firing)
        if args.export:
            export_activations(args.export, firing, GGUFFile(args.model))
            say(f"wrote {args.export}/activation_0.pt ...")
    if firing is not None and firing.frequencies is not None:
        say(_summary(firing))
    rewrite_shown(args.model, target, changes)
    return 0


def _imported(args: argparse.Namespace) -> Firing:
    model = load_model(args.model)
    counts = read_activations(args.activations, model.config.n_layer, model.config.n_ff)
    return in_order_of(model.file, counts)


def _count(args: argparse.Namespace) -> Firing:
    options = RunOptions(mode="exact", threads=args.threads, context=args.ctx_size)
    text = read_text(args.file)
    with Engine(args.model, options, notify=say) as engine:
        length = args.ctx_size or min(engine.context, 512)
        texts = windows(engine, text, length, args.tokens)
        with tqdm(total=sum(map(len, texts)), unit=" tokens", desc="profiling") as bar:
            return profile(engine, texts, str(args.file), bar.update)


def _summary(firing: Firing) -> str:
    """Return a line for each layer: how many fire, how few of them do most of it."""
    assert firing.frequencies is not None
    lines = ["layer  fire    neurons that carry 80 %"]
    for il, frequency in enumerate(firing.frequencies):
        carry = carrying_share(frequency)
        lines.append(f"{il:5}  {frequency.mean():6.1%}  {carry:6.1%}")
    return "\n".join(lines)
