"""Thresholds that follow the text."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DEMO, ROOT
from powerinfer.runtime import adapt
from powerinfer.runtime.step import FIRED
from powerinfer.tools.demo_model import demo_model
from powerinfer.tools.shift import trace, windowed

import powerinfer


def other_text():
    """Nothing like the Bible: code."""
    return (ROOT / "runtime" / "formats.py").read_text("utf-8")


def written(**options):
    with powerinfer.open(demo_model(), **options) as llm:
        prompt = llm.tokenize(other_text())[:150]
        tokens = llm.generate_tokens(prompt, max_tokens=60, temperature=0, ignore_eos=True)
        return list(tokens), llm.timings.rows_share


def test_runs_repeat_for_any_threads_and_chunks():
    first = written(threads=1, chunk=512)
    assert first[1] != written(adapt=False)[1]  # it does something
    for threads, chunk in ((1, 512), (2, 512), (3, 64)):
        assert written(threads=threads, chunk=chunk) == first


def test_frozen_where_nobody_generates():
    ids = list(range(300, 400))
    with powerinfer.open(demo_model()) as a, powerinfer.open(demo_model(), adapt=False) as b:
        assert np.array_equal(a.logits(ids), b.logits(ids))
        list(a.generate(other_text()[:300], max_tokens=30, temperature=0))
        assert np.array_equal(a.logits(ids), b.logits(ids))  # nor does it leave a trace
        assert b.adapter() is None
    with powerinfer.open(demo_model(), sparse_threshold=0.0) as llm:
        assert llm.adapter() is None
    with powerinfer.open(demo_model(), exact=True) as llm:
        assert llm.adapter() is None


def test_files_without_a_record_stay_as_they_are(tiny_gguf):
    with powerinfer.open(tiny_gguf("mha", "f16", True)) as llm:
        assert llm.mode == "predicted" and llm.adapter() is None


def test_audits_cost_what_they_may():
    with powerinfer.open(demo_model()) as llm:
        adapter = llm.adapter()
        interval = adapt.audit_interval(llm.weights)
        n = 5000
        audited = sum(map(adapter.is_due, range(n)))
        # Where both say the same token, it is audited once.
        assert 0 <= adapt.START + n // interval - audited <= adapt.SPAN // interval + 1
        cost = sum(la.decider.nbytes + adapt.OVERHEAD for la in llm.weights.layers) / interval
        ids = llm.tokenize((DEMO / "heldout.txt").read_text("utf-8"))[:200]
        from powerinfer.runtime.traffic import traffic

        read = traffic(llm.weights, llm.mode, llm.read(ids)).total
    assert cost / read < 1.2 * adapt.SHARE


class Scores:
    """Ops of a model whose one layer gives chosen scores, all of them to neurons that fire."""

    def __init__(self, scores, fires=True):
        self.plan = SimpleNamespace(
            step=SimpleNamespace(audit=np.zeros(1, np.int32)),
            buffers=SimpleNamespace(
                scores=np.asarray(scores, np.float32)[None],
                truth=np.full(len(scores), FIRED if fires else 0, np.uint8),
            ),
        )

    def audit(self, il):
        assert il == 0


def audited(scores, start, times=200, fires=True):
    """Return the threshold after each of so many audits that all find these scores."""
    with powerinfer.open(demo_model()) as llm:
        adapter = adapt.Adapter(
            dataclasses.replace(llm.config, n_layer=1, target_recall=0.9),
            llm.weights,
            np.array([start], np.float32),
        )
    found, number = [], 0
    while len(found) < times:
        if adapter.prepare(number, 1):
            adapter.before_ffn(Scores(scores, fires), 0)
            adapter.settle()
            found.append(float(adapter.thresholds[0]))
        number += 1
    return found


def test_thresholds_go_where_the_wanted_share_passes():
    scores = np.random.default_rng(5).standard_normal(400).astype(np.float32)
    for start in (3.0, -6.0):
        found = np.array(audited(scores, start))
        steps = np.abs(np.diff(found, prepend=start))
        assert steps.max() <= adapt.MAX_STEP * np.ptp(scores) * 1.0001  # bounded
        assert 0.89 < (scores >= found[-1]).mean() < 0.935


def test_thresholds_stay_where_chance_explains_the_difference():
    scores = np.random.default_rng(5).standard_normal(400).astype(np.float32)
    start = float(np.quantile(scores, 0.09))
    assert set(audited(scores, start)) == {np.float32(start)}
    assert audited(scores, 1.5, times=3, fires=False) == [1.5] * 3


def test_the_first_token_and_cuts_of_the_prompt():
    with powerinfer.open(demo_model()) as llm:
        adapter = llm.adapter()
        assert not adapter.is_due(0)  # an attention sink
        whole = [i for i in range(200) if adapter.is_due(i)]
        assert whole[: adapt.START] == [19, 57, 94, 132]
        for cut in (1, 7, 60):
            due, adapter = [], llm.adapter()
            for first in range(0, 200, cut):
                n = min(cut, 200 - first)
                assert adapter.prepare(first, n) == bool(adapter._due)
                due += [first + t for t in adapter._due]
            assert due == whole


def test_another_kind_of_text():
    """Predictors made on the Bible, numbers to read: audits bring the recall back."""
    numbers = np.random.default_rng(6).integers(0, 10**6, 200)
    with powerinfer.open(demo_model()) as llm:
        ids = llm.tokenize(" ".join(map(str, numbers)))[:500]
        frozen, _ = windowed(trace(llm, ids, adapt=False), 100)
        recall, predicted = windowed(trace(llm, ids, adapt=True), 100)
        target = llm.config.target_recall
    assert target == pytest.approx(0.95)
    assert frozen.max() < target - 0.01  # the text is a different one
    assert recall[2:].min() > target - 0.007
    assert predicted.max() < 3
