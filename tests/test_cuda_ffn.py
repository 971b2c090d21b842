"""ffn.cu in the simulator against the reference: lists, rows, down; odd sizes, planted faults."""

from functools import cache

import numpy as np
import pytest
from cuda_case import NOWHERE, launch
from cuda_ffn import BLOCK, FFN
from cuda_operands import FORMATS, close_enough, only
from cusim.sim import WAIT, SimError, load, unavailable
from powerinfer.runtime.cuda.launches import ACTIVATIONS
from powerinfer.runtime.footprint import DOWN_SPLITS

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

UNITS = {"q4_0": 32, "q8_0": 16, "q6_k": 64, "f16": 8, "f32": 4}
IL, N_LAYER = 1, 3
HEAT = 2**31 - 9  # before: it wraps


@cache
def simulator(check=False):
    return load("ffn.cu", check=check)


class Run:
    """An FFN on the device, from scores to the parts of down; one kernel after the other."""

    def __init__(self, sim, ffn, grid=2, order_seed=None):
        self.sim, self.ffn, self.grid, self.order_seed = sim, ffn, grid, order_seed
        n_tok, n_ff, n_embd = ffn.n_tok, ffn.n_ff, ffn.n_embd
        self.slot = sim.array(ffn.slot, "slot")
        self.list = sim.empty((n_tok, n_ff), np.int32, "list")
        self.n_list = sim.empty(n_tok, np.int32, "n_list")
        self.cold_list = sim.empty((n_tok, n_ff), np.int32, "cold_list")
        self.n_cold = sim.empty(n_tok, np.int32, "n_cold")
        self.mask, self.cold, self.fired = (
            sim.empty((n_tok, n_ff), np.uint8, name) for name in ("mask", "cold", "fired")
        )
        self.act = sim.empty((n_tok, n_ff), np.float32, "act")
        self.parts = sim.empty((DOWN_SPLITS, n_tok, n_embd), np.float32, "parts")
        self.counters = sim.array(np.zeros(4, np.int64), "counters")
        self.heat = sim.array(np.full(len(ffn.slot), HEAT, np.int32), "heat")

    def launch(self, kernel, grid, **fields):
        launch(self.sim, kernel, grid, self.order_seed, **fields)

    def compact(self, room=2, **changed):
        """The mask comes from scores, and from thresholds that differ from row to row."""
        n_tok, n_ff = self.ffn.n_tok, self.ffn.n_ff
        rows = np.full(n_tok + room, NOWHERE, np.int32)
        rows[:n_tok] = np.arange(n_tok)[::-1]
        thresholds = np.full((n_tok, N_LAYER), np.nan, np.float32)
        thresholds[:, IL] = np.linspace(-1, 1, n_tok)
        limit = thresholds[rows[:n_tok], IL][:, None]
        rng, shape = np.random.default_rng(1), (n_tok, n_ff)
        above = limit + rng.choice([0.0, 1.0, np.inf, np.nan], shape)  # 0: just enough
        below = np.nextafter(limit, np.float32(-np.inf)) - rng.choice([0.0, 1.0, np.inf], shape)
        scores = np.where(self.ffn.mask, above, below).astype(np.float32)
        fields = {
            "scores": self.sim.array(scores, "scores"),
            "thresholds": self.sim.array(thresholds, "thresholds"),
            "rows": self.sim.array(rows, "rows"),
            "n_tok": self.sim.array(np.array([n_tok], np.int32), "n_tok"),
            **{name: getattr(self, name) for name in ("slot", "mask", "list", "n_list", "heat")},
            **{name: getattr(self, name) for name in ("cold", "cold_list", "n_cold")},
            **{name: getattr(self, name) for name in ("fired", "counters")},
            "n_ff": n_ff,
            "n_layer": N_LAYER,
            "il": IL,
        }
        self.launch("compact", (-(-n_ff // 512), n_tok + room), **{**fields, **changed})

    def rows(self):
        passes = self.ffn.matrices(self.sim)
        for fields in passes:
            self.launch(
                f"ffn_rows_{fields.pop('suffix')}",
                (self.grid, self.ffn.n_tok),
                **fields,
                **{name: getattr(self, name) for name in ("slot", "list", "n_list")},
                **{name: getattr(self, name) for name in ("act", "fired")},
                counters=self.counters if fields is passes[-1] else None,
            )

    def down(self):
        ffn = self.ffn
        columns = 32 * UNITS[ffn.suffix]
        self.launch(
            f"ffn_down_{ffn.suffix}",
            (-(-ffn.n_embd // columns), DOWN_SPLITS, ffn.n_tok),
            down_t=ffn.down_t.matrix(self.sim, ffn.neuron),
            **{name: getattr(self, name) for name in ("slot", "list", "n_list", "act", "parts")},
            n_ff=ffn.n_ff,
        )

    def all(self):
        self.compact()
        self.rows()
        self.down()
        return self

    def results(self):
        names = ("mask", "list", "n_list", "cold", "fired", "act", "parts")
        names += ("counters", "heat", "cold_list", "n_cold")
        return {name: getattr(self, name).numpy() for name in names}

    def check(self):
        """Run all and compare all that is written."""
        self.all()
        self.check_lists()
        ffn, got = self.ffn, self.results()
        act, fired = ffn.expected()
        np.testing.assert_array_equal(got["fired"], fired)
        assert got["counters"].tolist() == ffn.counts()
        ours = np.zeros(act.shape)
        for t, n in enumerate(got["n_list"]):
            ours[t, got["list"][t, :n]] = got["act"][t, :n]
            assert np.isnan(got["act"][t, n:]).all()
        close_enough(ours, act)
        y = got["parts"].astype(np.float64).sum(axis=0)
        close_enough(y, act @ ffn.down_t.values.astype(np.float64))

    def check_lists(self):
        ffn, got = self.ffn, self.results()
        np.testing.assert_array_equal(got["mask"], ffn.mask)
        np.testing.assert_array_equal(got["cold"], ffn.mask & ~ffn.is_resident)
        cold = ffn.mask & ~ffn.is_resident
        for masks, name, n in (
            (ffn.resident_mask, "list", "n_list"),
            (cold, "cold_list", "n_cold"),
        ):
            for t, mine in enumerate(masks):
                listed = np.flatnonzero(mine)
                assert got[n][t] == len(listed)
                np.testing.assert_array_equal(got[name][t, : len(listed)], listed)
                assert (got[name][t, len(listed) :] == -1).all()  # not written
        in_blocks = np.add.reduceat(ffn.mask.sum(axis=0), np.arange(0, ffn.n_ff, BLOCK))
        np.testing.assert_array_equal(got["heat"].view(np.uint32) - np.uint32(HEAT), in_blocks)


@pytest.mark.parametrize("n_ff", [1, 63, 64, 200, 1024, 1500, 5000, 17000])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
def test_compact(n_ff, share):
    run = Run(simulator(), FFN("f32", n_ff=n_ff, share=share, seed=1))
    run.compact()
    run.check_lists()
    assert not run.results()["fired"].any()
    assert run.results()["counters"].tolist() == [3, run.ffn.resident_mask.sum(), 0, 0]


def test_compact_takes_all_where_nothing_predicts():
    """No scores: all that is resident; what is not wanted is not written, nor counted."""
    ffn = FFN(share=1, slots="all")
    assert ffn.mask.all()
    run = Run(simulator(), ffn)
    unwanted = ("scores", "thresholds", "cold", "cold_list", "n_cold", "counters", "heat")
    run.compact(**dict.fromkeys(unwanted))
    got = run.results()
    assert got["mask"].all() and (got["n_list"] == ffn.n_ff).all() and not got["counters"].any()
    assert (got["list"] == np.arange(ffn.n_ff)).all()
    assert (got["cold"] == 0xFF).all() and (got["heat"] == HEAT).all()


def test_compact_without_lists():
    """As for several tokens: all else is the same."""
    ffn = FFN("f32", n_ff=1500, share=0.3, seed=1)
    plain, bare = Run(simulator(), ffn), Run(simulator(), ffn)
    plain.compact()
    bare.compact(**dict.fromkeys(("list", "n_list", "cold_list", "n_cold")))
    expected, got = plain.results(), bare.results()
    for name in ("mask", "cold", "fired", "counters", "heat"):
        np.testing.assert_array_equal(got[name], expected[name])
    for name in ("list", "n_list", "cold_list", "n_cold"):
        assert (got[name] == -1).all()


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats(suffix):
    """Rows of less than a block of ffn_down's has columns, and of more."""
    more = {"q6_k": 2304, "f16": 300}.get(suffix, 1088)
    Run(simulator(), FFN(suffix)).check()
    Run(simulator(), FFN(suffix, n_ff=130, n_embd=more, has_bias=False)).check()


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
    Run(simulator(), FFN(suffix, activation, n_embd=96, up=up)).check()


@pytest.mark.parametrize("slots", ["all", "some", "none"])
@pytest.mark.parametrize("share", [0, 1])
def test_empty_and_full_lists(share, slots):
    for n_ff in (1, 64, 1000):
        Run(simulator(), FFN("q8_0", n_ff=n_ff, share=share, slots=slots)).check()


def test_lists_longer_than_a_turn():
    """More than 8192 places: the warps of ffn_down come round again."""
    Run(simulator(), FFN("f32", n_ff=8500, n_tok=1, share=1, slots="all")).check()


def test_a_damaged_row_shows():
    """NaN of a decider is neither silent nor lost."""
    ffn = FFN("f32", share=1, slots="all", n_tok=1)
    ffn.x[:] = np.nan
    run = Run(simulator(), ffn).all()
    got = run.results()
    assert np.isnan(got["act"]).all() and (got["fired"] == 1).all()
    assert np.isnan(got["parts"].sum(axis=0)).all()


@pytest.mark.parametrize("suffix", ["q4_0", "f16"])
def test_a_token_does_not_depend_on_the_others(suffix):
    ffn = FFN(suffix, n_ff=700, n_tok=5)
    whole = Run(simulator(), ffn).all().results()
    for picked in ([2], [4, 2, 0]):
        part = Run(simulator(), ffn.tokens(picked)).all().results()
        for name in ("mask", "list", "n_list", "cold", "fired", "act"):
            np.testing.assert_array_equal(part[name], whole[name][picked])
        np.testing.assert_array_equal(part["parts"], whole["parts"][:, picked])


def test_results_do_not_depend_on_the_order_of_blocks_and_threads():
    """Nor on how many blocks take the rows of a list in turn."""
    ffn = FFN("q4_0", n_ff=700)
    plain = Run(simulator(), ffn).all().results()
    for grid, seed in ((1, None), (9, None), (2, 1), (5, 2)):
        other = Run(simulator(), ffn, grid, seed).all().results()
        for name, value in plain.items():
            np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("suffix", FORMATS)
def test_check_finds_nothing(suffix):
    Run(simulator(check=True), FFN(suffix, "drelu", n_ff=100, n_tok=2)).check()


FAULTS = {
    # text, what it becomes, the kind of fault that the check finds
    "a token too many": ("if ((t >= n_tok) | (table_row < 0)) return;", "", "out of bounds"),
    "a neuron too many": ("n < p.n_ff ? score", "true ? score", "out of bounds"),
    "a neuron too many is said": (
        "if (n < p.n_ff) {\n        if (p.cold)",
        "{\n        if (p.cold)",
        "race",
    ),
    "counts read before all are there": (
        "p.heat + n / NEURON_BLOCK, n_predicted);\n    }\n    __syncthreads();",
        "p.heat + n / NEURON_BLOCK, n_predicted);\n    }",
        "uninitialised read",
    ),
    "no wait for other kernels": (WAIT, "", "early"),
    "places of other warps": (
        "lane_id() < warp_id()) place",
        "lane_id() + 1 < warp_id()) place",
        "race",
    ),
    "places of other blocks": ("n_hot += predicted && is_there", "n_hot += false", "race"),
    "places of other cold ones": ("n_not += predicted && !is_there", "n_not += false", "race"),
    "a neuron of the CPU's": ("predicted && my_slot >= 0", "predicted", "race"),
    "a neuron beyond the list": ("i < n_list; i +=", "i <= n_list; i +=", "uninitialised read"),
    "every lane writes": (
        "if (lane_id() == 0) {\n            p.act",
        "{\n            p.act",
        "race",
    ),
    "counted by halves": (
        "atomicAdd((unsigned long long*)counters + which, (unsigned long long)n)",
        "counters[which] += n",
        "race",
    ),
    "heat without an atomic": (
        "atomicAdd(p.heat + n / NEURON_BLOCK, n_predicted)",
        "((unsigned*)p.heat)[n / NEURON_BLOCK] += n_predicted",
        "race",
    ),
    "warps' sums read before all are there": (
        "= y[from + e];\n        __syncthreads();",
        "= y[from + e];",
        "uninitialised read",
    ),
    "warps' sums overwritten while they are read": (
        "__syncthreads();  // what the elements before left has been read",
        "",
        "race",
    ),
    "a column too many": ("if (column < p.down_t.cols) {", "{", "race"),
    "more than the threshold": (
        "= !(mine < threshold)",
        "= mine > threshold",
        "uninitialised read",
    ),
    "more than the threshold before": ("!(theirs[k] < threshold)", "theirs[k] > threshold", "race"),
    "the block just before": ("b < block &&", "b < block - 1 &&", "race"),
    "slots of other warps": (
        "COMPACT_THREADS + warp_id() * WARP)",
        "COMPACT_THREADS)",
        "out of bounds",
    ),
    "act by neuron": (
        "p.act[row + i] = neuron.act;",
        "p.act[row + n] = neuron.act;",
        "uninitialised read",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_planted_faults(name):
    text, becomes, kind = FAULTS[name]
    sim = load("ffn.cu", check=True, replace={text: becomes, **only("q4_0", "FFN")})
    with pytest.raises(SimError) as error:
        Run(sim, FFN("q4_0", "drelu", n_ff=1100, n_tok=2)).all()
    assert error.value.kind == kind


WRONG = {
    # Faults that break no rule: only a comparison finds them.
    "the threshold of another layer": ("p.n_layer + p.il]", "p.n_layer + p.il - 1]"),
    "cold without the mask": ("predicted && !listed;", "!listed;"),
    "heat of the resident alone": ("NEURON_BLOCK, n_predicted)", "NEURON_BLOCK, __popc(all))"),
    "fired is not cleared": ("p.fired[row + n] = 0;", "p.fired[row + n] = 1;"),
    "the wrong slot": (
        "slot[n / NEURON_BLOCK] * NEURON_BLOCK + n % NEURON_BLOCK",
        "slot[n / NEURON_BLOCK] * NEURON_BLOCK + (n + 1) % NEURON_BLOCK",
    ),
    "slots left out": (
        "slot[n / NEURON_BLOCK] * NEURON_BLOCK + n % NEURON_BLOCK",
        "n",
    ),
    "the bias of a place": ("p.decider_bias[n]", "p.decider_bias[i]"),
    "fired by place": ("p.fired[row + n] = neuron.fired;", "p.fired[row + i] = neuron.fired;"),
    "up before its relu": ("up = up < 0 ? 0 : up;", ""),
    "half fired as fired": ("up == 0 ? HALF_FIRED : FIRED", "FIRED"),
    "rows of up that are not read": ("n_decided++;", "n_decided += 2;"),
    "a place left out": ("left &= left - 1;", "left &= left - 1, left &= left - 1;"),
    "a split left out": (
        "first = blockIdx.y * WARPS + warp_id();",
        "first = blockIdx.y * WARPS + warp_id() + 1;",
    ),
    "act of the first place": ("my_act, lane);", "my_act, 0);"),
    "a warp's sum left out": (
        "for (int w = 0; w < WARPS; w++) sum += sums[w]",
        "for (int w = 1; w < WARPS; w++) sum += sums[w]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_comparison_finds_planted_faults(name):
    text, becomes = WRONG[name]
    sim = load("ffn.cu", replace={text: becomes, **only("q4_0", "FFN")})
    ffn = FFN("q4_0", "drelu", n_ff=2500, n_tok=2)
    with pytest.raises(AssertionError):
        Run(sim, ffn).check()


def test_a_score_of_minus_infinity_is_below_every_threshold():
    """So that masks that come from elsewhere can be told by scores."""
    run = Run(load("ffn.cu", replace=only("q4_0", "FFN")), FFN("f32", n_ff=700))
    scores = np.where(run.ffn.mask, np.inf, -np.inf).astype(np.float32)
    thresholds = np.full((run.ffn.n_tok, N_LAYER), -np.inf, np.float32)
    sim = run.sim
    run.compact(scores=sim.array(scores, "s"), thresholds=sim.array(thresholds, "t"))
    run.check_lists()


def test_comparison_finds_blocks_before_that_are_left_out():
    """Beyond the 32 that are looked at together."""
    text, becomes = "resident = which_are_resident(from += WARP)", "from += block"
    sim = load("ffn.cu", replace={text: becomes, **only("q4_0", "FFN")})
    run = Run(sim, FFN("f32", n_ff=17000))
    run.compact()
    with pytest.raises(AssertionError):
        run.check_lists()


ACTIVATION_FAULTS = {
    "fatrelu": (
        "FATRELU: return x < threshold ? 0 : x",
        "FATRELU: return x < threshold ? 0 : x - threshold",
    ),
    "relu2": ("return positive * positive;", "return positive;"),
    "silu": ("expf(-x)", "expf(x)"),
    "gelu": ("/ 1.41421356f", "/ 1.41421356f * 1.01f"),
    "relu": ("x < 0 ? 0 : x", "x < -0.1f ? 0 : x"),
}


@pytest.mark.parametrize("activation", ACTIVATION_FAULTS)
def test_comparison_finds_wrong_activations(activation):
    text, becomes = ACTIVATION_FAULTS[activation]
    sim = load("ffn.cu", replace={text: becomes, **only("f32", "FFN")})
    with pytest.raises(AssertionError):
        Run(sim, FFN("f32", activation)).check()
