"""What one forward pass works on: the Step (what differs per token) and the activation Buffers.

Operators read the Step where they run, never as Python arguments, so that the same forward pass
serves one token, a prompt chunk, a batch, and a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from .cache import PAGE, Sequence
from .config import ModelConfig

# Columns of Buffers.counts: tokens, rows of the decider read, rows of up read (in models without
# a gate: what would be), neurons that fired, of which the rows of down are read.
COUNTS = ("tokens", "decider", "up", "fired")
FIRED, HALF_FIRED = 1, 2  # drelu: the gate fired, up did not


class Step:
    """The tokens of one forward pass. All arrays are int32 and keep their addresses.

    `counts` = [n_tok, n_out]; `tokens`, `positions`, `rows` [n_tok_max]: id, position in its
    sequence, row of the page table; `pages` [n_seq_max, pages of a full context]: page table;
    `outputs` [n_out_max]: which tokens' logits are wanted; `thresholds` float32 [n_seq_max,
    n_layer]: a neuron is predicted for a token of that row when its score >= this; `audit` [1]: the
    token that Backend.audit looks at.
    """

    def __init__(
        self,
        n_tok_max: int,
        n_seq_max: int,
        context: int,
        n_out_max: int,
        thresholds: SequenceOf[float] = (),
    ) -> None:
        self.counts = np.zeros(2, np.int32)
        self.tokens = np.zeros(n_tok_max, np.int32)
        self.positions = np.zeros(n_tok_max, np.int32)
        self.rows = np.zeros(n_tok_max, np.int32)
        self.pages = np.zeros((n_seq_max, -(-context // PAGE)), np.int32)
        self.outputs = np.zeros(n_out_max, np.int32)
        self.audit = np.zeros(1, np.int32)
        self.file_thresholds = np.array(thresholds, np.float32)
        self.thresholds = np.tile(self.file_thresholds, (n_seq_max, 1))

    @property
    def n_tok(self) -> int:
        return int(self.counts[0])

    @property
    def n_out(self) -> int:
        return int(self.counts[1])

    def fill(self, chunks: SequenceOf[tuple[Sequence, SequenceOf[int]]]) -> None:
        """Take the given new tokens of each sequence, whose pages must have room for them.

        A sequence's length counts these tokens already (KVCache.extend comes first).
        """
        n = 0
        for row, (sequence, ids) in enumerate(chunks):
            end = n + len(ids)
            self.tokens[n:end] = ids
            self.positions[n:end] = np.arange(sequence.length - len(ids), sequence.length)
            self.rows[n:end] = row
            self.pages[row, : len(sequence.pages)] = sequence.pages
            own = sequence.thresholds
            self.thresholds[row] = self.file_thresholds if own is None else own
            n = end
        self.counts[0] = n

    def want(self, outputs: SequenceOf[int]) -> None:
        """Choose the tokens (by their index in this step) whose logits the head computes."""
        self.outputs[: len(outputs)] = outputs
        self.counts[1] = len(outputs)


class Buffers:
    """Activations between operators, float32 unless said otherwise, allocated once."""

    def __init__(self, c: ModelConfig, n_tok_max: int, n_out_max: int) -> None:
        self.x = np.zeros((n_tok_max, c.n_embd), np.float32)  # residual stream
        self.h = np.zeros((n_tok_max, c.n_embd), np.float32)  # what the FFN sees
        self.q = np.zeros((n_tok_max, c.n_head * c.head_dim), np.float32)
        self.a = np.zeros((n_tok_max, c.n_head * c.head_dim), np.float32)  # attention's output
        self.scores = np.zeros((n_tok_max, c.n_ff), np.float32)  # of the predictor
        self.mask = np.zeros((n_tok_max, c.n_ff), np.uint8)  # 1: neuron predicted for the token
        # Of the neurons that the FFN computed: their activations; 0 silent, FIRED, or HALF_FIRED.
        self.act = np.zeros((n_tok_max, c.n_ff), np.float32)
        self.fired = np.zeros((n_tok_max, c.n_ff), np.uint8)
        self.truth = np.zeros(c.n_ff, np.uint8)  # the same of all neurons, for an audited token
        self.logits = np.zeros((n_out_max, c.n_vocab), np.float32)
        # Since they were last set to 0, per layer and summed over tokens; the columns are COUNTS.
        self.counts = np.zeros((c.n_layer, len(COUNTS)), np.int64)

    def relocate(
        self, allocate: Callable[[tuple[int, ...], np.dtype[Any]], tuple[np.ndarray, int]]
    ) -> dict[str, int]:
        """Put every array elsewhere, before anybody uses it; return the addresses given for them.

        `allocate` returns zeros of a shape and type, and an address.
        """
        addresses = {}
        for name, array in vars(self).items():
            moved, addresses[name] = allocate(array.shape, array.dtype)
            setattr(self, name, moved)
        return addresses


def rope_table(c: ModelConfig, context: int, factors: np.ndarray | None) -> np.ndarray:
    """Return float32 [context, 2, rope_dim / 2]: cos and sin of every position's angles.

    Angle i of position p is p / linear_factor * base^(-2 i / rope_dim) / factors[i]. Source:
    RoFormer (arXiv 2104.09864); llama3's factors as in llama.cpp's rope_freqs.
    """
    dims = np.arange(0, c.rope_dim, 2, dtype=np.float64)  # none where positions are learned
    inverse = c.rope_freq_base ** (-dims / max(c.rope_dim, 1))
    if factors is not None:
        inverse = inverse / factors.astype(np.float64)
    angles = np.arange(context, dtype=np.float64)[:, None] / c.rope_linear_factor * inverse
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
