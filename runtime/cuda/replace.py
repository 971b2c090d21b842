"""Which blocks of neurons are on the device: at first the file's hottest, then those of a text.

The device counts how many neurons of each block are predicted, resident or not. Every TURN tokens
of a text that is being written, blocks that were in demand take the places of blocks that were not,
where that pays for the copy. It depends on the text's own masks alone, so a run repeats exactly.
Where a text has its blocks is the text's own matter: others, and all that runs frozen, find the
device as it was at first. The CPU has all neurons anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from ..footprint import BLOCK, device_bytes
from .device import Device, Slab, Stream, Uploader
from .launches import Resident, blocks_in
from .loading import Loader

TURN = 32  # tokens from one look to the next: the only time that the host waits for the counts
HALF_LIFE = 256  # tokens after which a count weighs half
DOUBT = 64  # tokens without any demand that every text starts with: few tokens prove little
# A copy brings BLOCK rows over the bus, which is hardly faster than the CPU's memory; what it saves
# is rows that the CPU reads. A swap should save COST times what it takes while its reason lasts.
COST, HORIZON = 4.0, HALF_LIFE
MOST = 8 << 20  # bytes that move in a turn, or one block: a few ms of the host's time
STAGING = 1 << 20  # bytes of one of two buffers


class BlockResidency:
    """The blocks that one text has on the device, and how often it has needed each.

    `slots`: tables as of LayerPlacement, for each layer; they change only in take_turn().
    """

    def __init__(self, first: Sequence[np.ndarray]) -> None:
        self.slots = [slot.copy() for slot in first]
        self.counted = np.zeros((len(first), len(first[0])), np.int64)  # since the last turn
        self.n_tok = 0  # since the last turn
        self.is_due = False
        self._heat, self._weight = np.zeros(self.counted.shape), float(DOUBT)

    def settle(self) -> None:
        """Say that blocks may be swapped before the next pass.

        Not within a prompt: how it was cut must not matter.
        """
        self.is_due = self.n_tok >= TURN

    def take_turn(self, block_bytes: Sequence[int]) -> None:
        """Choose the swaps that pay most; `block_bytes`: of a block of each layer."""
        fade = 0.5 ** (self.n_tok / HALF_LIFE)
        self._heat = self._heat * fade + self.counted
        self._weight = self._weight * fade + self.n_tok
        self.counted[:], self.n_tok, self.is_due = 0, 0, False
        found = []
        for il, (slot, rate) in enumerate(zip(self.slots, self._heat / self._weight, strict=True)):
            absent, there = np.flatnonzero(slot < 0), np.flatnonzero(slot >= 0)
            coming = absent[np.argsort(-rate[absent], kind="stable")]
            going = there[np.argsort(rate[there], kind="stable")]
            for new, old in zip(coming, going, strict=False):
                saved = float(rate[new] - rate[old])  # rows a token
                if saved * HORIZON <= COST * BLOCK:
                    break
                found.append((-saved, il, new, old))
        moved = 0
        for _, il, new, old in sorted(found, key=lambda swap: swap[0]):
            if moved and moved + block_bytes[il] > MOST:
                break
            self.slots[il][new], self.slots[il][old] = self.slots[il][old], -1
            moved += block_bytes[il]


class Replacer:
    """Moves blocks of neurons, and knows where they are.

    `layers`: those that the device has, by number; `first`: their slot tables; `heat`: address of
    the counts of all layers, uint32 [.., n_blocks], which wrap. `slots`: the tables as they are.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        layers: Sequence[Resident],
        first: Sequence[np.ndarray],
        heat: int,
    ) -> None:
        self._device, self._stream = device, stream
        self._layers, self._first = layers, first
        self.slots = [slot.copy() for slot in first]
        self._stale: set[int] = set()  # layers whose tables on the device are others
        self._text: BlockResidency | None = None  # whose the passes are
        self._is_there = True  # all that it wants
        self._is_moving = False
        self._heat_at, shape = heat, (len(first), len(first[0]))
        memory, self._pinned_at = device.pinned(4 * shape[0] * shape[1])
        self._pinned = memory.view(np.uint32).reshape(shape)
        self._seen = np.zeros(shape, np.uint32)  # counts that have been handed on

    @functools.cached_property
    def _load(self) -> Loader:
        """What brings rows to the device; there is nothing left to take there."""
        return Loader(Slab(self._device, 0), self._uploader)

    @functools.cached_property
    def _uploader(self) -> Uploader:
        return Uploader(self._device, self._stream, nbytes=STAGING)

    @functools.cached_property
    def _block_bytes(self) -> list[int]:
        """Bytes on the device of a block of each layer."""
        return [
            sum(device_bytes(tensor.type, BLOCK, tensor.cols) for _, tensor in layer.matrices)
            for layer in self._layers
        ]

    def residency(self) -> BlockResidency | None:
        """Return where a new text has its blocks; None where none can move."""
        can_move = any((slot < 0).any() and (slot >= 0).any() for slot in self._first)
        return BlockResidency(self._first) if can_move else None

    def use(self, text: BlockResidency | None, n_tok: int) -> None:
        """Have the blocks there, and count, for the next pass of a text; None: as at first."""
        if text is not self._text:
            self._count()
            self._text, self._is_there = text, False
        if text is not None:
            if text.is_due:
                self._count()
                self._is_there = False
                text.take_turn(self._block_bytes)
            text.n_tok += n_tok
        if not self._is_there:
            self._move(self._first if text is None else text.slots)
            self._is_there = True

    def _count(self) -> None:
        """Hand what has been counted to the text whose passes it was."""
        self._stream.copy(self._pinned_at, self._heat_at, self._pinned.nbytes)
        self._stream.synchronize()
        now = self._pinned.copy()
        if self._text is not None:
            self._text.counted += now - self._seen
        self._seen = now

    def _move(self, wanted: Sequence[np.ndarray]) -> None:
        """Queue what brings every block to its place, and the tables that say so.

        Whatever has come of it when Ctrl-C ends it, `slots` says no more than is true.
        """
        if self._is_moving:
            self._stream.synchronize()  # it was interrupted: staging buffers may be in use
        self._is_moving = True
        for il, (layer, there, slot) in enumerate(
            zip(self._layers, self.slots, wanted, strict=True)
        ):
            for block in np.flatnonzero((slot >= 0) & (slot != there)):
                self._stale.add(il)
                there[there == slot[block]] = -1
                for matrix, tensor in layer.matrices:
                    first, place = int(block) * BLOCK, int(slot[block]) * BLOCK
                    count = min(BLOCK, tensor.rows - first)
                    self._load.rows(matrix, tensor, place, first, count)
                there[block] = slot[block]
            if il in self._stale:
                for address, table in ((layer.slot, slot), (layer.neuron_of, blocks_in(slot))):
                    self._uploader.upload(address, [table.view(np.uint8)])
                self._stale.remove(il)
        self._is_moving = False
