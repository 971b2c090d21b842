"""The paged KV cache.

Pages of 32 tokens; K and V each [n_layer][n_pages][n_head_kv][32][head_dim], K after rope. A
sequence owns a list of pages; token t of it lies in its page t // 32, slot t % 32.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from .config import ModelConfig
from .errors import RequestError

PAGE = 32  # tokens


@dataclass
class Sequence:
    """One text being read or written: which pages hold it, and how many tokens are in them."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    thresholds: np.ndarray | None = None  # of the predictors, float32 [n_layer]; None: the file's


class KVCache:
    """K and V of every layer for up to `n_tokens` tokens in all, in pages."""

    def __init__(self, config: ModelConfig, n_tokens: int, dtype: type[np.floating]) -> None:
        self.n_pages = -(-n_tokens // PAGE)
        shape = (config.n_layer, self.n_pages, config.n_head_kv, PAGE, config.head_dim)
        # np.zeros maps memory that the system commits only when a page is first written.
        self.k = np.zeros(shape, dtype=dtype)
        self.v = np.zeros(shape, dtype=dtype)
        self._free = list(range(self.n_pages - 1, -1, -1))

    def extend(self, chunks: SequenceOf[tuple[Sequence, int]]) -> None:
        """Make room for more tokens of some sequences; RequestError when the cache is full."""
        need = [-(-(s.length + n) // PAGE) - len(s.pages) for s, n in chunks]
        if sum(need) > len(self._free):
            raise RequestError(
                f"the KV cache is full: {max(s.length + n for s, n in chunks)} tokens do not fit "
                "beside the other sequences"
            )
        for (sequence, n), pages in zip(chunks, need, strict=True):
            sequence.pages += [self._free.pop() for _ in range(pages)]
            sequence.length += n

    def bytes_of(self, length: float) -> float:
        """Return the bytes of `length` tokens, which one more reads of all layers."""
        return (self.k.nbytes + self.v.nbytes) / (self.n_pages * PAGE) * length

    def release(self, sequence: Sequence) -> None:
        """Give the pages of `sequence` back."""
        self._free += reversed(sequence.pages)
        sequence.pages, sequence.length = [], 0
