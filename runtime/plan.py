"""What lives on the GPU: the placement of a model's parts under a budget of bytes.

First what every token reads (cache, attention, predictors, head), layer after layer; layers that do
not fit run on the CPU, the last ones first. Then neurons, hottest first, where they save most of
the time a token takes. That is bytes over bandwidth, in each layer D for what every token reads, H
and C for what it reads of the resident neurons and of the others, on average:

    T = sum over layers [ D / BWg + max(H / BWg, C / BWc + t_link) ] + head / BWg

t_link, a crossing down and up, is charged to every layer with neurons on the CPU. Where attention
and FFN do not wait for each other (Falcon), the CPU's part starts when the predictor has spoken:

    predictor / BWg + max((D - predictor + H) / BWg, C / BWc + t_link)

What is minimised is T with all of the FFN, on the GPU, in the place of H: the CPU is there for what
does not fit, and no memory is left empty for a layer to be faster than on the GPU alone. On paper
that costs at most a share of BWc / BWg.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .footprint import LayerSizes, ModelSizes

F64Array = np.ndarray[tuple[int], np.dtype[np.float64]]
I64Array = np.ndarray[tuple[int], np.dtype[np.int64]]

# Of the ways to fill the first layers, so many are kept while the next one is added; of the ways to
# fill that one, so many are tried. tests/test_plan.py compares with exact solutions.
_STATES, _CHOICES = 1000, 48
_SLACK = 0.005  # as many layers on the GPU as there can be within this of the best time
# Seconds of a crossing down and up by itself: 3.9 to 4.7 us, an H100 on PCIe 5, all polling.
CROSSING = 5e-6
ENOUGH = 0.95  # of a budget; Placement.note explains why less is used


@dataclass(frozen=True)
class Rates:
    """What the machine does: bytes per second that GPU and CPU read, seconds of a crossing."""

    gpu: float
    cpu: float
    link: float


@dataclass(frozen=True)
class Bound:
    """Seconds of a token if nothing took time but reading: parts that add up to T."""

    attention: float = 0.0
    predictor: float = 0.0
    cache: float = 0.0
    hot: float = 0.0  # resident neurons
    waiting: float = 0.0  # for the CPU's neurons and the link, beyond what goes on beside them
    host_layers: float = 0.0  # layers that run on the CPU
    head: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(vars(self).values())

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


@dataclass(frozen=True)
class LayerPlacement:
    """Where a layer runs, and how much of its FFN is on the GPU; bytes on the device."""

    n_blocks: int
    on_gpu: bool = False
    slots: int = 0  # resident blocks of 64 neurons, the first of n_blocks
    served: float = 0.0  # share of the layer's activations that the GPU computes
    dense: int = 0  # all but the next two
    cache: int = 0
    hot: int = 0

    def slot_table(self) -> np.ndarray:
        """Return int32 [n_blocks]: the place of each block on the device, -1: on the CPU."""
        table = np.arange(self.n_blocks, dtype=np.int32)
        table[self.slots :] = -1
        return table


@dataclass(frozen=True)
class Placement:
    """What lives where, in bytes on the device, padding included."""

    budget: int
    layers: tuple[LayerPlacement, ...]
    bytes: dict[str, int]  # by kind
    served: float  # share of all activations that the GPU computes
    bound_at: Callable[[float], Bound]  # with so many tokens in the cache
    bound: Bound  # with as many as it was planned for
    has_embedding: bool  # on the device: tokens are looked up there
    note: str = ""  # why not more of the budget is used

    @property
    def used(self) -> int:
        return sum(self.bytes.values())

    @property
    def slab(self) -> int:
        """What is allocated at once: all but the graphs, which the driver keeps."""
        return self.used - self.bytes.get("graphs", 0)

    @property
    def gpu_layers(self) -> int:
        """How many layers are on the GPU: the first ones."""
        return sum(layer.on_gpu for layer in self.layers)

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left to the CPU, except perhaps looking up embeddings."""
        return all(layer.on_gpu and layer.slots == layer.n_blocks for layer in self.layers)


