"""Long prompts: a layer's neurons that are not resident pass through two windows on the device.

While one window is being multiplied, the next one's rows are repacked into pinned memory and
copied to the other, on a stream of their own. The sums go to where the resident neurons' are, so
nothing is left for the CPU to do.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Mapping

import numpy as np

from ..backend import Plan
from ..footprint import BLOCK, neuron_tensors, planes, window_bytes
from ..plan import Placement
from ..weights import Layer
from .builder import Builder
from .device import Device, Event, Slab, Stream, Uploader, aligned
from .launches import ADD, STORE, Launch, LayerLaunches, Window
from .loading import Loader, device_matrix

# Products that a desktop's CPU does (250e9 a second) while a byte is repacked and crosses the bus
# (4e9). The bytes cross once for all tokens, so from some number of tokens on that is faster: 36
# with q4_0, 128 with f16. Not by a timing: a text's numbers must be the same in every run.
PRODUCTS_PER_BYTE = 64


def least_tokens(layer: Layer) -> int:
    """Return from how many tokens on a layer is streamed; a token alone has lists, not masks."""
    weights = sum(BLOCK * tensor.cols for tensor in neuron_tensors(layer))
    nbytes = sum(sum(planes(t.type, BLOCK, t.cols)) for t in neuron_tensors(layer))
    return max(-(-PRODUCTS_PER_BYTE * nbytes // weights), 2)


class Streaming:
    """The two windows, and what is launched on them.

    `layers`: launches of the layers on the GPU; `at`: addresses of footprint.workspace's arrays.
    `stream` is the one that all else is queued on.
    """

    def __init__(
        self,
        plan: Plan,
        placement: Placement,
        device: Device,
        stream: Stream,
        slab: Slab,
        at: Mapping[str, int],
        builder: Builder,
        layers: list[LayerLaunches],
    ) -> None:
        self._n_ff, self._n_tok_max = plan.config.n_ff, len(plan.step.tokens)
        self._layers, self._builder, self._act = layers, builder, at["act"]
        self._weights = plan.weights.layers
        nbytes = placement.bytes["windows"] // 2
        self._slab, self._device, self._nbytes = slab, device, nbytes
        self._at = [slab.take(nbytes) for _ in range(2)]
        self._stream, self._copies = stream, device.stream()
        self._was_read: list[Event | None] = [None, None]  # after the last launch on each window
        self._turn = 0
        self._least = [least_tokens(layer) for layer in self._weights]
        self._fitting = [self._fits(il) for il in range(len(self._weights))]
        self._made: dict[tuple[int, int, int], tuple[Window, list[Launch]]] = {}

    @functools.cached_property
    def _load(self) -> Loader:
        """What copies to the windows: as much pinned memory as they are, once it is needed."""
        return Loader(self._slab, Uploader(self._device, self._copies, nbytes=self._nbytes))

    def _fits(self, il: int) -> int:
        """Return how many blocks of a layer a window has room for."""
        size = functools.partial(window_bytes, self._weights[il])
        return bisect_right(range(1, -(-self._n_ff // BLOCK) + 1), self._nbytes, key=size)

    def launches(self, il: int, n_tok: int) -> LayerLaunches | None:
        """Return the launches around run(), where so many tokens are worth it; else None."""
        return self._layers[il].streamed if n_tok >= self._least[il] else None

    def windows(self, il: int, slot: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the blocks of each window, and their place in act: behind those before them.

        `slot`: int32 [blocks of the layer], -1 for those that are not resident. act of a window
        that begins at place p lies BLOCK * p * n_tok_max behind the start, [n_tok][its blocks].
        """
        cold, step = np.flatnonzero(slot < 0).astype(np.int32), self._fitting[il]
        for first in range(0, len(cold), step):
            yield len(slot) - len(cold) + first, cold[first : first + step]

    def run(self, il: int, slot: np.ndarray, n_tok: int) -> None:
        """Add to the resident neurons' sums those of all others.

        The host waits for room in pinned memory at most; what it is ahead of, the device finds
        in order.
        """
        for place, blocks in self.windows(il, slot):
            turn, self._turn = self._turn, 1 - self._turn
            window, launches = self._window(il, place, len(blocks), turn)
            was_read = self._was_read[turn]
            if was_read is not None:
                self._copies.wait(was_read)
            self._send(window, blocks)
            self._stream.wait(self._copies.record())
            for launch in launches:
                self._stream.launch(launch.kernel, launch.grid(n_tok), launch.block, launch.args)
            self._was_read[turn] = self._stream.record()

    def _window(self, il: int, place: int, n: int, turn: int) -> tuple[Window, list[Launch]]:
        """Divide a window among what `n` blocks of a layer have, and fill its launches."""
        key = il, place, turn
        if key not in self._made:
            end = self._at[turn]

            def take(nbytes: int) -> int:
                nonlocal end
                end += aligned(nbytes)
                return end - aligned(nbytes)

            window = Window(
                il,
                n,
                take(4 * n),
                [
                    device_matrix(tensor.type, n * BLOCK, tensor.cols, take)
                    for tensor in neuron_tensors(self._weights[il])
                ],
                self._layers[il].resident.biases,
                self._act + 4 * BLOCK * place * self._n_tok_max,
            )
            assert end <= self._at[turn] + self._nbytes
            # Where nothing is resident, nobody has begun the sums.
            launches = self._builder.window(window, ADD if place else STORE)
            self._made[key] = window, launches
        return self._made[key]

    def _send(self, window: Window, blocks: np.ndarray) -> None:
        """Queue the copies of all that a window has of some blocks, ascending."""
        self._load.fill(window.block_neuron, blocks)
        tensors = neuron_tensors(self._weights[window.il])
        neighbours = np.split(np.arange(len(blocks)), np.flatnonzero(np.diff(blocks) != 1) + 1)
        for places in neighbours:
            first = BLOCK * int(blocks[places[0]])
            count = min(BLOCK * len(places), self._n_ff - first)
            for matrix, tensor in zip(window.matrices, tensors, strict=True):
                self._load.rows(matrix, tensor, BLOCK * int(places[0]), first, count)
