"""Predictors in closed form and by gradient descent; ranks, thresholds, candidates."""

import dataclasses
import json

import numpy as np
import pytest
from powerinfer.predictors import refine
from powerinfer.predictors.capture import LayerCapture, capture
from powerinfer.predictors.factors import Factors, Signs
from powerinfer.predictors.fit import (
    Candidate,
    Goals,
    assess,
    choose,
    load_candidates,
    predictor_type,
    ranks_for,
    save_candidates,
    threshold_for,
)
from powerinfer.predictors.predictor import storable, with_predictors
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import RequestError
from powerinfer.runtime.formats import GGMLType, decode
from powerinfer.runtime.weights import load_model
from truth import (
    EXACT,
    TEXTS,
    captured,
    kept,
    random_predictor,
)

# -- a predictor ------------------------------------------------------------------------------


def layer_data(path, folder, il):
    return load_model(path).weights.layers[il], captured(path, folder)[il]


@pytest.mark.parametrize("name", ["mha", "bias", "falcon7", "opt"])
def test_factors_of_full_rank_are_the_decider(name, tiny_gguf, tmp_path):
    layer, data = layer_data(tiny_gguf(name, "f32"), tmp_path, 1)
    predictor = Factors(layer, data).predictor(2 * 64)
    assert predictor.fc1.shape == (128, 64) and predictor.fc2.shape == (data.n_ff, 128)
    x = data.x(slice(50))
    wanted = x @ layer.decider.float32().T
    wanted += 0 if layer.decider_bias is None else layer.decider_bias.numpy()
    assert np.abs(predictor.scores(x) - wanted).max() < 1e-3 * wanted.std()
    other = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    wanted = predictor.scores(other) - other @ layer.decider.float32().T
    assert np.ptp(wanted, axis=0).max() < 2e-3  # the bias; on any input


@pytest.mark.parametrize("rows", [0, 5])
def test_factors_of_a_decider_that_is_nearly_nothing(rows, tiny_gguf, tmp_path):
    """Of no rank, or of little: what is left are zeros, not their quotients."""
    layer, data = layer_data(tiny_gguf("mha", "f32"), tmp_path, 1)
    w = layer.decider.float32().copy()
    w[rows:] = 0
    tensor = dataclasses.replace(layer.decider, data=w.view(np.uint8))
    predictor = Factors(dataclasses.replace(layer, decider=tensor), data).predictor(128)
    x = data.x(slice(50))
    assert np.abs(predictor.scores(x) - x @ w.T).max() <= 1e-3


def test_factors_serve_the_inputs_there_are(demo):
    """Less error with every rank; and less than the decider's own singular vectors leave."""
    layer, data = demo.layer, demo.data
    w, x = layer.decider.float32(), data.x(slice(None))
    truth = x @ w.T
    factors = Factors(layer, data)
    left, values, right = np.linalg.svd(w, full_matrices=False)
    errors = []
    for rank in (32, 64, 128, 256):
        k = rank // 2
        plain = x @ right[:k].T * values[:k] @ left[:, :k].T - truth
        plain -= plain.mean(axis=0)  # with the best of biases
        errors.append(np.square(factors.predictor(rank).scores(x) - truth).mean())
        assert errors[-1] < 0.98 * np.square(plain).mean()
    assert np.all(np.diff(errors) < 0) and errors[-1] < 0.5 * errors[0]


