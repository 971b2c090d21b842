"""Continue a prompt. stdout gets the prompt and its continuation, stderr all else."""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path
from typing import Any

from ..runtime.config import RunOptions
from ..runtime.engine import Engine
from ..runtime.errors import RequestError, shown
from ..runtime.paths import regular
from ..runtime.sampling import SamplingOptions
from .arguments import add_gpu, add_isa, add_memory, add_mode, at_least, mode_of, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", type=Path, metavar="FILE", help="a GGUF (or PowerInfer PWRI) file")
    add("--demo", action="store_true", help="use the built-in demo model")
    add("-p", "--prompt", default=None, help="the text to continue")
    add("-f", "--file", type=Path, help="read the prompt from a file")
    add("-e", "--escape", action="store_true", help=r"\n, \t, \\ ... in the prompt are escapes")
    add("-n", "--n-predict", type=at_least(-1), default=128, help="tokens (-1: until the end)")
    add("-c", "--ctx-size", type=at_least(1), help="context (default: trained, at most 4096)")
    add("-t", "--threads", type=at_least(1), help="threads (default: physical cores)")
    add_gpu(parser)
    add("--kv-type", choices=["auto", "f32", "f16"], default="auto", help="type of the KV cache")
    add_memory(parser)
    add_isa(parser)
    add("--no-echo", action="store_true", help="do not print the prompt")

    add_mode(parser)
    add("--sparse-threshold", type=float, help="predictor scores at or above it count as firing")
    add("--no-adapt", action="store_true", help="keep the predictors' thresholds of the file")
    add("-ngl", "--n-gpu-layers", type=int, help=argparse.SUPPRESS)

    defaults = SamplingOptions()
    add("-s", "--seed", type=at_least(-1), default=-1, help="of the draws (-1: random)")
    add("--temp", type=float, default=defaults.temperature, help="0: the most likely token")
    add("--top-k", type=int, default=defaults.top_k, help="0: off")
    add("--top-p", type=float, default=defaults.top_p, help="1: off")
    add("--min-p", type=float, default=defaults.min_p, help="0: off")
    add("--repeat-penalty", type=float, default=defaults.repeat_penalty, help="1: off")
    add("--presence-penalty", type=float, default=0.0)
    add("--frequency-penalty", type=float, default=0.0)
    add("--repeat-last-n", type=int, default=defaults.penalty_last_n, help="-1: all")
    add("--logit-bias", action="append", default=[], metavar="TOKEN(+|-)BIAS")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    add("--ignore-eos", action="store_true", help="go on after the end token")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.n_gpu_layers is not None:
        parser.error("there is no -ngl here: say how much GPU memory to use with --vram-budget GiB")
    if (args.model is None) != args.demo:
        parser.error("one of -m FILE and --demo is needed")
    if args.prompt is not None and args.file is not None:
        parser.error("-p and -f exclude each other")
    try:
        options = _options(args)
        sampling = _sampling(args)
        SamplingOptions(**sampling)
    except RequestError as error:
        parser.error(str(error))
    prompt = _prompt(args)

    model = args.model
    if args.demo:
        from ..tools.demo_model import demo_model

        model = demo_model()
    say(f"loading {model}")
    with Engine(model, options, notify=say) as engine:
        c = engine.config
        say(
            f"{shown(c.name)[1:-1]}: {c.arch}, {c.n_layer} layers, n_embd {c.n_embd}, "
            f"n_ff {c.n_ff}; context {engine.context}, {engine.mode} mode, {engine.backend} backend"
        )
        if engine.mode == "exact" and not engine.weights.has_predictors:
            say("no predictors: powerinfer profile and train-predictors make such files faster")
        return _stream(args, engine, prompt, sampling)


def _stream(args: argparse.Namespace, engine: Engine, prompt: str, sampling: dict[str, Any]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The text as it is, whatever the locale: UTF-8, no translation of line ends.
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    pieces = engine.generate(
        prompt,
        max_tokens=args.n_predict,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
        **sampling,
    )
    interrupted = False
    try:
        if not args.no_echo:
            print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        pieces.close()  # type: ignore[attr-defined]  # a generator: note its timings
    say("")
    if interrupted:
        say("interrupted")
    elif engine.finish_reason == "context":
        say(f"the context of {engine.context} tokens is full (raise it with -c)")
    say(_timing_block(engine))
    return 130 if interrupted else 0


def _timing_block(engine: Engine) -> str:
    t = engine.timings

    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:9.1f} t/s" if tokens and seconds > 0 else "        - t/s"

    # The first new token comes out of the prompt's pass: decoding starts with the second.
    decoded = max(t.decode_tokens - 1, 0)
    lines = [
        f"load    {t.load_s * 1000:9.1f} ms",
        f"prompt  {rate(t.prompt_tokens, t.prompt_s)}  ({t.prompt_tokens} tokens)",
        f"decode  {rate(decoded, t.decode_s)}  ({t.decode_tokens} tokens)",
        f"neurons {t.rows_share:9.1%} computed, {t.fired_share:.1%} fired",
    ]
    if t.traffic is not None:
        lines.append(f"weights {t.traffic.total / 2**20:9.1f} MiB a token")
        bound = engine.bound()
        if bound is not None and decoded and t.decode_s > 0:
            share = decoded / t.decode_s / bound
            reading = f"reading those at {bound * t.traffic.total / 1e9:.1f} GB/s"
            if engine.backend == "cuda":
                reading = "of this placement"
            lines.append(f"bound   {bound:9.1f} t/s  ({reading}; {share:.0%} reached)")
    return "\n".join(lines)


def _unescape(match: re.Match[str]) -> str:
    """Return what an escape of llama.cpp's -e stands for; unknown ones are left alone."""
    if match[1][0] == "x":
        return chr(int(match[1][1:], 16))
    return dict(zip("nrtabfv0'\"\\", "\n\r\t\a\b\f\v\0'\"\\", strict=True))[match[1]]


def _prompt(args: argparse.Namespace) -> str:
    if args.file is not None:
        try:
            # As llama.cpp: the newline that editors put at the end is not part of the prompt.
            prompt = regular(args.file).read_bytes().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError:
            raise RequestError(f"{args.file} is not UTF-8 text") from None
    else:
        prompt = args.prompt or ""
    if args.escape:
        prompt = re.sub(r"\\(x[0-9a-fA-F]{2}|[nrtabfv0'\"\\])", _unescape, prompt)
    return str(prompt)


def _options(args: argparse.Namespace) -> RunOptions:
    return RunOptions(
        threads=args.threads,
        context=args.ctx_size,
        mode=mode_of(args),
        backend=args.backend,
        kv_type=args.kv_type,
        sparse_threshold=args.sparse_threshold,
        vram_budget=args.vram_budget,
        gpu=args.gpu,
        adapt=not args.no_adapt,
        isa=args.isa,
        mmap=not args.no_mmap,
        mlock=args.mlock,
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    bias: dict[int, float] = {}
    for text in args.logit_bias:
        match = re.fullmatch(r"(\d{1,9})([+-].+)", text)
        try:
            bias[int(match[1])] = float(match[2])  # type: ignore[index]
        except (TypeError, ValueError):
            raise RequestError(f"--logit-bias {text!r} is not like 42+1.5 or 42-inf") from None
    return {
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "penalty_last_n": args.repeat_last_n,
        "seed": None if args.seed < 0 else args.seed,
        "logit_bias": bias,
    }
