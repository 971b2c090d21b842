"""Pictures, with matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import RequestError, shown
from ..runtime.formats import F32Array
from ..runtime.gguf_writer import replacing
from .heat import CARRIED, Heat, Record

COLOURS = {"trained": "#1b6ca8", "factors": "#d1495b", "signs": "#66a182"}

# Of plot_heat. Blue and vermilion are told apart with any kind of colour blindness.
FIRES, PREDICTED, INK, SOFT = "#d55e00", "#0072b2", "#222222", "#666666"
COLUMNS = 1000  # of the heat map at most: more are not seen
ROOMY = 8  # points a row: from here on rows are set apart and have markers
GAMMA = 0.4  # colours follow frequency ** GAMMA: shows 1 % and 0 apart without hiding the top


def pyplot() -> Any:
    """Return matplotlib.pyplot, drawing to files; RequestError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise RequestError(
            'pictures need matplotlib: pip install "powerinfer-python[plot]"'
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def kind_of(figure: Any, path: Path) -> str:
    """Return the type of picture that a file's name says, PNG where it says none.

    RequestError for a type that matplotlib does not write.
    """
    kind = path.suffix[1:].lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise RequestError(f"{path}: a picture cannot be written as {shown(kind)}; try .png")
    return kind


def save(figure: Any, path: Path) -> None:
    """Write a figure as the type that the file's name says; RequestError as in kind_of()."""
    kind = kind_of(figure, path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)


def plot_frontier(report: dict[str, Any], path: Path) -> None:
    """Draw a report of predictors.frontier: bytes a token against KL, a line for each kind."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lossless = {p["kind"]: p for p in report["points"] if p["target_recall"] is None}
    for kind in dict.fromkeys(p["kind"] for p in report["points"] if p["target_recall"]):
        points = [p for p in report["points"] if p["kind"] == kind]
        x = [p["bytes_per_token"] / 2**20 for p in points]
        y = [p["kl"] for p in points]
        axes.plot(x, y, "o-", color=COLOURS.get(kind), label=kind)
        for p, at_x, at_y in zip(points, x, y, strict=True):
            axes.annotate(
                f"{p['recall']:.2f}",
                (at_x, at_y),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=7,
                color="0.35",
            )
    shipped = report["shipped"]
    axes.plot(
        shipped["bytes_per_token"] / 2**20,
        shipped["kl"],
        "*",
        markersize=15,
        color="#edae49",
        markeredgecolor="0.2",
        label="in the file",
        zorder=5,
    )
    for kind, style in (("exact", "--"), ("dense", ":")):
        axes.axvline(
            lossless[kind]["bytes_per_token"] / 2**20,
            linestyle=style,
            color="0.4",
            label=f"{kind} (no loss)",
        )
    axes.set_yscale("log")
    axes.set_xlabel("MiB of weights read a token, predictor included")
    axes.set_ylabel("KL from the exact model, nats a token")
    axes.set_title(
        f"{report['model']}: what predictors cost and save (labels: recall)", fontsize=10
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    save(figure, path)
    plt.close(figure)


def plot_heat(heat: Heat, path: Path) -> None:
    """Draw how often the neurons of every layer fire, and how well they are predicted."""
    plt = pyplot()
    style = {
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": SOFT,
        "axes.linewidth": 0.6,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        figure = _HeatFigure(plt, heat).figure
        save(figure, path)
    plt.close(figure)


class _HeatFigure:
    """The figure of plot_heat, laid out in inches so that text keeps its place at any height."""

    def __init__(self, plt: Any, heat: Heat) -> None:
        self.heat, self.n_layer = heat, len(heat.frequencies)
        self.layers = np.arange(self.n_layer)
        # Few layers need not fill a page, many must still be told apart.
        self.panel = min(0.95 * self.n_layer**0.46, 9.0)
        self.row = self.panel / self.n_layer * 72  # points
        self.bottom, header = 1.0, 0.75 if heat.record is None else 0.95
        self.width, self.height = 11.0, self.bottom + self.panel + 0.62 + header
        self.figure = plt.figure(figsize=(self.width, self.height), facecolor="white")
        self._header()
        if heat.record is None:
            self._map(0.75, 7.1)
            self._shares(8.4, 2.2)
        else:
            self._map(0.75, 5.75)
            self._shares(7.05, 1.95)
            self._recall(9.4, 1.2, heat.record)

    # -- helpers ------------------------------------------------------------------------------

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write at inches from the left and the bottom; a model's name may hold dollars."""
        self.figure.text(x / self.width, y / self.height, text, parse_math=False, **style)

    def _axes(self, left: float, bottom: float, width: float, height: float) -> Any:
        w, h = self.width, self.height
        return self.figure.add_axes((left / w, bottom / h, width / w, height / h))

    def _panel(self, left: float, width: float, title: str) -> Any:
        """Make a panel with a row for each layer, layer 0 on top, and a share on x."""
        axes = self._axes(left, self.bottom, width, self.panel)
        axes.set_ylim(self.n_layer - 0.5, -0.5)
        axes.set_yticks([])
        axes.tick_params(length=3)
        axes.xaxis.set_major_formatter(_percent)
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        self._text(left, self.bottom + self.panel + 0.34, title, fontsize=10, weight="bold")
        return axes

    def _line(
        self, axes: Any, shares: Any, colour: str, label: str, marker: str = "o", face: Any = None
    ) -> None:
        """Draw one number a layer: a line, with markers where the rows have room for them."""
        size = min(self.row * 0.45, 6.5)
        axes.plot(
            shares,
            self.layers,
            color=colour,
            label=label,
            linewidth=1.2,
            marker=marker if self.row >= ROOMY else None,
            markersize=0.8 * size if marker == "D" else size,  # they look the same
            markerfacecolor=face or colour,
            clip_on=False,
        )

    def _legend(self, axes: Any) -> None:
        """Name the lines of a panel between its title and its top."""
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            bbox_transform=axes.transAxes,
            ncols=3,
            frameon=False,
            fontsize=8,
            labelcolor=SOFT,
            borderpad=0,
            borderaxespad=0.4,
            handlelength=1.1,
            handletextpad=0.4,
            columnspacing=0.9,
        )

    # -- parts --------------------------------------------------------------------------------

    def _header(self) -> None:
        heat = self.heat
        name = shown(heat.model)[1:-1]
        name = name if len(name) <= 56 else name[:55] + "…"
        layers = "1 layer" if self.n_layer == 1 else f"{self.n_layer} layers"
        lines = [
            f"{layers} of {len(heat.frequencies[0]):,} FFN neurons: "
            f"{_percent(heat.firing_share.mean())} fire for a token, the hottest "
            f"{_percent(heat.carrying_share.mean())} do {_percent(CARRIED)} of all firing."
        ]
        if heat.record is not None:
            lines.append(
                f"Predictors name {_percent(heat.record.predicted_share.mean())} "
                f"and find {_percent(heat.record.recall.mean())} of those that fire."
            )
        left, top = 0.75, self.height
        self._text(left, top - 0.44, f"Who fires in {name}", fontsize=16, weight="bold")
        for i, line in enumerate(lines):
            self._text(left, top - 0.7 - 0.2 * i, line, fontsize=9.5, color=SOFT)

    def _map(self, left: float, width: float) -> None:
        axes = self._panel(left, width, "How often each neuron fires")
        image = axes.imshow(
            np.stack([_binned(f) for f in self.heat.frequencies]) ** GAMMA,
            cmap="inferno",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, 1, self.n_layer - 0.5, -0.5),
        )
        self._carriers(axes)
        steps = (s * 10**k for k in range(9) for s in (1, 2, 5))
        axes.set_yticks(range(0, self.n_layer, next(s for s in steps if s * 16 >= self.n_layer)))
        axes.set_xticks(np.arange(6) / 5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer", color=SOFT)
        axes.set_xlabel("neurons of a layer, hottest first", color=SOFT)

        bar = self.figure.colorbar(
            image, cax=self._axes(left + 0.62, 0.3, 2.7, 0.1), orientation="horizontal"
        )
        ticks = (0, 0.01, 0.05, 0.2, 0.5, 1)
        bar.set_ticks([t**GAMMA for t in ticks], labels=[_percent(t) for t in ticks])
        bar.ax.tick_params(length=2, labelsize=8)
        bar.outline.set_visible(False)
        self._text(left, 0.3, "fires for", fontsize=8, color=SOFT)
        self._text(left + 3.45, 0.3, "of all tokens", fontsize=8, color=SOFT)

    def _carriers(self, axes: Any) -> None:
        """Mark in each row how many neurons make CARRIED of the activations."""
        shares = self.heat.carrying_share
        roomy = self.row >= ROOMY
        for colour, width in (("black", 3.4), ("white", 1.8)):  # seen on every colour
            style = {"color": colour, "linewidth": width}
            if roomy:
                axes.vlines(shares, self.layers - 0.5, self.layers + 0.5, **style)
            else:  # one line all the way down
                edges = np.arange(self.n_layer + 1) - 0.5
                axes.stairs(shares, edges, orientation="horizontal", baseline=None, **style)
        if roomy:
            gap = min(self.row * 0.06, 1.5)
            axes.hlines(self.layers[1:] - 0.5, 0, 1, color="white", linewidth=gap)
        is_right = shares[0] > 0.7
        axes.annotate(
            f"← {_percent(CARRIED)} of all firing",
            (shares[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3 if is_right else -3, 4),
            textcoords="offset points",
            ha="right" if is_right else "left",
            fontsize=8,
            color=SOFT,
        )

    def _shares(self, left: float, width: float) -> None:
        heat = self.heat
        axes = self._panel(left, width, "Share of neurons")
        carrying = heat.carrying_share
        most = carrying.max()
        self._line(axes, heat.firing_share, FIRES, "fire")
        if heat.record is not None:
            self._line(axes, heat.record.predicted_share, PREDICTED, "predicted", "D")
            most = max(most, heat.record.predicted_share.max())
        self._line(axes, carrying, INK, f"do {_percent(CARRIED)}", face="white")
        axes.set_xlim(0, min(1.12 * most, 1) or 1)
        axes.locator_params(axis="x", nbins=4)
        self._legend(axes)

    def _recall(self, left: float, width: float, record: Record) -> None:
        axes = self._panel(left, width, "Recall")
        self._line(axes, record.recall, PREDICTED, "reached", "D")
        lowest = record.recall.min()
        target = record.target_recall
        if target is not None:
            axes.axvline(target, color=INK, linestyle=(0, (4, 3)), linewidth=1, label="target")
            lowest = min(lowest, target)
        # At least this wide, or differences of no weight fill the panel.
        axes.set_xlim(min(lowest - 0.02, 0.9), 1)
        axes.locator_params(axis="x", nbins=3)
        self._legend(axes)


def _percent(value: float, _: int = 0) -> str:
    """Write a share for people (and, with a position, for an axis)."""
    digits = 1 if 0 < value < 0.1 or 0.9 < value < 1 else 0
    return f"{100 * value:.{digits}f}".removesuffix(".0") + " %"


def _binned(frequency: F32Array) -> F32Array:
    """Return the means of at most COLUMNS groups of neighbours."""
    edges = np.linspace(0, len(frequency), min(COLUMNS, len(frequency)) + 1).astype(int)
    return (np.add.reduceat(frequency, edges[:-1]) / np.diff(edges)).astype(np.float32)