def test_signs(tiny_gguf, tmp_path):
    layer, data = layer_data(tiny_gguf("mha", "f32"), tmp_path, 0)
    x, w = data.x(slice(5)), layer.decider.float32()
    agree = (np.signbit(x)[:, None] == np.signbit(w)[None]).sum(axis=2)  # [n_tok, n_ff]
    signs = Signs(layer)
    assert np.array_equal(signs.scores(x), 2 * agree - 64)
    assert signs.nbytes == 96 * 64 / 8


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ["mha", "falcon7", "opt"])
def test_the_runtime_gives_a_predictors_scores(name, type_, tiny_gguf):
    """Those of the matrices as stored, on the FFN's normed input, at the layer's threshold."""
    model, type_ = load_model(tiny_gguf(name, "f16")), GGMLType[type_]
    n_ff = model.config.n_ff
    predictors = [random_predictor(0, 64, n_ff), random_predictor(1, 64, n_ff, 64)]
    amended = with_predictors(model, predictors, type_)
    with Engine(amended, RunOptions(mode="predicted", threads=2)) as engine:
        keep = kept(engine, TEXTS)
    for il, p in enumerate(predictors):
        scores = keep["scores", il]
        assert np.array_equal(keep["mask", il], scores >= np.float32(0.5 - il))
        stored = p.stored(type_)
        assert np.array_equal(stored.bias, p.bias) and stored.threshold == p.threshold
        expected = stored.scores(keep["h", il])
        tensors = {t.name: t for t in p.tensors(il, type_)}
        fc1, fc2 = (tensors[f"blk.{il}.{n}.weight"].float32() for n in ("fc1", "fc2"))
        assert np.array_equal(fc1, stored.fc1) and np.array_equal(fc2, stored.fc2)
        assert fc1.shape == p.fc1.shape and fc2.shape == p.fc2.shape
        assert tensors[f"blk.{il}.fc2.bias"].numpy().tolist() == p.bias.tolist()
        hidden = np.maximum(keep["h", il] @ fc1.T, 0)
        assert np.allclose(expected, hidden @ fc2.T + p.bias, atol=1e-3)
        # Activations meet integers rounded to 8 bits.
        tolerance = 3e-2 if type_ in (GGMLType.Q8_0, GGMLType.Q4_0) else 1e-5
        assert np.abs(scores - expected).max() < tolerance * expected.std() * 4
        far = np.square(fc1 - p.fc1).mean() / np.square(p.fc1).mean()
        assert far <= {"F32": 0, "F16": 1e-6, "Q8_0": 1e-4}.get(type_.name, 2e-2)
        assert p.nbytes(type_) == sum(t.nbytes for t in p.tensors(il, type_)[:2])


def test_rows_that_are_not_whole_blocks():
    assert storable(GGMLType.Q4_0, 48) is GGMLType.F16
    assert storable(GGMLType.Q4_0, 64) is GGMLType.Q4_0
    p = random_predictor(0, 48, 10)
    fc1, fc2, bias = p.tensors(3, GGMLType.Q8_0)
    assert (fc1.type, fc2.type, bias.type) == (GGMLType.F16, GGMLType.Q8_0, GGMLType.F32)
    assert p.nbytes(GGMLType.Q8_0) == 32 * 48 * 2 + 10 * 34 == fc1.nbytes + fc2.nbytes
    stored = p.stored(GGMLType.Q8_0)
    assert np.array_equal(stored.fc1, p.fc1.astype(np.float16))
    assert np.array_equal(stored.fc2, decode(GGMLType.Q8_0, fc2.data))


# -- fitting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [0.05, 0.5, 0.9, 0.95, 0.99, 0.9999])
@pytest.mark.parametrize("n", [1, 2, 19, 20, 100, 12345])
def test_thresholds(n, recall):
    scores = np.random.default_rng(n).permutation(n).astype(np.float32)
    threshold = threshold_for(scores, recall)
    assert np.mean(scores >= threshold) >= recall
    if n > 1 and threshold + 1 < n:  # the next larger one would not do
        assert np.mean(scores >= threshold + 1) < recall + 1e-9
    few = np.round(scores / n * 3)  # many are equal
    assert np.mean(few >= threshold_for(few, recall)) >= recall


def test_threshold_where_nothing_fires():
    assert threshold_for(np.zeros(0, np.float32), 0.95) == 0


def test_ranks():
    assert ranks_for(4096) == [128, 256, 512, 1024, 2048]
    assert ranks_for(768) == [32, 96, 192, 384]
    assert ranks_for(256) == [32, 64, 128]
    assert ranks_for(64) == [32]


