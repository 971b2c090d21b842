"""Show what would live on the GPU under a budget, and how fast decoding could be with it.

Nothing is run and no GPU is needed. The bound is reading the weights and the cache of a token once,
at the bandwidths given; the default of --gpu-bandwidth is some consumer card, not yours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..quantize.policy import TARGETS
from ..runtime.config import RunOptions
from ..runtime.engine import N_OUT, choose_context, choose_mode, has_f32_cache
from ..runtime.errors import RequestError
from ..runtime.footprint import FIRING, PREDICTED, ModelSizes, model_sizes
from ..runtime.plan import CROSSING, Rates, plan
from ..runtime.weights import Model, load_model
from ..tools.plan import GIB, as_json, as_text
from ..tools.synth import SHAPES, imagine
from .arguments import add_mode, at_least, mode_of, say

GPU_BANDWIDTH, LINK = 500.0, 1e6 * CROSSING  # GB/s, microseconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-m", "--model", type=Path, metavar="FILE")
    what.add_argument("--shape", choices=SHAPES, help="a model of this shape, without a file")
    add("--type", choices=TARGETS, help="of the weights of --shape (default: q4_0)")
    add("--vram-budget", type=float, metavar="GiB", required=True, help="GPU memory to use")
    add("-c", "--ctx-size", type=at_least(1), help="context (default: trained, at most 4096)")
    add("--kv-type", choices=["auto", "f32", "f16"], default="auto", help="type of the KV cache")
    add("--at", type=at_least(0), metavar="TOKENS", help="in the cache (default: half full)")
    add_mode(parser)
    add("--gpu-bandwidth", type=_number(above=True), metavar="GB/s", help="default: 500")
    add("--cpu-bandwidth", type=_number(above=True), metavar="GB/s", help="default: measured here")
    add("--link-us", type=_number(), metavar="US", help=f"to the CPU and back (default: {LINK:g})")
    add("--json", action="store_true", help="for programs")


def _number(above: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a number from 0 to a million, or above 0."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1e6 or (above and not value):
            least = "above 0" if above else "at least 0"
            raise argparse.ArgumentTypeError(f"{text} is not {least}, and at most a million")
        return value

    return number


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.type and not args.shape:
        parser.error("--type goes with --shape: a file has its types")
    try:
        options = RunOptions(
            context=args.ctx_size,
            mode=mode_of(args),
            kv_type=args.kv_type,
            vram_budget=args.vram_budget,
        )
    except RequestError as error:
        parser.error(str(error))
    if args.shape:
        model = imagine(args.shape, TARGETS[args.type or "q4_0"])
    else:
        model = load_model(args.model)
    sizes = _sizes(model, options)
    tokens = sizes.context // 2 if args.at is None else args.at
    if tokens > sizes.context:
        parser.error(f"--at {tokens} is more than the context of {sizes.context}")
    rates, origin = _rates(args)
    origin["firing"] = "as the file says"
    if args.shape:
        origin["firing"] = f"as the synthetic models do: {FIRING:.0%} of the neurons, some often"
    elif not sizes.is_profiled:
        origin["firing"] = f"assumed: {FIRING:.0%} of the neurons, {PREDICTED:.0%} predicted"
    budget = int(args.vram_budget * GIB)
    found, more = (plan(sizes, rates, n, tokens) for n in (budget, budget + GIB))
    if args.json:
        print(json.dumps(as_json(sizes, found, more, rates, tokens), indent=2, allow_nan=False))
    else:
        print(as_text(sizes, found, more, rates, tokens, origin))
    return 0


def _sizes(model: Model, options: RunOptions) -> ModelSizes:
    """Measure a model as the engine would run it."""
    context = choose_context(model.config, options)
    return model_sizes(
        model,
        choose_mode(model, options),
        context,
        f32_cache=has_f32_cache(model.weights, options),
        n_tok=min(options.chunk, context),
        n_out=N_OUT,
    )


def _rates(args: argparse.Namespace) -> tuple[Rates, dict[str, str]]:
    """Return the rates, and where each of them comes from."""
    gpu, cpu, link = args.gpu_bandwidth, args.cpu_bandwidth, args.link_us
    origin = {
        "gpu": "given" if gpu is not None else "assumed",
        "cpu": "given" if cpu is not None else "measured",
        "link": "given" if link is not None else "assumed",
    }
    if cpu is None:
        from ..runtime.cpu.bandwidth import Reader  # numba takes half a second to import
        from ..runtime.cpu.isa import physical_cores

        say("measuring how fast this machine reads memory")
        cpu = Reader().measure(physical_cores()) / 1e9
    gpu, link = GPU_BANDWIDTH if gpu is None else gpu, LINK if link is None else link
    return Rates(gpu * 1e9, cpu * 1e9, link * 1e-6), origin
