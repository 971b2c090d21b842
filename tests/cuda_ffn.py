"""A layer's FFN for tests of kernels: its weights as they lie on the device, and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_operands import NO_MATRIX, Inputs, Weights, product
from cusim.sim import Simulator
from powerinfer.runtime.cuda.launches import ACTIVATIONS
from powerinfer.runtime.reference import activate
from powerinfer.runtime.step import FIRED, HALF_FIRED

BLOCK = 64  # neurons that are resident, or not, together
COLS = {"q4_0": 96, "q8_0": 160, "q6_k": 256, "f16": 33, "f32": 7}


class FFN:
    """Random weights, activations and masks.

    `share` of the neurons are predicted, for each token others: 0 none, 1 all. Those that are too
    close to the threshold to say whether they fire are not. `slots`: "all" resident, "some" in
    any order in a storage that has room for more, "none". `up`: format of up, if not the decider's;
    None: the model has none.
    """

    def __init__(
        self,
        suffix: str = "q4_0",
        activation: str = "relu",
        n_ff: int = 200,
        n_embd: int = 0,
        n_tok: int = 3,
        share: float = 0.5,
        slots: str = "some",
        up: str | None = "",
        has_bias: bool = True,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng([seed, n_ff, n_tok])
        self.suffix, self.activation, self.threshold = suffix, activation, 0.5
        self.n_ff, self.n_embd, self.n_tok = n_ff, n_embd or COLS[suffix], n_tok
        self.decider = Weights(rng, suffix, n_ff, self.n_embd)
        self.down_t = Weights(rng, suffix, n_ff, self.n_embd)
        self.up_suffix = suffix if up == "" else up
        self.up = Weights(rng, self.up_suffix, n_ff, self.n_embd) if self.up_suffix else None
        self.x = rng.standard_normal((n_tok, self.n_embd), np.float32)
        self.decider_bias, self.up_bias = rng.standard_normal((2, n_ff), np.float32)
        if not has_bias:
            self.decider_bias = self.up_bias = None

        n_blocks = -(-n_ff // BLOCK)
        self.slot = np.full(n_blocks, -1, np.int32)
        n_slots = n_blocks + 2 if slots == "some" else n_blocks
        if slots == "some":
            own = rng.permutation(n_blocks)[: max(n_blocks - max(n_blocks // 4, 1), 1)]
            self.slot[own] = rng.permutation(n_slots)[: len(own)]
        elif slots == "all":
            self.slot[:] = np.arange(n_blocks)
        self.block_neuron = np.full(n_slots, -1, np.int32)  # of each slot
        resident = np.flatnonzero(self.slot >= 0)
        self.block_neuron[self.slot[resident]] = resident
        # Neuron of each storage row; -1: nobody's, never to be read.
        self.neuron = (self.block_neuron[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
        self.neuron[np.repeat(self.block_neuron < 0, BLOCK) | (self.neuron >= n_ff)] = -1
        self.is_resident = np.repeat(self.slot >= 0, BLOCK)[:n_ff]

        self._act, self._fired, is_sure = self._all_neurons()
        self.mask = (rng.random((n_tok, n_ff)) < share) & is_sure
        self.resident_mask = self.mask & self.is_resident

    def _all_neurons(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return act, fired, and whether that is beyond doubt, [n_tok, n_ff] each."""

        def times_x(w: Weights, bias: np.ndarray | None) -> tuple[np.ndarray, float]:
            x = Inputs.rounded(w.type, self.x)
            y = product(x, w.values) + (0 if bias is None else bias)
            return y, 1e-5 * np.abs(y).max()

        decider, error = times_x(self.decider, self.decider_bias)
        act = activate(self.activation, decider, self.threshold).astype(np.float64)
        limit = self.threshold if self.activation == "fatrelu" else 0
        is_sure = np.abs(decider - limit) > error
        fired = np.where(act != 0, FIRED, 0)
        if self.up is not None:
            up, error = times_x(self.up, self.up_bias)
            if self.activation == "drelu":
                is_sure &= np.abs(up) > error
                up = np.maximum(up, 0)
                fired[(fired != 0) & (up == 0)] = HALF_FIRED
            act *= up
        return act, fired.astype(np.uint8), is_sure

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Return act and fired [n_tok, n_ff] of the neurons that are resident and predicted."""
        return self._act * self.resident_mask, self._fired * self.resident_mask

    def counts(self) -> list[int]:
        """Return what the layer's counters come to: step.COUNTS."""
        fired = self.expected()[1]
        rows = np.count_nonzero(self.resident_mask)
        return [self.n_tok, rows, np.count_nonzero(fired), np.count_nonzero(fired == FIRED)]

    def tokens(self, picked: list[int]) -> FFN:
        """Return the same layer with some of the tokens alone."""
        other = object.__new__(FFN)
        other.__dict__ |= self.__dict__
        other.n_tok = len(picked)
        for name in ("x", "mask", "resident_mask", "_act", "_fired"):
            setattr(other, name, getattr(self, name)[picked])
        return other

    def matrices(self, sim: Simulator) -> list[dict[str, Any]]:
        """Return what each pass over decider and up takes: one, or two for two formats."""
        decider = self.decider.matrix(sim, self.neuron)
        up = NO_MATRIX if self.up is None else self.up.matrix(sim, self.neuron)
        passes = [(self.suffix, decider, up)]
        if self.up_suffix not in (None, self.suffix):
            passes = [(self.suffix, decider, NO_MATRIX), (self.up_suffix, NO_MATRIX, up)]
        biases = {
            name: None if bias is None else sim.array(bias, name)
            for name, bias in (("decider_bias", self.decider_bias), ("up_bias", self.up_bias))
        }
        return [
            {
                "suffix": suffix,
                "decider": one,
                "up": two,
                **Inputs(sim, (self.decider if one is decider else self.up).type, self.x).fields,
                **biases,
                "n_ff": self.n_ff,
                "activation": ACTIVATIONS.index(self.activation),
                "threshold": self.threshold,
            }
            for suffix, one, two in passes
        ]
