"""What adaptation does when the text changes: recall and predicted share, token by token.

    python -m powerinfer.tools.shift MODEL.gguf -f other.txt -o shift.png

Reads a text that the predictors were not made for, once with the thresholds of the file and once
with thresholds that follow the text (runtime/adapt.py), and prints or draws both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..predictors.text import read_text
from ..runtime.backend import Backend
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.model import Watcher, audit
from .plots import pyplot, save

F64Array = np.ndarray[tuple[int], np.dtype[np.float64]]
Shares = np.ndarray[tuple[int, int, int], np.dtype[np.int64]]


class _Trace(Watcher):
    """Keeps (hits, firing, predicted neurons) of every token and layer."""

    def __init__(self) -> None:
        self.rows: dict[int, list[list[int]]] = {}  # layer -> one row a token

    def before_ffn(self, ops: Backend, il: int) -> None:
        for t in range(ops.plan.step.n_tok):
            fired, mask = audit(ops, il, t), ops.plan.buffers.mask[t] != 0
            row = [int((fired & mask).sum()), int(fired.sum()), int(mask.sum())]
            self.rows.setdefault(il, []).append(row)


def trace(engine: Engine, ids: Sequence[int], adapt: bool) -> Shares:
    """Return int64 [n_layer, n_tok, 3]: hits, firing, predicted neurons of each token.

    RequestError if thresholds are to adapt and the file does not say what recall they are for.
    """
    adapter = engine.adapter() if adapt else None
    if adapt and adapter is None:
        raise RequestError(f"{engine.file.path} has no calibrated predictors to adapt")
    watcher = _Trace()
    with engine.watched(watcher):
        engine.read(ids, adapter=adapter)
    return np.array(list(watcher.rows.values()))


def windowed(trace: Shares, width: int) -> tuple[F64Array, F64Array]:
    """Return recall, and predicted over firing neurons, of each `width` tokens: float64 [n].

    Means over layers of each layer's own: one that fires much must not hide the others.
    """
    n_layer, n_tok, _ = trace.shape
    parts = trace[:, : n_tok // width * width].reshape(n_layer, -1, width, 3).sum(axis=2)
    hits, fired, predicted = np.moveaxis(parts, -1, 0)
    fired = np.maximum(fired, 1)
    return (hits / fired).mean(axis=0), (predicted / fired).mean(axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("-n", "--tokens", type=int, default=500)
    parser.add_argument("-w", "--width", type=int, default=25, help="tokens in a point")
    parser.add_argument("-o", "--outfile", type=Path, help="a picture (extra `plot`)")
    args = parser.parse_args()
    curves: dict[str, tuple[F64Array, F64Array]] = {}
    with Engine(args.model) as engine:
        ids = engine.tokenize(read_text(args.file))[: min(args.tokens, engine.context)]
        for name in ("frozen", "adapting"):
            curves[name] = windowed(trace(engine, ids, name == "adapting"), args.width)
        target = engine.config.target_recall
    print("tokens   frozen: recall, predicted/firing   adapting: recall, predicted/firing")
    for i in range(len(curves["frozen"][0])):
        row = [f"{curve[i]:8.3f}" for name in curves for curve in curves[name]]
        print(f"{(i + 1) * args.width:6}" + "".join(row))
    if args.outfile is None:
        return
    plt = pyplot()
    figure, panels = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    at = (np.arange(len(curves["frozen"][0])) + 0.5) * args.width
    for name, colour in (("frozen", "#d1495b"), ("adapting", "#1b6ca8")):
        for axes, values in zip(panels, curves[name], strict=True):
            axes.plot(at, values, "o-", markersize=3, color=colour, label=name)
    panels[0].axhline(target, linestyle="--", color="0.4", label="target")
    panels[0].set_ylabel("recall")
    panels[1].set_ylabel("predicted / firing neurons")
    panels[1].set_xlabel("tokens of a text that the predictors were not made for")
    for axes in panels:
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    save(figure, args.outfile)


if __name__ == "__main__":
    main()
