"""The demo model that is shipped: made from its checkpoint, and as good as the README says."""

import numpy as np
import pytest
from conftest import DEMO
from powerinfer.predictors.measure import measure
from powerinfer.predictors.text import windows
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.tools.demo_model import demo_model

import powerinfer


def test_it_is_the_checkpoint(demo_gguf):
    """Every byte, but for the order of the neurons and the predictors."""
    shipped, plain = GGUFFile(demo_model()), GGUFFile(demo_gguf("q4_0"))
    added = set(shipped.tensors) - set(plain.tensors)
    assert {name.split(".", 2)[2] for name in added} == {
        "fc1.weight",
        "fc2.weight",
        "fc2.bias",
        "ffn_perm",
        "ffn_freq",
    }
    for name, tensor in plain.tensors.items():
        wanted = tensor.data
        if ".ffn_" in name and "norm" not in name:
            il = name.split(".")[1]
            wanted = wanted[shipped.tensors[f"blk.{il}.ffn_perm"].numpy()]
        assert np.array_equal(shipped.tensors[name].data, wanted), name


@pytest.fixture(scope="module")
def quality():
    with powerinfer.open(demo_model()) as llm, powerinfer.open(demo_model(), exact=True) as base:
        texts = windows(llm, (DEMO / "heldout.txt").read_text("utf-8"), 512, 8192)
        return measure(llm, texts, base), measure(base, texts)


def test_quality_on_text_it_has_never_seen(quality):
    predicted, exact = quality
    for layer in predicted.layers:
        assert layer.recall > 0.93
        assert layer.predicted_share < 2.5 * layer.firing_share
    assert np.mean([layer.recall for layer in predicted.layers]) > 0.945
    assert abs(predicted.divergence.log_ratio.mean) < 0.005
    assert predicted.traffic.total < exact.traffic.total
    with powerinfer.open(demo_model(), dense=True) as llm:
        dense = sum(t.nbytes for la in llm.weights.layers for t in (la.decider, la.up, la.down_t))
    assert predicted.traffic.ffn < exact.traffic.ffn < dense