def test_assess(tiny_gguf, tmp_path):
    layer, data = layer_data(tiny_gguf("mha", "f32"), tmp_path, 0)
    p = random_predictor(0, 64, 96)
    found = assess(p, data, GGMLType.Q4_0, layer, 0.9)
    stored, fires = p.stored(GGMLType.Q4_0), data.fired(slice(None))
    mask = stored.scores(data.x(slice(None))) >= found.predictor.threshold
    assert np.array_equal(found.predictor.fc1, stored.fc1)
    assert 0.9 <= (mask & fires).sum() / fires.sum() < 0.905
    assert found.share == pytest.approx(mask.mean(), abs=1e-4)
    assert found.firing == pytest.approx(fires.mean())
    assert found.nbytes == 18 * (32 * 2 + 96)
    assert found.cost == pytest.approx(found.nbytes + found.share * 4 * 64 * 96)


def test_default_type_of_predictors(tiny_gguf):
    for outtype, type_ in (("f16", "Q8_0"), ("q8_0", "Q8_0"), ("q5_1", "Q4_0"), ("q4_0", "Q4_0")):
        assert predictor_type(load_model(tiny_gguf("mha", outtype))) is GGMLType[type_]


def layers_of_candidates(seed=0):
    """Six layers; shares fall with rank, firing is 0.1."""
    rng, p = np.random.default_rng(seed), random_predictor(0, 32, 4)
    return [
        [
            Candidate(p, share, 0.1, nbytes, nbytes + share * 8000)
            for share, nbytes in zip(np.sort(rng.random(4))[::-1], (64, 128, 256, 512), strict=True)
        ]
        for _ in range(6)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_choices_respect_the_budget(seed):
    layers, goals = layers_of_candidates(seed), Goals(max_share=5)
    free = choose(layers, goals, 10**9)
    goods = [[c for c in found if c.share <= 0.5] or found for found in layers]
    least = sum(good[0].nbytes for good in goods)  # that max_share needs
    for good, chosen in zip(goods, free, strict=True):
        assert chosen.cost == min(c.cost for c in good)
    spent, last = sum(c.nbytes for c in free), sum(c.cost for c in free)
    for budget in range(spent - 1, 6 * 64 - 1, -61):
        chosen = choose(layers, goals, budget)
        total, cost = sum(c.nbytes for c in chosen), sum(c.cost for c in chosen)
        assert total <= budget
        assert total < least or all(c in good for c, good in zip(chosen, goods, strict=True))
        assert (total < least) is (budget < least)
        assert all(c in found for c, found in zip(chosen, layers, strict=True))
        assert budget - total < 256  # one step more was needed, not two
        last = cost
    assert last > 0 and choose(layers, goals, 6 * 64) == [found[0] for found in layers]
    with pytest.raises(RequestError, match="need 384 bytes, --max-size allows 383"):
        choose(layers, goals, 383)


def test_choices_step_down_where_it_costs_least():
    p = random_predictor(0, 32, 4)

    def candidate(nbytes, cost):
        return Candidate(p, 0.2, 0.1, nbytes, cost)

    steep, flat = [candidate(10, 900), candidate(20, 100)], [candidate(10, 120), candidate(20, 100)]
    assert choose([steep, flat], Goals(), 30) == [steep[1], flat[0]]
    # A small one that names too many is taken only where the others do not fit.
    crowd, good = Candidate(p, 0.9, 0.1, 10, 50), Candidate(p, 0.2, 0.1, 20, 100)
    assert choose([[crowd, good]], Goals(), 20) == [good]
    assert choose([[crowd, good]], Goals(), 19) == [crowd]
    assert choose([[crowd]], Goals(), 19) == [crowd]


def test_choices_step_down_within_max_share_first():
    p = random_predictor(0, 32, 4)
    a = [Candidate(p, 0.9, 0.1, 10, 100), Candidate(p, 0.2, 0.1, 20, 110)]
    b = [Candidate(p, 0.2, 0.1, 10, 130), Candidate(p, 0.15, 0.1, 20, 100)]
    assert choose([a, b], Goals(), 40) == [a[1], b[1]]
    assert choose([a, b], Goals(), 30) == [a[1], b[0]]  # though a[0] would cost less
    assert choose([a, b], Goals(), 29) == [a[0], b[0]]


def test_saved_candidates(tmp_path):
    path, made_for = tmp_path / "layer_0.npz", {"fingerprint": "abc", "goals": [0.95, 2.5]}
    assert load_candidates(path, made_for) is None
    found = [
        Candidate(random_predictor(i, 64, 10), 0.3 / 7, 0.1 / 3, 1234, 5e6 / 7) for i in (0, 1)
    ]
    save_candidates(path, found, made_for)
    assert list(tmp_path.iterdir()) == [path]
    back = load_candidates(path, json.loads(json.dumps(made_for)))
    assert len(back) == 2
    for a, b in zip(found, back, strict=True):
        for name in ("fc1", "fc2", "bias"):
            assert np.array_equal(getattr(a.predictor, name), getattr(b.predictor, name))
        assert a.predictor.threshold == b.predictor.threshold
        for name in ("share", "firing", "nbytes", "cost"):
            assert getattr(a, name) == getattr(b, name)
    assert load_candidates(path, made_for | {"seed": 1}) is None
    assert load_candidates(path, {"fingerprint": "abd", "goals": [0.95, 2.5]}) is None


def test_damaged_candidates_are_absent(tmp_path):
    path = tmp_path / "layer_0.npz"
    save_candidates(path, [Candidate(random_predictor(0, 64, 10), 0.3, 0.1, 1234, 5e6)], {})
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    for n in (0, 1, 4, 100, len(raw) // 2, len(raw) - 30, len(raw) - 1):
        path.write_bytes(raw[:n])
        assert load_candidates(path, {}) is None
    for at in rng.integers(0, len(raw), 300):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.integers(8)]) + raw[at + 1 :])
        found = load_candidates(path, {})  # some bits say nothing, dates for example
        assert found is None or found[0].cost == 5e6


