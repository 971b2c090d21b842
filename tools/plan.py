"""A placement for people and for programs: what lives on the GPU, and how fast that could be."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..runtime.errors import shown
from ..runtime.footprint import CONTEXT_BYTES, LayerSizes, ModelSizes
from ..runtime.plan import LayerPlacement, Placement, Rates

GIB = 1 << 30


def as_json(
    m: ModelSizes, p: Placement, more: Placement, rates: Rates, tokens: int
) -> dict[str, Any]:
    """Return a placement, and what `more`, with one GiB more, is better by; ready for JSON.

    Bytes, seconds, bytes per second, tokens per second; shares from 0 to 1.
    """
    return {
        "model": m.name,
        "mode": m.mode,
        "context": m.context,
        "tokens_in_cache": tokens,
        "firing": "file" if m.is_profiled else "assumed",
        "rates": asdict(rates),
        "budget": p.budget,
        "used": p.used,
        "cuda_context": CONTEXT_BYTES if p.gpu_layers else 0,
        "bytes": p.bytes,
        "gpu_layers": p.gpu_layers,
        "is_everything": p.is_everything,
        "served": p.served,
        "note": p.note,
        "bound": {
            "tokens_per_second": p.bound.tokens_per_second,
            "seconds": p.bound.seconds,
            "parts": asdict(p.bound),
        },
        "one_gib_more": {"tokens_per_second": more.bound.tokens_per_second},
        "layers": [asdict(layer) for layer in p.layers],
    }


def as_text(
    m: ModelSizes, p: Placement, more: Placement, rates: Rates, tokens: int, origin: dict[str, str]
) -> str:
    """Return the same as text; `origin`: where rates and firing frequencies come from."""
    percent = f", {p.used / p.budget:.1%}" if p.budget else ""
    kinds = ", ".join(f"{kind} {n / 2**20:.1f}" for kind, n in p.bytes.items() if n)
    t, parts = p.bound, asdict(p.bound).items()
    times = ", ".join(f"{name.replace('_', ' ')} {s * 1e3:.2f}" for name, s in parts if s)
    gain = more.bound.tokens_per_second / t.tokens_per_second - 1
    lines = [
        f"{shown(m.name)[1:-1]}: {m.mode} mode, context {m.context}",
        *_table(m, p),
        _line("GPU memory", f"{_mib(p.used)} of {_mib(p.budget)} MiB{percent}"),
        *([_line("", kinds), _line("", _context())] if p.gpu_layers else []),
        *([_line("", p.note)] if p.note else []),
        _line("activations", f"{_share(p.served)} served by the GPU"),
        _line("bound", f"{t.tokens_per_second:.1f} t/s with {tokens} tokens in the cache"),
        _line("", f"{t.seconds * 1e3:.2f} ms a token: {times}"),
        _line("1 GiB more", _gain(p, more.bound.tokens_per_second, gain)),
        _line(
            "rates",
            f"GPU {rates.gpu / 1e9:g} GB/s ({origin['gpu']}), CPU {rates.cpu / 1e9:.4g} GB/s "
            f"({origin['cpu']}), link {rates.link * 1e6:g} us ({origin['link']})",
        ),
        _line("firing", origin["firing"]),
    ]
    return "\n".join(lines)


def _line(name: str, value: str) -> str:
    return f"{name:<12} {value}"


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f}"


def _share(x: float) -> str:
    return ">99.9%" if 0.9995 <= x < 1 else f"{x:.1%}"


def _context() -> str:
    return f"beside it the CUDA context, some {CONTEXT_BYTES >> 20} MiB"


def _gain(p: Placement, rate: float, gain: float) -> str:
    if p.is_everything:
        return "nothing: everything is on the GPU"
    return f"{rate:.1f} t/s ({gain:+.1%})" if gain > 0.0005 else "no faster"


def _table(m: ModelSizes, p: Placement) -> list[str]:
    """Return a line for each run of layers that are placed alike."""
    lines = [f"{'layers':<9} {'on':<4} {'dense':>8} {'cache':>8} {'neurons':>8} MiB  blocks of 64"]
    first = 0
    for il, layer in enumerate(p.layers):
        is_last = il + 1 == len(p.layers)
        if is_last or _cells(m.layers[il + 1], p.layers[il + 1]) != _cells(m.layers[il], layer):
            numbers = str(il) if first == il else f"{first}-{il}"
            lines.append(f"{numbers:<9} {_cells(m.layers[il], layer)}")
            first = il + 1
    return lines


def _cells(sizes: LayerSizes, layer: LayerPlacement) -> str:
    if not layer.on_gpu:
        return f"{'CPU':<4} {'-':>8} {'-':>8} {'-':>8}"
    size = " ".join(f"{n / 2**20:8.1f}" for n in (layer.dense, layer.cache, layer.hot))
    whole = "" if sizes.step == 1 else " (not stored hot-first: all or none)"
    share = f"{_share(layer.served)} of its activations"
    return f"GPU  {size}      {layer.slots} of {layer.n_blocks}, {share}{whole}"