def plan(m: ModelSizes, rates: Rates, budget: int, tokens: int | None = None) -> Placement:
    """Return the best placement under `budget` bytes, with `tokens` in the cache (None: half full).

    Best is what the module says, to 1 %.
    """
    tokens = m.context // 2 if tokens is None else tokens
    seconds = [_on_gpu(m, layer, rates, tokens) for layer in m.layers]
    on_host = [_on_host(m, layer, rates, tokens) for layer in m.layers]
    room = budget - _needed(m)
    # By the number of layers on the GPU: seconds, steps of neurons in each.
    ways = {0: (sum(on_host) + m.host_head_read / rates.cpu, [0] * 0)}
    if room[-1] + m.windows >= sum(int(layer.hot[-1]) for layer in m.layers):
        found = {len(m.layers): (sum(float(t[-1]) for t in seconds), [len(t) - 1 for t in seconds])}
    else:
        found = _divide(m.layers, seconds, room)
    for k, (inside, steps) in found.items():
        crossing = rates.link if k < len(m.layers) else 0.0
        ways[k] = inside + sum(on_host[k:]) + crossing + m.head_read / rates.gpu, steps
    fastest = min(total for total, _ in ways.values())
    k = max(k for k, (total, _) in ways.items() if total <= fastest * (1 + _SLACK))
    steps = _finish(m.layers, seconds, ways[k][1], int(room[k]))
    slots = [s * layer.step for s, layer in zip(steps, m.layers, strict=False)]
    placement = place(m, rates, slots, tokens, budget)
    assert placement.used <= max(budget, 0)
    return dataclasses.replace(placement, note=_note(m, placement))


