"""Sampling: each step by itself, and what a seed promises."""

import numpy as np
import pytest
from powerinfer.runtime.errors import ModelError, RequestError
from powerinfer.runtime.sampling import Sampler, SamplingOptions

LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1], np.float32))
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def shares(history=(), n=4000, **options):
    """Return how often each token is drawn."""
    sampler = Sampler(SamplingOptions(**({"seed": 1} | OFF | options)), len(LOGITS))
    drawn = [sampler.sample(LOGITS, list(history)) for _ in range(n)]
    return np.bincount(drawn, minlength=len(LOGITS)) / n


def test_draws_follow_the_distribution():
    assert np.abs(shares() - np.exp(LOGITS)).max() < 0.03


def test_temperature():
    assert Sampler(SamplingOptions(temperature=0), 5).sample(LOGITS, []) == 1
    expected = np.exp(LOGITS / 0.5) / np.exp(LOGITS / 0.5).sum()
    assert np.abs(shares(temperature=0.5) - expected).max() < 0.03


def test_cuts():
    assert np.flatnonzero(shares(top_k=2)).tolist() == [1, 2]
    assert np.flatnonzero(shares(top_k=99)).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(shares(top_p=0.6)).tolist() == [1, 2]
    assert np.flatnonzero(shares(top_p=0.3)).tolist() == [1]
    assert np.flatnonzero(shares(min_p=0.3)).tolist() == [1, 2, 3]
    # top-p looks at the probabilities among the top k
    assert np.flatnonzero(shares(top_k=2, top_p=0.5)).tolist() == [1]


def test_ties_go_to_the_lower_token():
    sampler = Sampler(SamplingOptions(top_k=1, seed=0), 5)
    assert {sampler.sample(np.zeros(5, np.float32), []) for _ in range(20)} == {0}


@pytest.mark.parametrize("n_vocab", [5, 64, 1000, 32000])
def test_cuts_are_those_of_a_full_sort(n_vocab):
    """Many equal logits among them, of which the lower tokens come first."""
    rng = np.random.default_rng(n_vocab)
    for i in range(100):
        logits = np.round(rng.standard_normal(n_vocab) * rng.choice([0.01, 1, 3]), i % 3)
        cuts = {"top_k": rng.choice([0, 1, 2, 40, 100]), "top_p": rng.choice([0.01, 0.5, 0.95, 1])}
        options = SamplingOptions(**cuts, min_p=rng.choice([0, 0.05, 1]), seed=i)
        x = logits.astype(np.float32).astype(np.float64)
        order = np.lexsort((np.arange(n_vocab), -x))[: options.top_k or None]
        p = np.exp(x[order] - x.max())
        p /= p.sum()
        n = min(np.searchsorted(np.cumsum(p), options.top_p) + 1, len(p))
        n = min(n, np.count_nonzero(p >= options.min_p * p[0]))
        p = np.exp((x[order[:n]] - x.max()) / options.temperature)
        draw = np.random.default_rng(i).random() * p.sum()
        expected = order[min(np.searchsorted(np.cumsum(p), draw, side="right"), n - 1)]
        assert Sampler(options, n_vocab).sample(logits.astype(np.float32), []) == expected


def greedy(history, **options):
    sampler = Sampler(SamplingOptions(temperature=0, **options), len(LOGITS))
    return sampler.sample(np.array([1.0, 0.9, -1, -2, -3], np.float32), history)


def test_penalties():
    assert greedy([0]) == 0
    assert greedy([0], repeat_penalty=1.2) == 1
    assert greedy([1], repeat_penalty=1.2) == 0
    assert greedy([0], presence_penalty=0.2) == 1
    assert greedy([0], frequency_penalty=0.04) == 0
    assert greedy([0] * 3, frequency_penalty=0.04) == 1
    assert greedy([0, *[3] * 70], repeat_penalty=1.2) == 0  # too long ago
    assert greedy([0, *[3] * 70], repeat_penalty=1.2, penalty_last_n=-1) == 1
    assert greedy([0], repeat_penalty=1.2, penalty_last_n=0) == 0
    # Negative logits get more negative.
    sampler = Sampler(SamplingOptions(temperature=0, repeat_penalty=2.0), 2)
    assert sampler.sample(np.array([-1.0, -1.5], np.float32), [0]) == 1


def test_logit_bias():
    assert greedy([], logit_bias={4: 10.0}) == 4
    assert greedy([], logit_bias={0: float("-inf")}) == 1
    with pytest.raises(RequestError, match="names token 5"):
        Sampler(SamplingOptions(logit_bias={5: 1.0}), 5)


def test_seed():
    def draw(seed):
        sampler = Sampler(SamplingOptions(seed=seed, **OFF), 5)
        return [sampler.sample(LOGITS, []) for _ in range(50)]

    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repeat_penalty": 0},
        {"penalty_last_n": -2},
        {"seed": -1},
        {"presence_penalty": float("inf")},
        {"logit_bias": {1: float("nan")}},
    ],
)
def test_out_of_range(options):
    with pytest.raises(RequestError, match=f"{next(iter(options)).replace('_', '.')}"):
        SamplingOptions(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad):
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(ModelError, match="not finite"):
        Sampler(SamplingOptions(), 5).sample(logits, [])


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 200])
def test_penalties_look_at_the_last_tokens(length):
    """64 of them, or all there are."""
    sampler = Sampler(SamplingOptions(temperature=0, presence_penalty=1.0), 200)
    logits = np.zeros(200)
    sampler._penalise(logits, list(range(length)))
    assert np.flatnonzero(logits).tolist() == list(range(max(0, length - 64), length))


def test_no_token_left():
    banned = {i: float("-inf") for i in range(5)}
    for temperature in (0, 1):
        sampler = Sampler(SamplingOptions(temperature=temperature, logit_bias=banned), 5)
        with pytest.raises(RequestError, match="leave no token"):
            sampler.sample(LOGITS, [])


def test_tiny_temperature_is_greedy():
    for temperature in (1e-6, 1e-300, 1e-320):
        assert Sampler(SamplingOptions(temperature=temperature), 5).sample(LOGITS, []) == 1
