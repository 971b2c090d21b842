"""sample.cu in the simulator against NumPy: ties, NaN, infinities, lists of several blocks."""

from functools import cache

import numpy as np
import pytest
from cuda_case import launch
from cusim.sim import WAIT, SimError, load, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

BLOCK = 4096  # entries of a list that a block looks at
ROOM = 1  # tokens that the grid has beyond those that there are


@cache
def simulator(check=False):
    return load("sample.cu", check=check)


def logits(n, n_tok=2, seed=0):
    """Return [n_tok, n] with many equal values, zeros of both signs, infinities and some NaN."""
    rng = np.random.default_rng([seed, n])
    values = rng.integers(-40, 40, (n_tok, n)).astype(np.float32) / 4
    values[values == 0] *= rng.choice([-1, 1], np.count_nonzero(values == 0))
    for special in (-np.inf, np.nan):
        values[rng.random(values.shape) < 0.05] = special
    return values


def in_order(values):
    """Return the indices [n_tok, n] in descending order of values; equal: the lower; NaN last."""
    key = np.where(np.isnan(values), np.inf, -values)
    indices = np.broadcast_to(np.arange(values.shape[1]), key.shape)
    return np.lexsort((indices, np.isnan(values), key))  # by the last of them first


class Run:
    """`best` are values and indices [n_tok, k] of the kernel, launched until a block is left."""

    def __init__(self, sim, values, k=0, order_seed=None):
        n_tok, n = values.shape
        grid_tok = n_tok + ROOM
        fields = {"counts": sim.array(np.array([n_tok], np.int32), "counts")}
        kernel = "argmax"
        if k:
            kernel, fields["k"] = "top_k", k
        values_at, indices_at, width = sim.array(values, "values"), None, k or 1
        self.n_launches = 0
        while True:
            blocks = -(-n // BLOCK)
            if kernel == "argmax" and indices_at is not None:
                blocks = 1
            best_values = sim.empty((grid_tok, blocks * width), np.float32, "best_values")
            best_indices = sim.empty((grid_tok, blocks * width), np.int32, "best_indices")
            launch(
                sim, kernel, (blocks, grid_tok), order_seed, **fields, n=n,
                values=values_at, indices=indices_at,
                best_values=best_values, best_indices=best_indices,
            )  # fmt: skip
            values_at, indices_at, n = best_values, best_indices, blocks * width
            self.n_launches += 1
            if blocks == 1:
                break
        self.best = best_values.numpy(), best_indices.numpy()
        for part in self.best:  # what is no token stays unwritten
            assert (part[n_tok:].view(np.uint8) == 0xFF).all()
        self.best = tuple(part[:n_tok] for part in self.best)


def check(sim, values, k=0, order_seed=None):
    got_values, got_indices = Run(sim, values, k, order_seed).best
    n = min(k or 1, values.shape[1])
    order = in_order(values)[:, :n]
    np.testing.assert_array_equal(got_indices[:, :n], order)
    theirs = np.take_along_axis(values, order, axis=1)
    numbers = ~np.isnan(theirs)
    np.testing.assert_array_equal(got_values[:, :n][numbers], theirs[numbers])
    assert (got_indices[:, n:] == -1).all() and (got_values[:, n:] == -np.inf).all()


@pytest.mark.parametrize("n", [1, 2, 31, 257, 4095, 4096, 4097, 32000])
def test_argmax(n):
    check(simulator(), logits(n))


@pytest.mark.parametrize("n", [1, 39, 1000, 4096, 4097, 32000])
@pytest.mark.parametrize("k", [1, 40, 1000])
def test_top_k(n, k):
    check(simulator(), logits(n), k)


def test_a_long_list_takes_two_launches_and_four():
    values = logits(262144, 1)
    assert Run(simulator(), values, 40).n_launches == 2
    assert Run(simulator(), values[:, :128000], 1024).n_launches == 4
    check(simulator(), values, 40)
    check(simulator(), values)


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("value", [-np.inf, 0.0, np.inf, np.nan])
def test_all_equal(value, k):
    """The lowest indices; of zeros the sign does not count."""
    values = np.full((2, 5000), value, np.float32)
    if value == 0:
        values[:, ::2] = -0.0
    check(simulator(), values, k)


@pytest.mark.parametrize("k", [0, 3])
def test_extremes(k):
    values = np.array([[-np.inf, 1e-45, -1e-45, 3.4e38, np.nan, -3.4e38, np.inf]], np.float32)
    check(simulator(), values, k)
    check(simulator(), values[:, :3], k)


@pytest.mark.parametrize("k", [0, 40])
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(k):
    values = logits(9000)
    plain = Run(simulator(), values, k)
    for seed in (1, 2):
        other = Run(simulator(), values, k, seed)
        for ours, theirs in zip(plain.best, other.best, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("k", [0, 5])
def test_a_token_does_not_depend_on_the_others(k):
    values = logits(5000, 3)
    whole = Run(simulator(), values, k).best
    alone = Run(simulator(), values[2:], k).best
    for ours, theirs in zip(alone, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[2:])


@pytest.mark.parametrize("k", [0, 5])
def test_check_finds_nothing(k):
    check(simulator(check=True), logits(4100, 1), k)


FAULTS = {
    # k, text, what it becomes, the kind of fault that the check finds
    "no wait for other kernels": (5, WAIT, "", "early"),
    "no wait of argmax for other kernels": (0, WAIT, "", "early"),
    "an entry too many": (5, "if (i >= n) return 0;", "if (i > n) return 0;", "out of bounds"),
    "a token too many": (
        0,
        "if (t >= p.counts[0]) return;\n    Rank best",
        "Rank best",
        "out of bounds",
    ),
    "bests read before all are there": (
        0,
        "bests[warp_id()] = best;\n    __syncthreads();",
        "bests[warp_id()] = best;",
        "uninitialised read",
    ),
    "every thread writes": (0, "if (threadIdx.x != 0) return;", "", "race"),
    "no barrier between comparisons": (
        5,
        "apart > 0; apart /= 2) {\n            __syncthreads();",
        "apart > 0; apart /= 2) {",
        "uninitialised read",
    ),
    "ranks written before the last comparison": (
        200,
        "    __syncthreads();\n    const long long at",
        "    const long long at",
        "race",
    ),
    "a rank too many": (5, "i < p.k; i += SORT", "i <= p.k; i += SORT", "race"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_planted_faults(name):
    k, text, becomes, kind = FAULTS[name]
    sim = load("sample.cu", check=True, replace={text: becomes})
    with pytest.raises(SimError) as error:
        Run(sim, logits(3000), k)
    assert error.value.kind == kind


WRONG = {
    # k, and faults that break no rule: only a comparison finds them.
    "the highest index": (0, "<< 32 | ~unsigned(index)", "<< 32 | unsigned(index)"),
    "NaN is the largest": (0, "value != value ? 0 :", "value != value ? ~0u :"),
    "-0 is less than 0": (0, "value == 0 ? 0 : value", "value"),
    "negative ones the wrong way": (0, "bits >> 31 ? ~bits :", "bits >> 31 ? bits :"),
    "a warp left out": (0, "for (int w = 1; w < 256", "for (int w = 2; w < 256"),
    "values as they are ranked": (0, "key & 0x7fffffffu : ~key", "key : ~key"),
    "indices of the list": (0, "indices ? indices[row * n + i] : i", "i"),
    "what is missing counts": (5, "index < 0 ? 0 : rank_of", "rank_of"),
    "ascending": (5, "(i & size) == 0", "(i & size) != 0"),
    "half a network": (5, "apart > 0; apart /= 2", "apart > 0; apart /= 4"),
    "shares that overlap": (5, "blockIdx.x * SORTED + i, p.n", "blockIdx.x * SORTED / 2 + i, p.n"),
}


@pytest.mark.parametrize("name", WRONG)
def test_comparison_finds_planted_faults(name):
    k, text, becomes = WRONG[name]
    sim = load("sample.cu", replace={text: becomes})
    zeros = np.full((1, 5000), -1, np.float32)
    zeros[0, 3], zeros[0, 4500] = -0.0, 0.0
    early = -np.abs(np.arange(9000, dtype=np.float32) - 40)[None]
    nothing = np.full((1, 4098), np.nan, np.float32)  # the second block has fewer than k
    with pytest.raises(AssertionError):
        for values in (logits(9000), logits(600) - 100, zeros, early, early[:, ::-1], nothing):
            check(sim, values, k)
