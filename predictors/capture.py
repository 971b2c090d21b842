"""What every FFN sees and does, written to disk while a text runs (exact mode)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backend import Backend
from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.formats import F32Array, decode
from ..runtime.model import Watcher
from ..runtime.step import FIRED
from ..runtime.weights import Layer

_F16_MAX = 65504.0
CHUNK = 1024  # tokens worked on at a time


@dataclass(frozen=True)
class LayerCapture:
    """What one layer saw: memory maps, so that only what is worked on is in memory."""

    inputs: np.ndarray[Any, np.dtype[np.float16]]  # [n_tok, n_embd], the FFN's normed input
    bits: np.ndarray[Any, np.dtype[np.uint8]]  # [n_tok, ceil(n_ff / 8)], who fired
    # How much it mattered, |activation| * |row of down|, of all that fired, token after token
    effects: np.ndarray[Any, np.dtype[np.float16]]
    ends: np.ndarray[Any, np.dtype[np.int64]]  # [n_tok], where in `effects` each token's end
    n_ff: int

    def __len__(self) -> int:
        return len(self.inputs)

    def x(self, rows: Any) -> F32Array:
        """Return inputs [n, n_embd] of some tokens."""
        return np.asarray(self.inputs[rows], np.float32)

    def fired(self, rows: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return who fired [n, n_ff] for some tokens."""
        return np.unpackbits(self.bits[rows], axis=1, count=self.n_ff).astype(bool)

    def effect(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> F32Array:
        """Return how much each neuron mattered [n, n_ff] for some tokens; 0 for the silent."""
        out, fired = np.zeros((len(rows), self.n_ff), np.float32), self.fired(rows)
        pieces = [
            self.effects[self.ends[t] - n : self.ends[t]]
            for t, n in zip(rows, fired.sum(axis=1), strict=True)
        ]
        out[fired] = np.concatenate(pieces)
        return out

    def split(self, n_check: int) -> tuple[LayerCapture, LayerCapture]:
        """Return the first part, to learn from, and the last `n_check` tokens, to check on."""
        cut = len(self) - n_check

        def part(rows: slice) -> LayerCapture:
            return replace(
                self, inputs=self.inputs[rows], bits=self.bits[rows], ends=self.ends[rows]
            )

        return part(slice(cut)), part(slice(cut, None))


class _Writer(Watcher):
    """The watcher that fills the maps, and appends the effects to a file."""

    def __init__(self, layers: Sequence[Layer], maps: list[Any], files: list[Any]) -> None:
        self._maps, self._files = maps, files
        self._sizes = [_down_norms(layer) for layer in layers]
        self._at, self._end = [0] * len(maps), [0] * len(maps)

    def after_ffn(self, ops: Backend, il: int) -> None:
        n, b = ops.plan.step.n_tok, ops.plan.buffers
        inputs, bits, ends = self._maps[il]
        rows, fired = slice(self._at[il], self._at[il] + n), b.fired[:n] == FIRED
        inputs[rows] = np.clip(b.h[:n], -_F16_MAX, _F16_MAX)  # h is as it was
        bits[rows] = np.packbits(fired, axis=1)
        effects = (np.abs(b.act[:n]) * self._sizes[il])[fired]
        self._files[il].write(np.minimum(effects, _F16_MAX).astype(np.float16).data)
        ends[rows] = self._end[il] + np.cumsum(fired.sum(axis=1))
        self._at[il], self._end[il] = rows.stop, self._end[il] + len(effects)


def _down_norms(layer: Layer) -> F32Array:
    """Return the length of every neuron's row of down: float32 [n_ff]."""
    assert layer.down_t is not None
    type_, data = layer.down_t.type, layer.down_t.data
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    return np.concatenate([np.linalg.norm(decode(type_, rows), axis=1) for rows in chunks])


def capture(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    folder: Path,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[LayerCapture]:
    """Run windows of tokens through an engine in exact mode, keeping what its FFNs see and do.

    Two bytes an embedding dimension, one bit a neuron, two bytes a neuron that fires, for each
    token and layer, in `folder`. What an earlier run left there for the same model and text is
    used again. RequestError if there is no room.
    """
    assert engine.mode == "exact"
    c, n_tok = engine.config, sum(map(len, texts))
    made_for, done = fingerprint(engine, texts), folder / "capture.json"
    if _captured_for(done) != made_for:
        done.unlink(missing_ok=True)
        _check_room(folder, n_tok * c.n_layer * (2 * c.n_embd + c.n_ff // 2 + 8))
        widths = (("inputs", np.float16, c.n_embd), ("fired", np.uint8, -(-c.n_ff // 8)))
        with contextlib.ExitStack() as stack:
            maps, files = [], []
            for il in range(c.n_layer):
                arrays = [
                    _new_map(folder / f"{name}_{il}.npy", dtype, (n_tok, width))
                    for name, dtype, width in widths
                ]
                ends = _new_map(folder / f"ends_{il}.npy", np.int64, (n_tok,))
                maps.append((*arrays, ends))
                files.append(stack.enter_context(open(folder / f"effects_{il}.f16", "wb")))
            with engine.watched(_Writer(engine.weights.layers, maps, files)):
                for ids in texts:
                    engine.read(ids)
                    progress(len(ids))
        done.write_text(json.dumps({"fingerprint": made_for}))
    return [_open_layer(folder, il, c.n_ff) for il in range(c.n_layer)]


def _captured_for(done: Path) -> str | None:
    """Return the fingerprint that a complete capture left; None if there is none."""
    try:
        return str(json.loads(done.read_text())["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _open_layer(folder: Path, il: int, n_ff: int) -> LayerCapture:
    # As plain arrays over the maps: slicing a memmap is slow.
    inputs, bits, ends = (
        np.load(folder / f"{name}_{il}.npy", mmap_mode="r").view(np.ndarray)
        for name in ("inputs", "fired", "ends")
    )
    effects = folder / f"effects_{il}.f16"
    # An empty file cannot be mapped: nothing fired.
    is_empty = effects.stat().st_size == 0
    none = np.zeros(0, np.float16)
    return LayerCapture(
        inputs,
        bits,
        none if is_empty else np.memmap(effects, np.float16, "r").view(np.ndarray),
        ends,
        n_ff,
    )


def _new_map(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return a new array in a file, with its room on the disk reserved.

    A map of a sparse file would end the process, without a word, on a disk that is full.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise RequestError(
            f"{folder} needs room for up to {nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free: "
            "take fewer tokens (-n)"
        )


def fingerprint(engine: Engine, texts: Sequence[Sequence[int]]) -> str:
    """Return what tells one pair of model and text from another."""
    digest = hashlib.sha256()
    with open(engine.file.path, "rb") as file:
        digest.update(file.read(1 << 20))
    digest.update(str(engine.file.size).encode())
    for tensor in engine.file.tensors.values():  # the header does not say what the weights are
        digest.update(tensor.data[:16].tobytes())
    for ids in texts:
        digest.update(np.asarray(ids, np.int32).tobytes())
    return digest.hexdigest()
