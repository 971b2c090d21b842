"""Make predictors for a model from a text: small networks that say which neurons will fire.

Each layer's predictor grows until it names few enough neurons at the recall wanted and more of it
would cost more bytes a token than it saves. Stopped half-way, the same command goes on where it
was. Profile the model first: `powerinfer profile`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

from tqdm import tqdm

from ..predictors import refine
from ..predictors.capture import LayerCapture, capture, fingerprint
from ..predictors.factors import Factors
from ..predictors.fit import (
    VALIDATION,
    Candidate,
    Fitted,
    Goals,
    Method,
    assess,
    calibrate,
    choose,
    grow,
    load_candidates,
    predictor_type,
    save_candidates,
)
from ..predictors.frontier import RECALLS, frontier
from ..predictors.legacy import export_predictors
from ..predictors.order import Changes
from ..predictors.predictor import Predictor
from ..predictors.profile import text_record
from ..predictors.text import read_text, windows
from ..quantize.policy import TARGETS
from ..runtime.config import RunOptions
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.gguf_writer import check_target, not_onto, replacing
from ..runtime.weights import Model, load_model
from .arguments import at_least, beside, say, share
from .rewriting import rewrite_shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("-f", "--file", type=Path, help="the text to learn from")
    add("-n", "--tokens", type=at_least(64), default=32768, help="of the text (default: 32768)")
    add("-o", "--outfile", type=Path, help="default: MODEL.predicted.gguf")
    add("-t", "--threads", type=at_least(1), help="default: physical cores")
    goals = Goals()
    add("--recall", type=share, default=goals.recall, help="of firing neurons (default: 0.95)")
    add(
        "--max-share",
        type=float,
        default=goals.max_share,
        help="predicted neurons, in multiples of those that fire (default: 2.5)",
    )
    add("--max-size", type=share, default=goals.max_size, help="of the model (default: 8%%)")
    add("--max-kl", type=float, help="nats a token, against the model without predictors")
    add(
        "--type",
        type=str.lower,
        choices=TARGETS,
        metavar="TYPE",
        help="of the predictors (default: q4_0, or q8_0 for models of 8 bits and more)",
    )
    add(
        "--method",
        choices=["trained", "factors"],
        help="by gradient descent, or in closed form (default: trained, if torch is installed)",
    )
    add("--seed", type=at_least(0), default=0)
    add("--report", type=Path, metavar="FILE.json", help="measure all kinds, bytes against KL")
    add("--plot", type=Path, metavar="FILE.png", help="a picture of the report (extra `plot`)")
    add("--export", type=Path, metavar="DIR", help="write the file's predictors as model_0.pt, ...")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.file is None and args.export is not None:
        export_predictors(args.export, load_model(args.model))
        say(f"wrote {args.export}/model_0.pt ...")
        return 0
    if args.file is None or args.export is not None:
        parser.error("-f FILE makes predictors, --export DIR writes those of the file: one of them")
    if not 1 <= args.max_share < float("inf"):
        parser.error("--max-share is 1 or more")
    if args.max_kl is not None and not args.max_kl > 0:
        parser.error("--max-kl is above 0")
    if args.method == "trained" and not refine.has_torch():
        raise RequestError('training needs torch: pip install "powerinfer-python[train]"')
    method: Method = args.method or ("trained" if refine.has_torch() else "factors")
    if args.method is None and method == "factors":
        say("torch is not installed: predictors in closed form, which are larger or name more")
    if args.plot is not None:
        from ..tools.plots import kind_of, pyplot

        kind_of(pyplot().figure(), args.plot)  # whether it can be, before an hour of training
    target = args.outfile or beside(args.model, "predicted")
    written = [path for path in (target, args.report, args.plot) if path is not None]
    if len({path.resolve() for path in written}) < len(written):
        parser.error("the model, --report and --plot are files of their own")
    for path in written:
        not_onto(args.model, path)
        not_onto(args.file, path)
        check_target(path, is_gguf=path == target)
    _make(args, method, target)
    return 0


def _make(args: argparse.Namespace, method: Method, target: Path) -> None:
    model = load_model(args.model)
    goals = Goals(args.recall, args.max_share, args.max_size, args.max_kl)
    type_ = TARGETS[args.type] if args.type else predictor_type(model)
    options = RunOptions(mode="exact", threads=args.threads)
    text = read_text(args.file)
    work = target.with_name(f"{target.name}.work")
    with Engine(model, options, notify=say) as engine:
        length = min(engine.context, 512)
        texts = windows(engine, text, length, args.tokens)
        if len(texts) < 2:
            raise RequestError(
                f"{args.file} is too short: two windows of {length} tokens are needed"
            )
        work.mkdir(exist_ok=True)
        with tqdm(total=sum(map(len, texts)), unit=" tokens", desc="capturing") as bar:
            data = capture(engine, texts, work, bar.update)
        check = texts[-max(int(len(texts) * VALIDATION), 1) :]
        n_check = sum(map(len, check))
        made_for = {
            "fingerprint": fingerprint(engine, texts),
            "method": method,
            "type": type_.name,
            "goals": [goals.recall, goals.max_share],
            "seed": args.seed,
        }
    layers = []
    with tqdm(total=len(data), unit=" layers", desc=method) as bar:
        for il, (layer, captured) in enumerate(zip(model.weights.layers, data, strict=True)):
            path = work / f"layer_{il}.npz"
            found = load_candidates(path, made_for)
            if found is None:
                found = grow(
                    layer, captured, n_check, type_, goals, method, args.seed, bar.set_postfix_str
                )
                save_candidates(path, found, made_for)
            layers.append(found)
            bar.update(1)
    budget = int(goals.max_size * model.file.tensor_bytes)
    chosen = choose(layers, goals, budget)
    say("calibrating thresholds, measuring")
    fitted = calibrate(model, [c.predictor for c in chosen], type_, goals, options, check)
    if args.report or args.plot:
        _report(args, model, fitted, method, data, options, check)
    say(_summary(fitted, chosen, model, goals))
    keys = {**fitted.keys(), **text_record("powerinfer.calibration.", texts)}
    rewrite_shown(args.model, target, Changes(predictors=fitted.tensors(), keys=keys))
    del data, captured  # open maps cannot be removed everywhere
    shutil.rmtree(work, ignore_errors=True)


def _report(
    args: argparse.Namespace,
    model: Model,
    fitted: Fitted,
    method: Method,
    data: list[LayerCapture],
    options: RunOptions,
    texts: list[list[int]],
) -> None:
    """Measure all kinds of predictors; write the report and the picture asked for."""
    kinds: dict[str, list[Predictor]] = {method: fitted.predictors}
    n_check = sum(map(len, texts))
    splits = [captured.split(n_check) for captured in data]
    if method == "trained":  # the closed form of the same ranks beside it
        kinds["factors"] = [
            assess(
                Factors(layer, learn).predictor(p.rank), check, fitted.type, layer, 0.95
            ).predictor
            for layer, (learn, check), p in zip(
                model.weights.layers, splits, fitted.predictors, strict=True
            )
        ]
    checks = [check for _, check in splits]
    n = 2 + (len(kinds) + 1) * len(RECALLS)
    with tqdm(total=n, unit=" points", desc="report") as bar:
        report = frontier(model, kinds, fitted, checks, options, texts, bar.update)
    if args.report is not None:
        with replacing(args.report) as temporary:
            temporary.write_text(json.dumps(report, indent=2))
        say(f"wrote {args.report}")
    if args.plot is not None:
        from ..tools.plots import plot_frontier

        plot_frontier(report, args.plot)
        say(f"wrote {args.plot}")


def _summary(fitted: Fitted, chosen: list[Candidate], model: Model, goals: Goals) -> str:
    q = fitted.quality
    assert q.divergence is not None
    lines = ["layer  rank  recall  predicted  firing"]
    for il, (p, r) in enumerate(zip(fitted.predictors, q.layers, strict=True)):
        lines.append(
            f"{il:5} {p.rank:5}  {r.recall:6.2%}  {r.predicted_share:9.2%}  {r.firing_share:6.2%}"
        )
    size = sum(c.nbytes for c in chosen)
    total = model.file.tensor_bytes
    lines.append(
        f"predictors {size / 2**20:.2f} MiB ({size / total:.1%} of the model), "
        f"KL {q.divergence.kl.mean:.2e}, perplexity x{math.exp(q.divergence.log_ratio.mean):.4f}, "
        f"{q.traffic.total / 2**20:.2f} MiB a token"
    )
    over = [il for il, c in enumerate(chosen) if c.share > goals.max_share * c.firing]
    if over:
        lines.append(
            f"warning: layers {', '.join(map(str, over))} name more than {goals.max_share:g} times "
            "the neurons that fire; more text (-n) or a larger --max-size may help"
        )
    return "\n".join(lines)
