"""What tests of CUDA kernels have in common: launches, weights, steps and caches on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from cusim.sim import Simulator
from powerinfer.runtime import reference
from powerinfer.runtime.cache import PAGE
from powerinfer.runtime.cuda import arguments
from powerinfer.runtime.formats import BLOCK_SIZES, GGMLType

NOT_PACKED = (None, None, None)
NOWHERE = 1 << 28  # where nothing may be read


def launch(
    sim: Simulator,
    kernel: str,
    grid: int | tuple[int, ...],
    order_seed: int | None = None,
    **values: Any,
) -> None:
    """Launch a kernel with the block that its source says, and values for all its fields."""
    args = arguments.fill(kernel, **values)
    sim.launch(kernel, grid, arguments.kernels()[kernel].block, args, order_seed=order_seed)


def packed(sim: Simulator, n_tok: int, cols: int) -> tuple[Any, Any, Any]:
    """Return room for a Packed of [n_tok][cols]."""
    return (
        sim.empty((n_tok, cols), np.int8, "packed.q"),
        sim.empty((n_tok, cols // 32), np.float32, "packed.d"),
        sim.empty((n_tok, cols // 32), np.int32, "packed.s"),
    )


def matrix(sim: Simulator, type_: GGMLType, raw: np.ndarray, cols: int) -> tuple[Any, ...]:
    """Return a Matrix of raw rows [rows, row bytes] of a file, in the two planes of common.cuh."""
    rows = len(raw)
    if type_ in (GGMLType.F16, GGMLType.F32):
        return sim.array(raw, "w"), None, rows, cols
    blocks = raw.reshape(rows, -1, BLOCK_SIZES[type_][1])
    if type_ is GGMLType.Q6_K:
        q, d = blocks[..., :192], np.pad(blocks[..., 192:], ((0, 0), (0, 0), (0, 2)))
    else:
        q, d = blocks[..., 2:], blocks[..., :2]
    return sim.array(q, "w.q"), sim.array(d, "w.d"), rows, cols


class Step:
    """A step of several sequences whose pages are dealt out at random.

    `texts`: (tokens in the cache before this step, new tokens) of each. `room`: tokens that the
    buffers, and so a launch's grid, have beyond those that there are.
    """

    def __init__(
        self, rng: np.random.Generator, texts: list[tuple[int, int]], room: int = 0
    ) -> None:
        before, new = np.array(texts).T
        self.n_tok = int(new.sum())
        self.n_tok_max = self.n_tok + room
        self.counts = np.array([self.n_tok, 0], np.int32)
        self.rows, self.positions = np.full((2, self.n_tok_max), NOWHERE, np.int32)
        self.rows[: self.n_tok] = np.repeat(np.arange(len(texts)), new)
        self.positions[: self.n_tok] = np.concatenate([b + np.arange(n) for b, n in texts])
        self.lengths = before + new
        need = -(-self.lengths // PAGE)
        self.n_pages = int(need.sum()) + 2  # two are nobody's
        self.pages = np.full((len(texts), need.max() + 1), NOWHERE, np.int32)
        dealt = np.split(rng.permutation(self.n_pages), np.cumsum(need))
        for row, own in enumerate(dealt[:-1]):
            self.pages[row, : len(own)] = own

    def on(self, sim: Simulator, *names: str) -> dict[str, Any]:
        """Return these of its arrays on the device, by name."""
        return {name: sim.array(getattr(self, name), name) for name in names}

    def places(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return pages and slots of the positions of a sequence, this step's included."""
        positions = np.arange(self.lengths[row])
        return self.pages[row, positions // PAGE], positions % PAGE


class Rotation:
    """The Rope of a step's tokens, with random angles, and what becomes of q, k and v by it.

    `shape`: n_head, n_head_kv, head_dim; `type_`: the cache's dtype.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        step: Step,
        shape: tuple[int, int, int],
        half: int,
        kind: str,
        type_: type[np.floating],
    ) -> None:
        self.step, self.shape, self.kind, self.type = step, shape, kind, type_
        angles = rng.uniform(0, 7, (70, half))
        self.table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def _cache_size(self) -> tuple[int, ...]:
        return self.step.n_pages, self.shape[1], PAGE, self.shape[2]

    def on(self, sim: Simulator) -> dict[str, Any]:
        """Return the fields of the Rope, with caches that nothing is written to."""
        n_head, n_head_kv, head_dim = self.shape
        return {
            **self.step.on(sim, "counts", "rows", "positions", "pages"),
            "pages_cols": self.step.pages.shape[1],
            "n_head": n_head,
            "n_head_kv": n_head_kv,
            "head_dim": head_dim,
            "table": sim.array(self.table, "table"),
            "half": self.table.shape[2],
            "is_neox": self.kind == "neox",
            "k_cache": sim.empty(self._cache_size(), self.type, "k_cache"),
            "v_cache": sim.empty(self._cache_size(), self.type, "v_cache"),
        }

    def expected(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return q as it is rotated, and both caches, of [n_tok, heads, head_dim] each."""
        n, step = self.step.n_tok, self.step
        rows, positions = step.rows[:n], step.positions[:n]
        table, pages = self.table[positions], step.pages[rows, positions // PAGE]
        k_cache, v_cache = np.zeros((2, *self._cache_size()), self.type)
        k_cache.view(np.uint8)[...] = v_cache.view(np.uint8)[...] = 0xFF  # not written
        k_cache[pages, :, positions % PAGE] = reference.rope(k, table, self.kind)
        v_cache[pages, :, positions % PAGE] = v
        return reference.rope(q, table, self.kind), k_cache, v_cache
