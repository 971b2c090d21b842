"""What operators launch: kernels, their grids, their arguments.

Launches come in pairs, for one token and for several. One token is a matter of memory bandwidth:
products row by row, and lists of neurons. Several tokens are tiles of matrix products over all
resident neurons. What differs from call to call lies in the device's copy of the Step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..gguf import Tensor
from . import arguments
from .loading import DeviceMatrix

ACTIVATIONS = ("relu", "fatrelu", "drelu", "relu2", "silu", "gelu")  # common.cuh, Activation
STORE, ADD, STORE_RELU = range(3)  # common.cuh, Op


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments; `grid` says how large, for a number of tokens."""

    kernel: str
    grid: Callable[[int], tuple[int, ...]]
    args: np.ndarray

    @property
    def block(self) -> int:
        return arguments.kernels()[self.kernel].block


@dataclass(frozen=True)
class Launches:
    """What an operator launches for one token, and for several."""

    one: Sequence[Launch] = ()
    many: Sequence[Launch] = ()

    def __add__(self, other: Launches) -> Launches:
        return Launches([*self.one, *other.one], [*self.many, *other.many])

    def with_argument(self, name: str, value: Any) -> Launches:
        """Return the same launches but for one argument."""

        def changed(launch: Launch) -> Launch:
            args = launch.args.copy()
            args[name] = value
            return dataclasses.replace(launch, args=args)

        return Launches(list(map(changed, self.one)), list(map(changed, self.many)))


def blocks_in(slot: np.ndarray) -> np.ndarray:
    """Return the block in each place, int32, given the place of each block (-1: in none)."""
    return np.argsort(slot)[np.sum(slot < 0) :].astype(np.int32)


@dataclass(frozen=True)
class Resident:
    """A layer's blocks of neurons on the device: what must change for others to be there."""

    slot: int  # address of int32 [blocks of the layer]: place of each, -1: on the CPU
    neuron_of: int  # address of int32 [places]: the block in each
    matrices: tuple[tuple[DeviceMatrix, Tensor], ...]  # decider, up, down_t: there, in the file
    biases: dict[str, int]  # addresses of decider_bias and up_bias, of all neurons


@dataclass(frozen=True)
class Window:
    """Blocks of a layer's neurons on the device, resident or passing through; addresses there."""

    il: int
    n_blocks: int
    block_neuron: int  # of int32 [n_blocks]: which these are; -1: none
    matrices: Sequence[DeviceMatrix]  # decider, up, down_t, as far as the layer has them
    biases: Mapping[str, int]  # as in Resident
    act: int  # of float32 [n_tok, 64 * n_blocks]


@dataclass(frozen=True)
class LayerLaunches:
    """The operators of a layer."""

    qkv: Launches
    attend: Launches
    out_add: Launches
    ffn_norm: Launches
    predict: Launches
    compact: Launches  # mask and lists, from the scores
    recompact: Launches  # the same again, of other scores: counts nothing
    ffn: Launches  # the resident neurons
    ffn_add: Launches  # x += what they came to
    add_cold: Launches  # x += the CPU's part
    has_cold: bool  # whether there is a part of the CPU's
    resident: Resident
    streamed: LayerLaunches | None  # where the CPU has no part in it (streaming.py)
