"""Fills what operators launch, once per layer, and uploads the weights that it works on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Plan
from ..config import POSITION_OFFSET
from ..footprint import BLOCK, DOWN_SPLITS, attention_blocks, attention_splits, device_type
from ..formats import INTEGER_DOT
from ..gguf import Tensor
from ..plan import LayerPlacement
from ..weights import Layer
from . import arguments
from .launches import (
    ACTIVATIONS,
    ADD,
    STORE,
    STORE_RELU,
    Launch,
    Launches,
    LayerLaunches,
    Resident,
    Window,
    blocks_in,
)
from .loading import DeviceMatrix, Loader

TILE_ROWS, TILE_TOKENS = 64, 128  # gemm.cuh, TILE_ROWS and MANY
_ROW_BLOCKS = 1024  # of 8 warps each, that take the neurons of a list in turn
_UNITS = {"q4_0": 32, "q8_0": 16, "q6_k": 64, "f16": 8, "f32": 4}  # formats.cuh, UNIT
_NOTHING = DeviceMatrix(0, 0, 0, 0, "")


@dataclass(frozen=True)
class _Input:
    """Activations on the device: float32 [n_tok, cols], and the addresses of Packed."""

    x: int
    packed: tuple[int, int, int]


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _launch(kernel: str, grid: Callable[[int], tuple[int, ...]], **values: Any) -> Launch:
    return Launch(kernel, grid, arguments.fill(kernel, **values))


def _always(*launches: Launch) -> Launches:
    """Return launches that serve any number of tokens."""
    return Launches(launches, launches)


class Builder:
    """Uploads weights and fills the launches that work on them.

    `at`: addresses of footprint.workspace's arrays and of the Step's.
    """

    def __init__(self, plan: Plan, load: Loader, at: Mapping[str, int]) -> None:
        self._plan, self._load, self._at = plan, load, at
        self._kv = "f32" if plan.cache.k.dtype == np.float32 else "f16"
        self._output: DeviceMatrix | None = None

    def layer(self, il: int, place: LayerPlacement) -> LayerLaunches:
        """Return a layer's launches."""
        at, load, layer = self._at, self._load, self._plan.weights.layers[il]
        cache_bytes = self._plan.cache.k[il].nbytes
        cache = {"k_cache": load.take(cache_bytes), "v_cache": load.take(cache_bytes)}
        has_cold, resident = place.slots < place.n_blocks, self._resident(layer, place)
        is_predicted = self._plan.mode == "predicted"
        a = self._input("a")
        out = self._product(load.matrix(layer.wo), a, at["x"], ADD, layer.bo)
        neurons, add = self._neurons(il, layer, place, resident)
        h, host_h = self._input("h"), at["host_h"] if has_cold else 0
        launches = LayerLaunches(
            qkv=self._qkv(layer, cache),
            attend=self._attend(cache, layer.wo),
            out_add=Launches([], self._packed(a, layer.wo.cols, layer.wo).many) + out,
            ffn_norm=self._norm(layer.ffn_norm, layer.ffn_norm_bias, h, host=host_h),
            predict=self._predict(layer) if is_predicted else Launches(),
            compact=self._compact(
                layer, il, resident.slot, has_cold, self._counters(il), self._heat(il)
            ),
            recompact=self._compact(layer, il, resident.slot, has_cold, 0, 0),
            ffn=neurons,
            ffn_add=add,
            add_cold=self._add(0, 0, other=at["host_part"]) if has_cold else Launches(),
            has_cold=has_cold,
            resident=resident,
            streamed=None,
        )
        if not has_cold or layer.down_t is None:
            return launches
        every = at["every_slot"]
        streamed = dataclasses.replace(
            launches,
            ffn_norm=launches.ffn_norm.with_argument("host_h", 0),
            compact=self._compact(layer, il, every, False, self._counters(il), self._heat(il)),
            recompact=self._compact(layer, il, every, False, 0, 0),
            ffn_add=add.with_argument("n_parts", 1),
            has_cold=False,
        )
        return dataclasses.replace(launches, streamed=streamed)

    def window(self, window: Window, op: int) -> list[Launch]:
        """Return what several tokens launch: down_parts (op) what the window's neurons give."""
        return [*self._window_rows(window), self._window_down(window, op)]

    def head(self) -> Launches:
        """Return the launches of the tokens in Step.outputs."""
        w, at, normed = self._plan.weights, self._at, self._input("normed")
        norm = self._norm(w.output_norm, w.output_norm_bias, normed, of_outputs=True)
        self._output = self._load.matrix(w.output)
        product = self._product(self._output, normed, at["logits"], STORE, of_outputs=True)
        return norm + product

    def embed(self) -> Launches:
        """Return the launches of the embedding; after head(), with which it may be tied."""
        w, at, n_embd = self._plan.weights, self._at, self._plan.config.n_embd
        is_tied = w.embd.name == w.output.name and self._output is not None
        embd = self._output if is_tied else self._load.matrix(w.embd)
        assert embd is not None
        table = 0 if w.positions is None else self._load.array(w.positions.float32())
        return _always(
            _launch(
                f"embed_{embd.suffix}",
                lambda n: (_parts(n_embd, 1024), n),
                counts=at["counts"],
                tokens=at["tokens"],
                positions=at["positions"],
                embd=embd,
                table=table,
                offset=POSITION_OFFSET,
                x=at["x"],
            )
        )

    # -- pieces -----------------------------------------------------------------------------------

    def _input(self, name: str) -> _Input:
        at = self._at
        return _Input(at[name], (at[f"{name}_q"], at[f"{name}_d"], at[f"{name}_s"]))

    def _product(
        self,
        w: DeviceMatrix,
        x: _Input,
        y: int,
        op: int,
        *biases: Tensor | None,
        y_stride: int | None = None,
        of_outputs: bool = False,
        packed: tuple[int, int, int] | None = None,
        rope: Mapping[str, Any] | None = None,
    ) -> Launches:
        """y (op) x @ w^T + biases, one behind the other.

        `y_stride`: floats from one row of y to the next, if those have more than these rows of w.
        Of one token only: `packed`: where y goes, rounded, too; `rope`: y is q, k and v, for which
        all is done that a Rope says.
        """
        values = {
            "w": w,
            "x": x.x,
            "x_packed": x.packed,
            "bias": self._load.floats(*biases),
            "y": y,
            "y_stride": y_stride or w.rows,
            "op": op,
        }
        many = _launch(
            f"gemm_{w.suffix}",
            lambda n: (_parts(w.rows, TILE_ROWS), _parts(n, TILE_TOKENS)),
            n_tok=self._counts(of_outputs),
            **values,
        )
        if packed is not None:
            name, both = f"gemv_packed_{w.suffix}", {"product": values, "packed": packed}
            one = _launch(name, lambda n: (w.rows // 32, n), **both)
        elif rope is not None:
            name, both = f"gemv_rope_{w.suffix}_{self._kv}", {"product": values, "rope": rope}
            one = _launch(name, lambda n: (_parts(w.rows, 8), n), **both)
        else:
            one = _launch(f"gemv_{w.suffix}", lambda n: (_parts(w.rows, 8), n), **values)
        return Launches([one], [many])

    def _counts(self, of_outputs: bool) -> int:
        """Return where the number of tokens is: of all, or of those that logits are wanted of."""
        return self._at["counts"] + (4 if of_outputs else 0)

    def _norm(
        self,
        weight: Tensor,
        bias: Tensor | None,
        to: _Input,
        of_outputs: bool = False,
        host: int = 0,
    ) -> Launches:
        """to = norm of x, rounded too; `host`: where the CPU wants it, or 0."""
        c = self._plan.config
        return _always(
            _launch(
                "norm_rows",
                lambda n: (n,),
                counts=self._counts(of_outputs),
                index=self._at["outputs"] if of_outputs else 0,
                x=self._at["x"],
                weight=self._load.floats(weight),
                bias=self._load.floats(bias),
                n=c.n_embd,
                is_layer=int(c.traits.norm == "layer"),
                eps=c.norm_eps,
                h=to.x,
                host_h=host,
                packed=to.packed if c.n_embd % 32 == 0 else (0, 0, 0),
            )
        )

    def _packed(self, x: _Input, cols: int, weight: Tensor) -> Launches:
        """Round activations for a weight that wants it, where no kernel does as it makes them."""
        if device_type(weight.type) not in INTEGER_DOT:
            return Launches()
        values = {"x": x.x, "cols": cols, "packed": x.packed, "counts": self._at["counts"]}
        return _always(_launch("pack", lambda n: (_parts(cols, 256), n), **values))

    def _where(self) -> dict[str, int]:
        """Return what says where a token is in the cache."""
        names = ("counts", "rows", "positions", "pages")
        return {n: self._at[n] for n in names} | {"pages_cols": self._plan.step.pages.shape[1]}

    def _heads(self) -> dict[str, int]:
        c = self._plan.config
        return {"n_head": c.n_head, "n_head_kv": c.n_head_kv, "head_dim": c.head_dim}

    def _qkv(self, layer: Layer, cache: dict[str, int]) -> Launches:
        c, at, normed = self._plan.config, self._at, self._input("normed")
        launches = self._norm(layer.attn_norm, layer.attn_norm_bias, normed)
        parts = ((layer.wq, layer.bq), (layer.wk, layer.bk), (layer.wv, layer.bv))
        width, first = sum(weight.rows for weight, _ in parts), 0
        # One product of what has one format: a matrix on its own is too small to keep a GPU busy.
        groups = [
            list(group)
            for _, group in itertools.groupby(parts, lambda part: (part[0].type, part[1] is None))
        ]
        rope = {
            "table": at["rope"],
            "half": self._plan.rope.shape[2],
            "is_neox": int(c.traits.rope == "neox"),
            **self._where(),
            **self._heads(),
            **cache,
        }
        for group in groups:
            weights, biases = zip(*group, strict=True)
            w, y = self._load.matrix(*weights), at["qkv"] + 4 * first
            alone = rope if len(groups) == 1 else None
            launches += self._product(w, normed, y, STORE, *biases, y_stride=width, rope=alone)
            first += w.rows
        append = _launch(
            f"rope_append_{self._kv}",
            lambda n: (c.n_head + 2 * c.n_head_kv, n),
            q=at["qkv"],
            k=at["qkv"] + 4 * layer.wq.rows,
            v=at["qkv"] + 4 * (layer.wq.rows + layer.wk.rows),
            **dict.fromkeys(("q_stride", "k_stride", "v_stride"), width),
            rope=rope,
        )
        return launches + Launches([append] if len(groups) > 1 else [], [append])

    def _attend(self, cache: dict[str, int], wo: Tensor) -> Launches:
        """Softmax over the cache; of one token rounded, too, where wo wants it."""
        c, at = self._plan.config, self._at
        group, a = c.n_head // c.n_head_kv, self._input("a")
        q_dim, kv_dim = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        query = {"q": at["qkv"], "q_stride": q_dim + 2 * kv_dim, "scale": c.head_dim**-0.5}
        reads = {**self._where(), **self._heads(), **cache, **query}
        partial = ("sums", "peaks", "totals", "tickets")
        # Where blocks of 32 numbers lie within a head.
        packs = device_type(wo.type) in INTEGER_DOT and c.head_dim % 32 == 0

        def split(packed: tuple[int, int, int]) -> Launch:
            return _launch(
                f"attend_split_{self._kv}",
                lambda n: (attention_splits(c), attention_blocks(c), n),
                group=group,
                a=a.x,
                packed=packed,
                **reads,
                **{name: at[f"attention_{name}"] for name in partial},
            )

        per_tile = 16 if c.head_dim > 128 else 32
        tile = _launch(
            f"attend_tile_{self._kv}",
            lambda n: (_parts(n * group, per_tile), c.n_head_kv),
            **reads,
            a=a.x,
        )
        one = [split(a.packed)] if packs else [split((0, 0, 0)), *self._packed(a, q_dim, wo).one]
        # Of a pass of one text either it is the only token, or none is the only one of its text.
        alone = [] if len(self._plan.step.pages) == 1 else [split((0, 0, 0))]
        return Launches(one, [*alone, tile])

    def _predict(self, layer: Layer) -> Launches:
        c, at = self._plan.config, self._at
        assert layer.fc1 is not None and layer.fc2 is not None
        fc1, fc2 = self._load.matrix(layer.fc1), self._load.matrix(layer.fc2)
        hidden, x, before = self._input("hidden"), self._input("h"), Launches()
        if c.predictor_input == "residual":
            x = self._input("x")
            before = self._packed(x, c.n_embd, layer.fc1)
        is_rounded = device_type(layer.fc2.type) in INTEGER_DOT
        packed = hidden.packed if is_rounded else None
        first = self._product(fc1, x, hidden.x, STORE_RELU, packed=packed)
        between = Launches([], self._packed(hidden, fc1.rows, layer.fc2).many)
        last = self._product(fc2, hidden, at["scores"], STORE, layer.fc2_bias)
        return before + first + between + last

    def _compact(
        self, layer: Layer, il: int, slot: int, has_cold: bool, counters: int, heat: int
    ) -> Launches:
        """mask and lists: of one token, and where several are taken like one.

        What the CPU has to do is a list for one token, a mask for several.
        """
        c, at = self._plan.config, self._at
        listed = {"list": at["list"], "n_list": at["listed"]}
        unwanted = dict.fromkeys((*listed, "cold", "cold_list", "n_cold"), 0)

        def compact(**wanted: int) -> Launch:
            return _launch(
                "compact",
                lambda n: (_parts(c.n_ff, 512), n),
                scores=at["scores"] if self._plan.mode == "predicted" else 0,
                **{name: at[name] for name in ("thresholds", "rows", "mask", "fired")},
                n_tok=at["counts"],
                slot=slot,
                counters=counters,
                heat=heat,
                n_ff=c.n_ff,
                n_layer=c.n_layer,
                il=il,
                **(unwanted | wanted),
            )

        one, many = dict(listed), listed if self._is_taken_singly(layer) else {}
        if has_cold:
            one |= {"cold_list": at["host_list"], "n_cold": at["host_listed"]}
            many = many | {"cold": at["host_mask"]}
        return Launches([compact(**one)], [compact(**many)])

    def _is_taken_singly(self, layer: Layer) -> bool:
        """Whether several tokens are taken one by one: act in whole blocks is no row for down."""
        return layer.down is not None and self._plan.config.n_ff % BLOCK != 0

    def _counters(self, il: int) -> int:
        return self._at["counted"] + 8 * self._plan.buffers.counts.shape[1] * il

    def _heat(self, il: int) -> int:
        """Return where it is counted which blocks are predicted: only where they can be not."""
        n_blocks = _parts(self._plan.config.n_ff, BLOCK)
        return self._at["heat"] + 4 * n_blocks * il if self._plan.mode == "predicted" else 0

    def _resident(self, layer: Layer, place: LayerPlacement) -> Resident:
        """Upload the blocks of neurons that are on the device at first."""
        load, n, table = self._load, place.slots, place.slot_table()
        slot, neuron_of = load.array(table), load.array(blocks_in(table))
        tensors = [t for t in (layer.decider, layer.up, layer.down_t) if t is not None and n]
        return Resident(
            slot,
            neuron_of,
            tuple((load.matrix(t, blocks=n), t) for t in tensors),
            {
                "decider_bias": load.floats(layer.decider_bias),
                "up_bias": load.floats(layer.up_bias),
            },
        )

    def _neurons(
        self, il: int, layer: Layer, place: LayerPlacement, resident: Resident
    ) -> tuple[Launches, Launches]:
        """Return the launches of a layer's resident neurons, and those that add them up to x."""
        c, n = self._plan.config, place.slots
        rows = Launches()
        if n:
            matrices = [matrix for matrix, _ in resident.matrices]
            window = Window(il, n, resident.neuron_of, matrices, resident.biases, self._at["act"])
            rows = self._rows(window, resident.slot)
            if layer.down is None:
                rows += self._down(window, resident.slot)
        if layer.down is None or not n:
            n_parts = (DOWN_SPLITS, 1) if n else (0, 0)
            return rows, self._add(*n_parts, self._load.floats(layer.down_bias))
        # The standard layout: all neurons are there.
        if self._is_taken_singly(layer):
            rows = Launches(rows.one, rows.one)
        act, x = self._input("act"), self._at["x"]
        product = self._product(self._load.matrix(layer.down), act, x, ADD, layer.down_bias)
        return rows, self._packed(act, c.n_ff, layer.down) + product

    def _add(self, one: int, many: int, bias: int = 0, other: int = 0) -> Launches:
        """x += down_parts (one token has `one` of them, several have `many`), bias and other."""
        c, at = self._plan.config, self._at

        def add(n_parts: int) -> Launch:
            return _launch(
                "add_parts",
                lambda n: (_parts(c.n_embd, 64), n),
                **{name: at[name] for name in ("counts", "x")},
                parts=at["down_parts"],
                n_parts=n_parts,
                part_stride=c.n_embd,
                bias=bias,
                other=other,
                n=c.n_embd,
            )

        return Launches([add(one)] if one or bias or other else [], [add(many)])

    def _passes(self, w: Window) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield suffixes and arguments of what makes act: one kernel, or one for each format."""
        c, at, h, decider = self._plan.config, self._at, self._input("h"), w.matrices[0]
        has_up = self._plan.weights.layers[w.il].up is not None
        up = w.matrices[1] if has_up else _NOTHING
        passes = [(decider, up, decider.suffix)]
        if up.suffix not in ("", decider.suffix):
            passes = [(decider, _NOTHING, decider.suffix), (_NOTHING, up, up.suffix)]
        for gate, factor, suffix in passes:
            yield (
                suffix,
                {
                    "decider": gate,
                    "up": factor,
                    "x": h.x,
                    "x_packed": h.packed,
                    "act": w.act,
                    "fired": at["fired"],
                    "counters": self._counters(w.il) if factor is up else 0,
                    "n_ff": c.n_ff,
                    "activation": ACTIVATIONS.index(c.activation),
                    "threshold": c.activation_threshold,
                    **w.biases,
                },
            )

    def _rows(self, w: Window, slot: int) -> Launches:
        """act of the resident neurons."""
        at = self._at
        one = [
            _launch(
                f"ffn_rows_{suffix}",
                lambda n: (min(_parts(w.n_blocks * BLOCK, 8), _ROW_BLOCKS), n),
                slot=slot,
                list=at["list"],
                n_list=at["listed"],
                **values,
            )
            for suffix, values in self._passes(w)
        ]
        return Launches(one, self._window_rows(w))

    def _window_rows(self, w: Window) -> list[Launch]:
        return [
            _launch(
                f"ffn_rows_gemm_{suffix}",
                lambda n: (w.n_blocks, _parts(n, TILE_TOKENS)),
                n_tok=self._at["counts"],
                mask=self._at["mask"],
                block_neuron=w.block_neuron,
                first_block=0,
                n_blocks=w.n_blocks,
                **values,
            )
            for suffix, values in self._passes(w)
        ]

    def _down(self, w: Window, slot: int) -> Launches:
        """down_parts = the resident neurons' sum, in DOWN_SPLITS parts for one token."""
        c, at, down = self._plan.config, self._at, w.matrices[-1]
        unit = 32 * _UNITS[down.suffix]
        one = _launch(
            f"ffn_down_{down.suffix}",
            lambda n: (_parts(c.n_embd, unit), DOWN_SPLITS, n),
            down_t=down,
            slot=slot,
            list=at["list"],
            n_list=at["listed"],
            act=w.act,
            parts=at["down_parts"],
            n_ff=c.n_ff,
        )
        return Launches([one], [self._window_down(w, STORE)])

    def _window_down(self, w: Window, op: int) -> Launch:
        c, at, down = self._plan.config, self._at, w.matrices[-1]
        return _launch(
            f"ffn_down_gemm_{down.suffix}",
            lambda n: (_parts(c.n_embd, TILE_ROWS), _parts(n, TILE_TOKENS)),
            down_t=down,
            act=w.act,
            n_tok=at["counts"],
            y=at["down_parts"],
            block_neuron=w.block_neuron,
            first_block=0,
            n_blocks=w.n_blocks,
            n_ff=c.n_ff,
            op=op,
        )
