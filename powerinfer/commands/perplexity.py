"""Measure a model on a text: perplexity, distance from another model, recall of its predictors.

Windows and figures are those of llama.cpp's perplexity tool: the first half of each window is
context, the second half is scored. Without --kl-base, a model that runs with predictors is
compared with itself in exact mode.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

from tqdm import tqdm

from ..predictors.measure import Quality, measure
from ..predictors.text import read_text, windows
from ..runtime.config import Mode, RunOptions
from ..runtime.engine import Engine, is_sparse
from ..runtime.errors import RequestError
from ..runtime.weights import load_model
from .arguments import add_gpu, add_mode, at_least, mode_of, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", type=Path, metavar="FILE", required=True)
    add("-f", "--file", type=Path, required=True, help="the text")
    add("-n", "--tokens", type=at_least(3), help="of the text (default: all)")
    add("-c", "--ctx-size", type=at_least(3), help="tokens in a window (default: at most 512)")
    add("-t", "--threads", type=at_least(1), help="default: physical cores")
    add_gpu(parser)
    add("--kl-base", type=Path, metavar="REF.gguf", help="compare with this model, run exactly")
    add("--json", action="store_true", help="for programs")
    add("--sparse-threshold", type=float, help="in place of the file's thresholds")
    add_mode(parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        options = RunOptions(
            mode=mode_of(args),
            threads=args.threads,
            context=args.ctx_size,
            backend=args.backend,
            vram_budget=args.vram_budget,
            gpu=args.gpu,
            sparse_threshold=args.sparse_threshold,
        )
    except RequestError as error:
        parser.error(str(error))
    text = read_text(args.file)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine(args.model, options, notify=say))
        length = args.ctx_size or min(engine.context, 512)
        texts = windows(engine, text, length, args.tokens)
        base_path = args.kl_base or (args.model if engine.mode == "predicted" else None)
        base = None
        if base_path is not None:
            base = stack.enter_context(_open_base(base_path, options, engine))
        with tqdm(total=sum(map(len, texts)), unit=" tokens", desc="measuring") as bar:
            quality = measure(engine, texts, base, bar.update)
    if args.json:
        print(json.dumps(dataclasses.asdict(quality), indent=2))
    else:
        print(render(quality))
    return 0


def _open_base(path: Path, options: RunOptions, engine: Engine) -> Engine:
    """Open the model to compare with, without predictors, for windows of the same length."""
    model = load_model(path)
    mode: Mode = "exact" if is_sparse(model) else "dense"
    base = Engine(model, dataclasses.replace(options, mode=mode, context=engine.context))
    if base.config.n_vocab != engine.config.n_vocab:
        base.close()
        raise RequestError(f"{path} has another vocabulary: the two cannot be compared")
    return base


def render(quality: Quality) -> str:
    """Return the figures as text for people."""
    q, lines = quality, []

    def line(name: str, value: str) -> None:
        lines.append(f"{name:<24} {value}")

    line("tokens scored", str(q.tokens))
    line("perplexity", f"{q.perplexity.mean:.4f} ± {q.perplexity.error:.4f}")
    if q.divergence is not None:
        d = q.divergence
        line("base perplexity", f"{d.perplexity:.4f}")
        line("ln(perplexity ratio)", f"{d.log_ratio.mean:+.6f} ± {d.log_ratio.error:.6f}")
        line("KL mean", f"{d.kl.mean:.3e} ± {d.kl.error:.1e}")
        line("KL median, 99 %, max", f"{d.kl_median:.3e}, {d.kl_99:.3e}, {d.kl_max:.3e}")
        line("same top token", f"{d.same_top.mean:.2%} ± {d.same_top.error:.2%}")
        line("mean change of p", f"{d.delta_p.mean:+.4%} ± {d.delta_p.error:.4%}")
        line("RMS change of p", f"{d.delta_p_rms:.4%}")
    t = q.traffic
    line("KiB of weights a token", f"{t.total / 1024:.0f}")
    for part in ("attention", "predictor", "decider", "up", "down", "head"):
        line(f"  {part}", f"{getattr(t, part) / 1024:.0f}")
    if q.layers:
        lines.append("layer  recall  precision  predicted  firing")
        for il, r in enumerate(q.layers):
            lines.append(
                f"{il:5}  {r.recall:6.2%}  {r.precision:9.2%}  {r.predicted_share:9.2%}  "
                f"{r.firing_share:6.2%}"
            )
    return "\n".join(lines)
