"""ffn_gemm.cu in the simulator against the reference: windows of storage, planted faults."""

from functools import cache

import numpy as np
import pytest
from cuda_case import launch
from cuda_ffn import BLOCK, FFN
from cuda_operands import FORMATS, NO_TF32, close_enough, only
from cusim.sim import WAIT, SimError, load, unavailable
from powerinfer.runtime.cuda.launches import ACTIVATIONS, ADD, STORE

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@cache
def simulator(check=False):
    return load("ffn_gemm.cu", check=check)


class Run:
    """An FFN by products of tiles. `window`: which of the storage's blocks, as (first, number)."""

    def __init__(self, sim, ffn, window=None, room=0, order_seed=None):
        self.sim, self.ffn, self.room, self.order_seed = sim, ffn, room, order_seed
        self.first, self.n_blocks = window or (0, len(ffn.block_neuron))
        width, self.n_grid = BLOCK * self.n_blocks, -(-(ffn.n_tok + room) // 128)
        self.n_tok = sim.array(np.array([ffn.n_tok], np.int32), "n_tok")
        inside = ffn.block_neuron[self.first : self.first + self.n_blocks]
        self.block_neuron = sim.array(inside, "block_neuron")
        self.mask = sim.array(ffn.mask.astype(np.uint8), "mask")
        self.fired = sim.array(np.zeros(ffn.mask.shape, np.uint8), "fired")  # as compact does
        self.act = sim.empty((ffn.n_tok + room, width), np.float32, "act")
        self.counters = sim.array(np.zeros(4, np.int64), "counters")
        self.before = np.random.default_rng(2).standard_normal((ffn.n_tok + room, ffn.n_embd))
        self.y = sim.array(self.before.astype(np.float32), "y")
        self.window = {
            **{name: getattr(self, name) for name in ("n_tok", "act", "block_neuron", "n_blocks")},
            "first_block": self.first,
            "n_ff": ffn.n_ff,
        }
        self.neuron = ffn.neuron[BLOCK * self.first :][:width]  # of the window's rows

    def rows(self):
        passes = self.ffn.matrices(self.sim)
        for fields in passes:
            launch(
                self.sim,
                f"ffn_rows_gemm_{fields.pop('suffix')}",
                (self.n_blocks, self.n_grid),
                self.order_seed,
                **{**fields, **self.window},
                mask=self.mask,
                fired=self.fired,
                counters=self.counters if fields is passes[-1] else None,
            )

    def down(self, op=STORE):
        ffn = self.ffn
        launch(
            self.sim,
            f"ffn_down_gemm_{ffn.suffix}",
            (-(-ffn.n_embd // 64), self.n_grid),
            self.order_seed,
            down_t=ffn.down_t.matrix(self.sim, ffn.neuron),
            y=self.y,
            op=op,
            **self.window,
        )

    def all(self, op=STORE):
        self.rows()
        self.down(op)
        return self

    def results(self):
        names = ("act", "fired", "y", "counters")
        return {name: getattr(self, name).numpy() for name in names}

    def expected(self):
        """Return act and fired of the window's neurons [n_tok, n_ff], 0 of others."""
        inside = np.isin(np.arange(self.ffn.n_ff), self.neuron)
        return [part * inside for part in self.ffn.expected()]

    def check(self, op=STORE):
        got, (act, fired), n_tok = self.all(op).results(), self.expected(), self.ffn.n_tok
        np.testing.assert_array_equal(got["fired"], fired)
        decided, n_fired = np.count_nonzero(fired), np.count_nonzero(fired == 1)
        assert got["counters"].tolist() == [0, 0, decided, n_fired]
        ours, is_any = np.zeros(act.shape), self.neuron >= 0
        ours[:, self.neuron[is_any]] = got["act"][:n_tok, is_any]
        close_enough(ours, act)
        assert not got["act"][:n_tok, ~is_any].any()
        assert np.isnan(got["act"][n_tok:]).all()
        y = act @ self.ffn.down_t.values.astype(np.float64)
        close_enough(got["y"][:n_tok], y + (self.before[:n_tok] if op == ADD else 0))
        np.testing.assert_array_equal(got["y"][n_tok:], self.before[n_tok:].astype(np.float32))


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats(suffix):
    more = {"q6_k": 768, "f16": 300, "f32": 130}.get(suffix, 352)
    Run(simulator(), FFN(suffix, n_tok=33), room=40).check()
    Run(simulator(), FFN(suffix, n_embd=more, n_tok=2, has_bias=False)).check(ADD)


@pytest.mark.parametrize("n_tok", [16, 32, 130])
def test_tiles_of_few_and_many_tokens(n_tok):
    Run(simulator(), FFN("q4_0", n_ff=70, n_tok=n_tok, share=0.1)).check()


@pytest.mark.parametrize("suffix", ["q4_0", "f16"])
def test_without_tf32(suffix):
    sim = load("ffn_gemm.cu", replace=NO_TF32)
    Run(sim, FFN(suffix, n_ff=70, n_tok=35)).check(ADD)


@pytest.mark.parametrize("up", ["", None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, up):
    if up is None and activation == "drelu":
        up = "f16"  # there is none without: a pass of each format
    Run(simulator(), FFN("f32", activation, up=up)).check()


@pytest.mark.parametrize("formats", [("q4_0", "f32"), ("f16", "q8_0")])
@pytest.mark.parametrize("activation", ["relu", "drelu"])
def test_two_formats(formats, activation):
    suffix, up = formats
    Run(simulator(), FFN(suffix, activation, n_embd=96, n_tok=35, up=up)).check()


@pytest.mark.parametrize("slots", ["all", "some", "none"])
@pytest.mark.parametrize("share", [0, 0.01, 1])
def test_empty_sparse_and_full_masks(share, slots):
    for n_ff, n_tok in ((1, 1), (64, 65), (300, 7)):
        Run(simulator(), FFN("q8_0", n_ff=n_ff, n_tok=n_tok, share=share, slots=slots)).check()


def test_windows():
    """What is streamed in parts: the sums of disjoint windows are the whole."""
    ffn = FFN("q4_0", n_ff=500, n_tok=5)
    y = np.zeros((5, ffn.n_embd))
    for window in ((0, 3), (3, 1), (4, len(ffn.block_neuron) - 4)):
        run = Run(simulator(), ffn, window)
        run.check()
        y += run.results()["y"]
    close_enough(y, ffn.expected()[0] @ ffn.down_t.values.astype(np.float64))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_token_does_not_depend_on_the_others(suffix):
    """Nor on their number, nor on its place among them."""
    ffn = FFN(suffix, n_tok=70)
    whole = Run(simulator(), ffn).all().results()
    for picked in ([64], [69, 3, 40], list(range(69, -1, -1))):
        part = Run(simulator(), ffn.tokens(picked)).all().results()
        for name in ("act", "fired", "y"):
            np.testing.assert_array_equal(part[name], whole[name][picked])


def test_results_do_not_depend_on_the_order_of_blocks_and_threads():
    ffn = FFN("q4_0", n_tok=40)
    plain, other = (Run(simulator(), ffn, order_seed=seed).all().results() for seed in (None, 1))
    for name, value in plain.items():
        np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("suffix", FORMATS)
def test_check_finds_nothing(suffix):
    Run(simulator(check=True), FFN(suffix, "drelu", n_ff=100, n_tok=2), room=3).check(ADD)


FAULTS = {
    # text, what it becomes, the kind of fault that the check finds
    "no wait for other kernels": (WAIT, "", "early"),
    "a token too many": (
        "return min(n_tok - first_token, TOKENS) *",
        "return min(n_tok - first_token + 1, TOKENS) *",
        "out of bounds",
    ),
    "a neuron too many": ("n >= 0 && n < p.n_ff && p", "n >= 0 && p", "out of bounds"),
    "neurons of nobody": ("n >= 0 && n < p.n_ff && p", "n < p.n_ff && p", "out of bounds"),
    "no barrier before the tile is read": (
        "        tokens.store(tile);\n        __syncthreads();\n",
        "        tokens.store(tile);\n",
        "race",
    ),
    "counted by halves": (
        "atomicAdd((unsigned long long*)counters + which, (unsigned long long)n)",
        "counters[which] += n",
        "race",
    ),
    "a column too many": ("if (column >= p.down_t.cols) continue", "", "race"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_planted_faults(name):
    text, becomes, kind = FAULTS[name]
    sim = load("ffn_gemm.cu", check=True, replace={text: becomes, **only("q4_0", "FFN_GEMM")})
    with pytest.raises(SimError) as error:
        Run(sim, FFN("q4_0", "drelu", n_ff=200, n_tok=2)).all()
    assert error.value.kind == kind


WRONG = {
    # Faults that break no rule: only a comparison finds them.
    "neurons that are not predicted": (
        "n < p.n_ff && p.mask[(long long)(first_token + token) * p.n_ff + n]",
        "n < p.n_ff",
    ),
    "the mask of the first token": (
        "p.mask[(long long)(first_token + token) * p.n_ff + n]",
        "p.mask[n]",
    ),
    "the first window": ("(p.first_block + blockIdx.x)", "blockIdx.x"),
    "down of the first window": ("? p.first_block * NEURON_BLOCK + k", "? k"),
    "sums of another token": ("(*sums)[token][row]", "(*sums)[0][row]"),
    "up for the decider": ("is_up ? p.up : p.decider;", "p.up;"),
    "the bias of a row": ("p.decider_bias[first_neuron + row]", "p.decider_bias[row]"),
    "silent ones fired": ("neuron = {0, 0};", "neuron = {0, FIRED};"),
    "rows that nobody has": ("return exists ? p.first_block", "return true ? p.first_block"),
    "stored, not added": ("*y = p.op == ADD ? *y + sum : sum;", "*y = sum;"),
    "a piece of another unit": ("if (v > 0 && F::column(unit, v) != column)", "if (v > 0)"),
    "a row of down left out": ("row_of(k + my_k(i));", "row_of(k + my_k(i) / 2 * 2);"),
}


@pytest.mark.parametrize("name", WRONG)
def test_comparison_finds_planted_faults(name):
    text, becomes = WRONG[name]
    sim = load("ffn_gemm.cu", replace={text: becomes, **only("q4_0", "FFN_GEMM")})
    ffn = FFN("q4_0", "drelu", n_ff=300, n_tok=2)
    with pytest.raises(AssertionError):
        Run(sim, ffn, (1, 5)).check(ADD)