def place(
    m: ModelSizes, rates: Rates, slots: Sequence[int], tokens: int, budget: int | None = None
) -> Placement:
    """Return the placement with these numbers of blocks on the GPU, for each of the first layers.

    Layers beyond `slots` run on the CPU. Of a layer that is not stored hot-first all blocks are
    there, or none. `budget`: None for what it takes; else it must be enough.
    """
    n_gpu = len(slots)
    steps = [n // layer.step for n, layer in zip(slots, m.layers, strict=False)]
    layers = [LayerPlacement(layer.n_blocks) for layer in m.layers]
    for il, s in enumerate(steps):
        layer, total = m.layers[il], m.layers[il].served[-1]
        served = float(layer.served[s] / total) if total else float(s > 0)
        own = layer.dense, layer.cache, int(layer.hot[s])
        layers[il] = LayerPlacement(layer.n_blocks, True, s * layer.step, served, *own)
    is_everything = all(la.slots == la.n_blocks for la in layers)
    sizes: dict[str, int] = {}
    if n_gpu:
        sizes = {
            "dense": sum(la.dense for la in layers),
            "cache": sum(la.cache for la in layers),
            "neurons": sum(la.hot for la in layers),
            "head": m.head,
            "workspace": m.workspace,
            "graphs": m.graphs,
            "windows": 0 if is_everything else m.windows,
            "embedding": 0,
        }
        has_room = budget is None or sum(sizes.values()) + m.embedding <= budget
        sizes["embedding"] = m.embedding if is_everything and has_room else 0
    bound_at = functools.partial(_bound, m, rates, steps)
    firing = sum(float(layer.served[-1]) for layer in m.layers)
    on_gpu = sum(float(la.served[s]) for la, s in zip(m.layers, steps, strict=False))
    return Placement(
        budget=sum(sizes.values()) if budget is None else budget,
        layers=tuple(layers),
        bytes=sizes,
        served=on_gpu / firing if firing else float(is_everything),
        bound_at=bound_at,
        bound=bound_at(tokens),
        has_embedding=n_gpu > 0 and sizes["embedding"] == m.embedding,
    )


def _needed(m: ModelSizes) -> I64Array:
    """Return what 0, 1, ... layers on the GPU take before any neurons: int64 [n_layer + 1]."""
    own = [layer.dense + layer.cache for layer in m.layers]
    return np.cumsum([m.head + m.workspace + m.graphs + m.windows, *own])


def _note(m: ModelSizes, p: Placement) -> str:
    """Return why less than ENOUGH of a budget is used; "" where it is, or where all is there."""
    if p.is_everything or (p.gpu_layers and p.used >= ENOUGH * p.budget):
        return ""
    k, left = p.gpu_layers, p.budget - p.used
    own = _needed(m)
    if not k:
        if own[1] > left:
            return f"CPU only: one layer with the head and buffers takes {_mib(int(own[1]))}"
        return "CPU only: by these rates a GPU would not make it faster"
    steps = [
        int(layer.hot[place.slots // layer.step + 1] - place.hot)
        for layer, place in zip(m.layers, p.layers, strict=True)
        if place.on_gpu and place.slots < place.n_blocks
    ]
    if steps:
        return f"{_mib(left)} left: the next block of neurons takes {_mib(min(steps))}"
    if own[k + 1] - own[k] > left:
        return f"{_mib(left)} left: the next layer takes {_mib(int(own[k + 1] - own[k]))}"
    return f"{_mib(left)} left: by these rates more layers on the GPU would not make it faster"


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"


# -- the time of a layer ------------------------------------------------------------------------


def _dense_seconds(
    m: ModelSizes, layer: LayerSizes, rates: Rates, tokens: float
) -> tuple[float, float, float]:
    """Return what attention, predictor and cache of a layer take on the GPU."""
    read = layer.attention_read, layer.predictor_read, tokens * m.cache_row
    return read[0] / rates.gpu, read[1] / rates.gpu, read[2] / rates.gpu


def _cold_seconds(layer: LayerSizes, rates: Rates) -> F64Array:
    """Return what the CPU's neurons take, with 0, 1, ... steps on the GPU."""
    seconds = layer.cold_read / rates.cpu + rates.link
    seconds[-1] = 0.0
    return seconds


def _on_gpu(m: ModelSizes, layer: LayerSizes, rates: Rates, tokens: int) -> F64Array:
    """Return the seconds that are minimised, with 0, 1, ... steps of neurons on the GPU."""
    attention, predictor, cache = _dense_seconds(m, layer, rates, tokens)
    ffn = layer.hot_read[-1] / rates.gpu
    if m.is_parallel:
        return predictor + np.maximum(attention + cache + ffn, _cold_seconds(layer, rates))
    return attention + predictor + cache + np.maximum(ffn, _cold_seconds(layer, rates))


def _on_host(m: ModelSizes, layer: LayerSizes, rates: Rates, tokens: float) -> float:
    """Return the seconds of a layer on the CPU."""
    return float(layer.host_read + tokens * m.cache_row + layer.cold_read[0]) / rates.cpu


def _bound(m: ModelSizes, rates: Rates, steps: Sequence[int], tokens: float) -> Bound:
    """Return T with these steps of neurons in the first layers, the others on the CPU."""
    if not steps:
        outside = sum(_on_host(m, layer, rates, tokens) for layer in m.layers)
        return Bound(host_layers=outside, head=m.host_head_read / rates.cpu)
    sums = dict.fromkeys(("attention", "predictor", "cache", "hot", "waiting"), 0.0)
    for layer, s in zip(m.layers, steps, strict=False):
        attention, predictor, cache = _dense_seconds(m, layer, rates, tokens)
        hot = float(layer.hot_read[s]) / rates.gpu
        beside = hot + attention + cache if m.is_parallel else hot
        waiting = max(float(_cold_seconds(layer, rates)[s]) - beside, 0.0)
        for name, x in zip(sums, (attention, predictor, cache, hot, waiting), strict=True):
            sums[name] += x
    others = m.layers[len(steps) :]
    host_layers = sum(_on_host(m, layer, rates, tokens) for layer in others)
    if others:
        host_layers += rates.link
    return Bound(**sums, host_layers=host_layers, head=m.head_read / rates.gpu)


# -- which neurons ------------------------------------------------------------------------------


def _divide(
    layers: Sequence[LayerSizes], seconds: Sequence[F64Array], room: I64Array
) -> dict[int, tuple[float, list[int]]]:
    """Divide memory between the neurons of the first k layers, for every k that has room for it.

    room [n_layer + 1]: bytes for the neurons of k layers. Returns the least seconds of these layers
    and their steps, by k. Layer after layer, of all ways to fill the layers so far those are kept
    than which no other is both smaller and faster; all of them, while there are few.
    """
    size, time = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[I64Array, I64Array]] = []  # of each layer: way before, steps of this one
    found = {}
    for k in range(1, int((room >= 0).sum())):
        hot, own = layers[k - 1].hot, seconds[k - 1]
        choices = np.unique(np.linspace(0, len(hot) - 1, _CHOICES).round().astype(np.int64))
        # The layer's last step is worth more than the one before it: t_link.
        choices = np.union1d(choices, [max(len(hot) - 2, 0)])
        sizes = (size[:, None] + hot[choices]).ravel()
        times = (time[:, None] + own[choices]).ravel()
        fits = np.flatnonzero(sizes <= room[1])
        order = fits[np.lexsort((times[fits], sizes[fits]))]
        faster = np.minimum.accumulate(times[order])
        order = order[np.diff(faster, prepend=np.inf) < 0]
        if len(order) > _STATES:
            # One of each part; and the smallest, all that fits where others leave no room.
            part = sizes[order] * _STATES // (int(room[1]) + 1)
            is_kept = np.append(np.diff(part) > 0, True)
            is_kept[0] = True
            order = order[is_kept]
        size, time = sizes[order], times[order]
        before, choice = np.divmod(order, len(choices))
        trail.append((before, choices[choice]))
        way = int(np.searchsorted(size, room[k], side="right")) - 1
        total, steps = float(time[way]), []
        for before, chosen in reversed(trail):
            steps.append(int(chosen[way]))
            way = int(before[way])
        found[k] = total, steps[::-1]
    return found


def _finish(
    layers: Sequence[LayerSizes], seconds: Sequence[F64Array], steps: Sequence[int], room: int
) -> list[int]:
    """Return the steps in all detail: their layers that are complete stay so.

    The others get theirs one by one, or, where that is slower, more of what they have.
    """
    complete = [s if s + 1 == len(t) else 0 for s, t in zip(steps, seconds, strict=False)]
    ways = [_fill(layers, seconds, start, room) for start in (complete, steps)]
    least = min(ways, key=lambda way: sum(float(t[s]) for t, s in zip(seconds, way, strict=False)))
    return _sorted(layers, least)


def _fill(
    layers: Sequence[LayerSizes], seconds: Sequence[F64Array], steps: Sequence[int], room: int
) -> list[int]:
    """Use what is left of `room` bytes, by seconds saved and then by activations, per byte."""
    steps = list(steps)
    room -= sum(int(layer.hot[s]) for layer, s in zip(layers, steps, strict=False))
    queue: list[tuple[float, float, int, int]] = []

    def offer(il: int) -> None:
        s, layer = steps[il], layers[il]
        if s + 1 < len(layer.hot):
            size = int(layer.hot[s + 1] - layer.hot[s])
            saved = float(seconds[il][s + 1] - seconds[il][s]) / size
            heapq.heappush(
                queue, (saved, float(layer.served[s] - layer.served[s + 1]) / size, il, size)
            )

    for il in range(len(steps)):
        offer(il)
    while queue:
        *_, il, size = heapq.heappop(queue)
        if size <= room:
            room -= size
            steps[il] += 1
            offer(il)
    return steps


def _sorted(layers: Sequence[LayerSizes], steps: list[int]) -> list[int]:
    """Among layers of the same sizes let the first have most: the same placement, in order."""
    alike: dict[bytes, list[int]] = {}
    for il, layer in enumerate(layers[: len(steps)]):
        key = layer.hot.tobytes() + layer.hot_read.tobytes() + layer.cold_read.tobytes()
        alike.setdefault(key, []).append(il)
    for group in alike.values():
        for il, s in zip(group, sorted((steps[il] for il in group), reverse=True), strict=True):
            steps[il] = s
    return steps