# -- by gradient descent ----------------------------------------------------------------------


@dataclasses.dataclass
class Demo:
    layer: object
    data: LayerCapture


@pytest.fixture(scope="module")
def demo(demo_gguf, heldout_ids, tmp_path_factory):
    """Layer 1 of the demo model on some 6000 tokens."""
    path, texts = demo_gguf("q4_0"), [heldout_ids[i : i + 512] for i in range(0, 6144, 512)]
    with Engine(path, EXACT) as engine:
        data = capture(engine, texts, tmp_path_factory.mktemp("demo"))[1]
    return Demo(load_model(path).weights.layers[1], data)


@pytest.fixture
def one_thread():
    """Torch on one thread: several wait for each other where other programs run."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_beats_the_closed_form(demo, one_thread, monkeypatch):
    monkeypatch.setattr(refine, "BATCH", 128)  # a fifth of the time
    learn, check = demo.data.split(921)
    done = []
    trained = refine.train(learn, 64, seed=3, steps=400, progress=done.append)
    closed = Factors(demo.layer, learn).predictor(64)
    ours, theirs = (assess(p, check, GGMLType.Q8_0, demo.layer, 0.95) for p in (trained, closed))
    assert sum(done) == 400 and trained.rank == 64
    assert ours.firing == theirs.firing and ours.nbytes == theirs.nbytes
    assert ours.share < 0.95 * theirs.share


def test_training_repeats_exactly(demo, one_thread, monkeypatch):
    monkeypatch.setattr(refine, "BATCH", 64)  # of 6000: which ones is drawn, too
    first, again, other = (refine.train(demo.data, 32, seed, steps=5) for seed in (1, 1, 2))
    for name in ("fc1", "fc2", "bias"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
