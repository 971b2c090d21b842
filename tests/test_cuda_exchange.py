"""exchange.cu in the simulator: words that count from a base, and wrap; planted faults."""

import numpy as np
import pytest
from cuda_case import launch
from cusim.sim import WAIT, SimError, load, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


def run(kernel, word, base, number, **options):
    """Return what is in the word after a kernel."""
    sim = load("exchange.cu", check=True, **options)
    sim.time_limit = 0.2
    word_at, base_at = (
        sim.array(np.array([x], np.int32), name) for x, name in ((word, "word"), (base, "base"))
    )
    launch(sim, kernel, 1, word=word_at, base=base_at, number=number)
    return int(word_at.numpy()[0])


@pytest.mark.parametrize(
    ("base", "number", "becomes"), [(0, 1, 1), (40, 2, 42), (2**31 - 1, 1, -(2**31)), (-3, 2, -1)]
)
def test_write(base, number, becomes):
    assert run("write_word", 7, base, number) == becomes


@pytest.mark.parametrize(
    ("word", "base", "number"), [(3, 1, 2), (9, 1, 2), (-(2**31), 2**31 - 1, 1), (5, -2, 1)]
)
def test_wait_ends(word, base, number):
    assert run("wait_word", word, base, number) == word


@pytest.mark.parametrize(("word", "base", "number"), [(2, 1, 2), (2**31 - 1, 2**31 - 1, 1)])
def test_wait_does_not_end(word, base, number):
    with pytest.raises(SimError) as error:
        run("wait_word", word, base, number)
    assert error.value.kind == "endless"


def test_planted_faults():
    with pytest.raises(SimError):
        run("wait_word", 3, 1, 2, replace={"value) < 0": "value) <= 0"})
    assert run("write_word", 0, 1, 2, replace={"= int(value);": "= int(value) - 1;"}) != 3
    for kernel in ("write_word", "wait_word"):
        with pytest.raises(SimError) as error:
            run(kernel, 3, 1, 2, replace={WAIT: ""})
        assert error.value.kind == "early"
