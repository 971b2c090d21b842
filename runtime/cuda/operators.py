"""The operators of backend.Backend on a GPU, and on the CPU what a placement leaves there.

The hybrid: of a layer's FFN the GPU has some blocks of neurons (slot tables), the CPU the others.
The FFN's input goes to pinned memory as it is made, and, as soon as it is known who is predicted,
what the CPU has to do. The GPU goes on with its own rows while the CPU does its part, which is
added at the end. Layers wholly on the CPU are the last ones: x goes there once, and comes back for
the head.

A token on its own is replayed as graphs, cut where the host has something to do (tape.py,
ahead.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Plan, Residency
from ..cpu.operators import CPU
from ..cpu.rows import SLACK
from ..footprint import BLOCK, workspace
from ..formats import U8Array
from ..plan import Placement
from ..step import COUNTS
from .ahead import AheadTape
from .builder import Builder
from .device import Device, Slab, Uploader
from .launches import Launches, LayerLaunches, blocks_in
from .loading import Loader
from .replace import BlockResidency, Replacer
from .streaming import Streaming
from .tape import Tape


class CUDA:
    """Runs a plan on a device; all that it allocates there is in the placement's budget.

    `threads`: of the CPU; `notify` is told what takes long, `progress` the bytes of every upload.
    DeviceError where the device fails.
    """

    name = "cuda"

    def __init__(
        self,
        plan: Plan,
        placement: Placement,
        device: Device,
        threads: int | None = None,
        notify: Callable[[str], Any] = lambda _: None,
        progress: Callable[[int], Any] = lambda _: None,
    ) -> None:
        self.plan, self.placement, self.device = plan, placement, device
        c, step = plan.config, plan.step
        self._n_gpu = placement.gpu_layers
        assert self._n_gpu, "without layers on the GPU it is the CPU backend's"
        # What both sides touch is pinned memory, before the CPU's argument blocks point at it.
        self._host_at = plan.buffers.relocate(self._pinned)
        self._part, part_at = self._pinned(plan.buffers.x.shape, np.float32)
        self._cold, cold_at = self._pinned((c.n_ff + SLACK,), np.int32)
        self._n_cold, n_cold_at = self._pinned((2,), np.int32)
        self._counted, self._counted_at = self._pinned(plan.buffers.counts.shape, np.int64)
        self.cpu = CPU(plan, threads, notify)

        stream = device.stream()
        self._tape = (
            AheadTape(stream, self.cpu.pool, device, notify)
            if device.has_wait_value
            else Tape(stream, self.cpu.pool)
        )
        self._slab = Slab(device, placement.slab)
        stream.memset(self._slab.address, 0, self._slab.size)
        load = Loader(self._slab, Uploader(device, stream, progress))
        sizes = len(step.tokens), len(step.outputs), len(step.pages), len(plan.rope)
        arrays = workspace(plan.weights, c, plan.mode, *sizes)
        self._at = {
            name: load.take(np.dtype(kind).itemsize * int(np.prod(shape)))
            for name, (kind, shape) in arrays.items()
        }
        # What the CPU's part needs, and what comes of it, goes straight to host memory and back.
        self._at |= {
            "host_mask": self._host_at["mask"],
            "host_list": cold_at,
            "host_listed": n_cold_at,
            "host_h": self._host_at["h"],
            "host_part": part_at,
        }
        self._place_step()
        rope, rope_at = self._pinned(plan.rope.shape, np.float32)
        rope[:] = plan.rope
        stream.copy(self._at["rope"], rope_at, rope.nbytes)
        builder = Builder(plan, load, self._at)
        self._layers = [
            builder.layer(il, place) for il, place in enumerate(placement.layers[: self._n_gpu])
        ]
        self._head = builder.head()
        self._embed = builder.embed() if placement.has_embedding else None
        self._replacer = Replacer(
            device,
            stream,
            [layer.resident for layer in self._layers],
            [place.slot_table() for place in placement.layers[: self._n_gpu]],
            self._at["heat"],
        )
        self._streaming = Streaming(
            plan, placement, device, stream, self._slab, self._at, builder, self._layers
        )
        load.finish()
        parts = [il for il, layer in enumerate(self._layers) if layer.has_cold]
        self.cpu.be_part(parts, self._cold, self._n_cold, self._part)

        self._is_capturing = False
        self._is_running = False  # whether there may be work that has not been waited for
        self._x_is_there = True  # on the device, as far as operators have been called
        self._il = 0  # the layer whose operators were called last
        self._has_scores = True  # on the device; else take_mask() has replaced them
        self._predicted = np.zeros((0, 0), bool)  # what show() has found in mask
        self._counts_added = np.zeros_like(self._counted)
        self._head_of_one = self._captured(lambda: self._run_head(1))

    # -- memory -----------------------------------------------------------------------------------

    @functools.cached_property
    def _watched(self) -> dict[str, tuple[np.ndarray, int]]:
        """What watchers look at or change and nobody else copies, as it is on the device.

        Much memory, and only needed where somebody watches.
        """
        n_ff, n_tok = self.plan.config.n_ff, len(self.plan.step.tokens)
        return {
            "scores": self._pinned((n_tok, n_ff), np.float32),
            "fired": self._pinned((n_tok, n_ff), np.uint8),
            "act": self._pinned((n_tok, -(-n_ff // BLOCK) * BLOCK), np.float32),
            "list": self._pinned((n_tok, n_ff), np.int32),
            "listed": self._pinned((n_tok,), np.int32),
        }

    def _pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, int]:
        """Return zeros in host memory that the device sees, and their address there."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory, address = self.device.pinned(max(size, 1))
        return memory[:size].view(dtype).reshape(shape), address

    def _place_step(self) -> None:
        """Divide the device's copy of the Step: its integers lie one after the other."""
        step, offset = self.plan.step, 0
        self._step_parts: list[np.ndarray] = []
        for name in ("counts", "tokens", "positions", "rows", "outputs"):
            self._at[name] = self._at["step"] + 4 * offset
            self._step_parts.append(getattr(step, name))
            offset += len(self._step_parts[-1])
        self._step, self._step_at = self._pinned((offset,), np.int32)
        self._pages, self._pages_at = self._pinned(step.pages.shape, np.int32)
        self._thresholds, self._thresholds_at = self._pinned(step.thresholds.shape, np.float32)

    def _send_step(self) -> None:
        def fill() -> None:
            np.concatenate(self._step_parts, out=self._step)
            self._pages[:] = self.plan.step.pages
            self._thresholds[:] = self.plan.step.thresholds

        tape, at = self._tape, self._at
        tape.host(fill)
        tape.copy(at["step"], self._step_at, self._step.nbytes)
        tape.copy(at["pages"], self._pages_at, self._pages.nbytes)
        tape.copy(at["thresholds"], self._thresholds_at, self._thresholds.nbytes)

    def _up(self, name: str) -> None:
        """Copy a host buffer's rows of the step's tokens to the device."""
        row = getattr(self.plan.buffers, name)[0].nbytes
        self._tape.copy(self._at[name], self._host_at[name], row * self._n)

    def _down(self, name: str) -> None:
        """Copy the device's rows of the step's tokens to a host buffer."""
        row = getattr(self.plan.buffers, name)[0].nbytes
        self._tape.copy(self._host_at[name], self._at[name], row * self._n)

    def _wait(self) -> None:
        """Let the host wait for all that has been queued."""
        self._tape.mark("now")
        self._tape.wait("now")

    # -- running ----------------------------------------------------------------------------------

    @property
    def _n(self) -> int:
        """How many tokens the step has: one while a graph is captured."""
        return 1 if self._is_capturing else self.plan.step.n_tok

    def _run(self, launches: Launches, n: int | None = None) -> None:
        n = self._n if n is None else n
        for launch in launches.one if n == 1 else launches.many:
            self._tape.launch(launch.kernel, launch.grid(n), launch.block, launch.args)

    def _layer(self, il: int) -> LayerLaunches | None:
        """Return the layer's launches; None where the CPU has the layer, and x is there by now."""
        self._il = il
        if il < self._n_gpu:
            return self._on_gpu(il)
        if self._x_is_there:
            self._x_is_there = False
            self._down("x")
            self._wait()
        return None

    def _on_gpu(self, il: int) -> LayerLaunches:
        """Return a layer's launches for as many tokens as the step has."""
        return self._streaming.launches(il, self._n) or self._layers[il]

    def residency(self) -> BlockResidency | None:
        return self._replacer.residency() if self.plan.mode == "predicted" else None

    def use(self, text: Residency | None) -> None:
        assert text is None or isinstance(text, BlockResidency), "of another backend"
        self._replacer.use(text, self._n)

    def embed(self) -> None:
        self._tape.host(self._begin)
        self._x_is_there = True
        if self._embed is None:
            self._tape.host(self.cpu.embed)
        self._send_step()
        self._tape.memset(self._at["counted"], 0, self._counted.nbytes)
        if self._embed is not None:
            self._run(self._embed)
        else:
            self._up("x")

    def _begin(self) -> None:
        if self._is_running:  # after Ctrl-C, an error: buffers may still be in use
            self._tape.stream.synchronize()
        self._is_running = True
        self._tape.begin()
        self._counts_added[:] = 0

    def qkv(self, il: int) -> None:
        layer = self._layer(il)
        if layer is None:
            self.cpu.qkv(il)
        else:
            self._run(layer.qkv)

    def attend(self, il: int) -> None:
        layer = self._layer(il)
        if layer is None:
            self.cpu.attend(il)
        else:
            self._run(layer.attend)

    def out_add(self, il: int) -> None:
        layer = self._layer(il)
        if layer is None:
            self.cpu.out_add(il)
        else:
            self._run(layer.out_add)

    def ffn_norm(self, il: int) -> None:
        layer = self._layer(il)
        if layer is None:
            self.cpu.ffn_norm(il)
            return
        self._run(layer.ffn_norm)
        if self.plan.mode != "predicted":
            self._divide(layer, layer.compact)
        elif layer.has_cold:
            self._tape.mark_early("h")

    def predict(self, il: int) -> None:
        layer = self._layer(il)
        if layer is None:
            self.cpu.predict(il)
            return
        self._run(layer.predict)
        self._has_scores = True
        self._divide(layer, layer.compact)

    def _divide(self, layer: LayerLaunches, compact: Launches) -> None:
        """List the neurons of the device, and let the CPU have the others."""
        self._run(compact)
        if layer.has_cold:
            self._tape.mark("cold")

    def take_mask(self, il: int) -> None:
        layer = self._layer(il)
        if layer is None or self.plan.mode != "predicted":
            return
        n, b = self._n, self.plan.buffers
        mask, before = b.mask[:n] != 0, self._predicted
        # Rows of the mask that it was have been counted.
        slot, is_streamed = self._replacer.slots[il], layer is self._layers[il].streamed
        here = np.repeat((slot >= 0) | is_streamed, BLOCK)[: mask.shape[1]]
        rows = np.count_nonzero(mask[:, here]) - np.count_nonzero(before[:, here])
        b.counts[il, COUNTS.index("decider")] += rows
        # As scores, which nobody asks for any more: beyond every threshold, or below.
        scores, address = self._watched["scores"]
        scores[:n] = np.where(mask, np.inf, -np.inf)
        self._tape.copy(self._at["scores"], address, scores[:n].nbytes)
        self._has_scores = False
        self._divide(layer, layer.recompact)

    def ffn(self, il: int) -> None:
        layer = self._layer(il)
        if layer is None:
            self.cpu.ffn(il)
            return
        self._run(layer.ffn)
        if layer is self._layers[il].streamed:
            self._streaming.run(il, self._replacer.slots[il], self._n)
        self._run(layer.ffn_add)
        if layer.has_cold:
            early = "h" if self.plan.mode == "predicted" else "cold"
            part = functools.partial(self.cpu.ffn_part, il, self._tape.exchange("cold", early))
            if self._is_capturing:
                self._tape.jobs(self.cpu.calls(part))
            else:
                part()
            self._tape.resume("cold")
            self._run(layer.add_cold)

    def audit(self, il: int) -> None:
        # Now and then, of one token: the CPU has all rows of the decider, and show() has been
        # called.
        self.cpu.audit(il)

    def head(self) -> None:
        self._is_running = True
        n = self.plan.step.n_out
        if self._n_gpu < len(self.plan.weights.layers):
            self._up("x")
        if n == 1:
            self._head_of_one()
        else:
            self._run_head(n)

    def _run_head(self, n: int) -> None:
        self._send_step()
        self._run(self._head, n)
        row = self.plan.buffers.logits[0].nbytes
        self._tape.copy(self._host_at["logits"], self._at["logits"], row * n)

    # -- between host and device ------------------------------------------------------------------

    def show(self) -> None:
        if self._il >= self._n_gpu:
            return
        n, b, layer = self._n, self.plan.buffers, self._on_gpu(self._il)
        is_streamed = layer is self._layers[self._il].streamed
        is_predicted = self.plan.mode == "predicted"
        for name, is_wanted in (
            ("x", True),
            ("h", True),
            ("scores", is_predicted and self._has_scores),
            ("mask", is_predicted),
        ):
            if is_wanted:
                self._down(name)
        for name in ("fired", "act", "list", "listed"):
            array, address = self._watched[name]
            is_whole = is_streamed and name == "act"  # windows have their parts of it
            self._tape.copy(address, self._at[name], (array if is_whole else array[:n]).nbytes)
        self._wait()
        if is_predicted and self._has_scores:
            self._predicted = b.mask[:n] != 0
        self.cpu.pack_h()  # for audits
        fired, act = self._watched["fired"][0][:n], self._watched["act"][0].reshape(-1)
        if layer.has_cold:  # the CPU has set those of its own neurons
            np.maximum(b.fired[:n], fired, out=b.fired[:n])
        else:
            b.fired[:n] = fired
        if n == 1:  # act is in the order of the list
            listed = self._watched["list"][0][0, : self._watched["listed"][0][0]]
            b.act[0, listed] = act[: len(listed)]
        else:  # of whole blocks, in the order of their places
            slot = self._replacer.slots[self._il]
            windows = self._streaming.windows(self._il, slot) if is_streamed else ()
            for place, blocks in ((0, blocks_in(slot)), *windows):
                neurons = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
                exists = neurons < b.act.shape[1]
                part = act[BLOCK * place * len(self.plan.step.tokens) :][: n * len(neurons)]
                b.act[:n, neurons[exists]] = part.reshape(n, -1)[:, exists]

    def finish(self) -> None:
        if not self._is_running:
            return
        stream = self._tape.stream
        stream.copy(self._counted_at, self._at["counted"], self._counted.nbytes)
        stream.synchronize()
        self._is_running = False
        new = self._counted - self._counts_added
        for il in range(self._n_gpu):
            if self._on_gpu(il).has_cold:  # the CPU has counted the tokens
                new[il, 0] = 0
        self.plan.buffers.counts += new
        self._counts_added[:] = self._counted

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        def split() -> None:
            # The CPU's layers are the last ones: what they do comes after all else.
            calls = self.cpu.calls(run)
            if self._n_gpu < len(self.plan.weights.layers):
                self._tape.jobs(calls)

        return self._captured(split)

    def _captured(self, run: Callable[[], Any]) -> Callable[[], None]:
        self._is_capturing = True
        try:
            return self._tape.capture(run)
        finally:
            self._is_capturing = False

    def bound(self, data: U8Array, nbytes: float, tokens: float) -> float:
        # What a token reads lies in two places, and was measured when they were chosen.
        return self.placement.bound_at(tokens).tokens_per_second

    def close(self) -> None:
        self.cpu.close()
        self.device.close()
