"""Predictors: what they learn from, the closed form, the refined, the fitting, the command."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny
from conftest import convert, random_predictors
from powerinfer.convert.checkpoint import read_tensors
from powerinfer.predictors import frontier as curve
from powerinfer.predictors import refine
from powerinfer.predictors.capture import LayerCapture, capture, fingerprint
from powerinfer.predictors.factors import Factors, Signs
from powerinfer.predictors.fit import (
    Candidate,
    Fitted,
    Goals,
    assess,
    choose,
    load_candidates,
    predictor_type,
    ranks_for,
    save_candidates,
    threshold_for,
)
from powerinfer.predictors.legacy import export_predictors
from powerinfer.predictors.measure import measure
from powerinfer.predictors.order import Changes, rewrite
from powerinfer.predictors.predictor import Predictor, storable, with_predictors
from powerinfer.predictors.profile import Firing
from powerinfer.predictors.text import windows
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import RequestError
from powerinfer.runtime.formats import GGMLType, decode
from powerinfer.runtime.gguf import GGUFFile, Value
from powerinfer.runtime.weights import load_model
from test_cli import one_sentence, run
from truth import HELDOUT, kept, random_texts, truth

from powerinfer.commands import train_predictors as command

TEXTS = random_texts(4, 61)
EXACT = RunOptions(mode="exact", threads=2)


def captured(path, folder, texts=TEXTS, chunk=16):
    with Engine(path, dataclasses.replace(EXACT, chunk=chunk)) as engine:
        return capture(engine, texts, folder)


def random_predictor(seed, n_embd, n_ff, rank=32):
    rng = np.random.default_rng(seed)
    fc1, fc2 = rng.standard_normal((rank, n_embd)), rng.standard_normal((n_ff, rank))
    bias = rng.standard_normal(n_ff)
    return Predictor(*(x.astype(np.float32) for x in (fc1, fc2, bias)), threshold=0.5 - seed)


# -- capture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "bias", "bamboo", "prosparse", "relu2", "falcon7", "opt"])
def test_capture(name, tiny_gguf, tmp_path):
    path = tiny_gguf(name, "f32")
    data = captured(path, tmp_path)
    with Engine(path, EXACT) as engine:
        keep = kept(engine, TEXTS)
        for il, found in enumerate(data):
            h = keep["h", il]
            layer = truth(engine, il, h)
            down = engine.weights.layers[il].down_t.float32()
            effects = np.abs(layer.act) * np.linalg.norm(down, axis=1) * layer.fires
            fired = found.fired(slice(None))
            assert len(found) == 4 * 61 and found.n_ff == engine.config.n_ff
            assert np.array_equal(found.inputs, h.astype(np.float16))
            assert np.array_equal(found.x(slice(3, 9)), h[3:9].astype(np.float16))
            assert np.array_equal(fired[layer.sure], layer.fires[layer.sure])
            assert layer.slack < 20
            rows = np.array([7, 0, 243, 100])
            close = {"rtol": 2e-3, "atol": 1e-4}  # float16
            assert np.allclose(found.effect(rows), effects[rows], **close)
            learn, check = found.split(36)
            assert (len(learn), len(check)) == (244 - 36, 36)
            assert np.allclose(check.effect(np.array([5, 1])), effects[[213, 209]], **close)
            assert np.array_equal(check.fired(slice(2)), fired[208:210])
            assert np.array_equal(learn.x(slice(207, None)), found.x(slice(207, 208)))


def test_a_capture_is_used_again(tiny_gguf, tmp_path, monkeypatch):
    """For the same model and text only."""
    calls = []
    plain = Engine.read
    monkeypatch.setattr(Engine, "read", lambda *args: calls.append(1) or plain(*args))

    def texts_run(name, texts, outtype="f32"):
        calls.clear()
        data = captured(tiny_gguf(name, outtype), tmp_path, texts)
        assert sum(map(len, texts)) == len(data[0])
        return len(calls)

    assert texts_run("mha", TEXTS) == 4
    assert texts_run("mha", TEXTS) == 0
    other = [TEXTS[0], [*TEXTS[1][:-1], 9 if TEXTS[1][-1] != 9 else 10]]
    assert texts_run("mha", other) == 2 and texts_run("mha", other) == 0
    assert texts_run("bias", other) == 2
    assert texts_run("mha", other) == 2
    assert texts_run("mha", other, "q8_0") == 2
    for damaged in (b"", b'{"fingerprint"', b"[]", b"\xff"):  # the disk was full
        (tmp_path / "capture.json").write_bytes(damaged)
        assert texts_run("mha", other, "q8_0") == 2


def test_a_fingerprint_is_of_all_matrices(demo_gguf, tmp_path):
    """A change of attention alone, far behind the header."""
    source, changed = demo_gguf("f16"), tmp_path / "changed.gguf"
    raw = bytearray(source.read_bytes())
    at = raw.find(GGUFFile(source).tensors["blk.1.attn_q.weight"].data.tobytes())
    assert at > 1 << 20
    raw[at] ^= 1
    changed.write_bytes(raw)
    with Engine(source, EXACT) as a, Engine(changed, EXACT) as b:
        found = fingerprint(a, TEXTS)
        assert found == fingerprint(a, TEXTS) and fingerprint(b, TEXTS) != found
        assert fingerprint(a, TEXTS[:3]) != found


def test_an_interrupted_capture_is_not_taken_for_a_whole_one(tiny_gguf, tmp_path):
    path = tiny_gguf("mha", "f32")
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), folder.mkdir()
    expected = captured(path, whole)
    captured(path, folder)

    def stop(_):
        raise KeyboardInterrupt

    with Engine(path, EXACT) as engine:
        for texts in (TEXTS[::-1], TEXTS):  # of another text, in place of the finished one; its own
            with pytest.raises(KeyboardInterrupt):
                capture(engine, texts, folder, stop)
            assert engine.watcher is None
            done = []
            found = capture(engine, TEXTS, folder, done.append)
            assert len(done) == 4
            for a, b in zip(found, expected, strict=True):
                for name in ("inputs", "bits", "effects", "ends"):
                    assert np.array_equal(getattr(a, name), getattr(b, name))
            (folder / "capture.json").unlink()


def test_capture_without_room(tiny_gguf, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(RequestError, match="take fewer tokens"):
        captured(tiny_gguf("mha", "f32"), tmp_path)


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


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(HELDOUT.read_text("utf-8")[:4000], encoding="utf-8")
    return path


def train(capfd, source, text, target, *args):
    common = ("-f", text, "-o", target, "--method", "factors", "-t", 2, "--max-size", "20%")
    return run(capfd, "train-predictors", source, *common, *args)


@pytest.mark.parametrize(
    ("name", "outtype"), [("mha", "q4_0"), ("bamboo", "f16"), ("falcon7", "q8_0"), ("opt", "f16")]
)
def test_train_predictors(name, outtype, tiny_gguf, text, tmp_path, capfd):
    source = tiny_gguf(name, outtype, predictors=True)  # which are replaced
    target, report = tmp_path / "x.gguf", tmp_path / "report.json"
    code, out, err = train(capfd, source, text, target, "--report", report)
    assert (code, out) == (0, "") and "layer  rank  recall" in err and "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf", "report.json"}

    with Engine(target) as engine, Engine(source, EXACT) as base:
        assert engine.mode == "predicted"
        c, file = engine.config, engine.file
        assert c.predictor_input == "normed" and len(c.layer_thresholds) == 2
        assert c.target_recall == pytest.approx(0.95)
        assert "powerinfer.sparse_threshold" not in file.metadata
        texts = windows(engine, text.read_text("utf-8"), 256)
        keep, quality = kept(engine, texts), measure(engine, texts, base)
        check = measure(engine, texts[-max(int(len(texts) * 0.15), 1) :], base)
        for il, found in enumerate(quality.layers):
            if outtype == "f16":  # else activations are rounded
                who, mask = truth(engine, il, keep["h", il]), keep["mask", il].astype(bool)
                recall = (who.fires & mask).sum() / who.fires.sum()
                close = 1e-9 + 2 * who.slack / who.fires.sum()
                assert found.recall == pytest.approx(recall, abs=close)
            assert found.recall == pytest.approx(0.95, abs=0.02)
            assert found.predicted_share < 0.97
            layer = engine.weights.layers[il]
            assert layer.fc1.shape == (32, 64) and layer.fc2_bias is not None
            wanted = GGMLType.Q4_0 if outtype == "q4_0" else GGMLType.Q8_0
            assert layer.fc1.type is layer.fc2.type is wanted
    record = {
        key.removeprefix("powerinfer.calibration."): value.value
        for key, value in file.metadata.items()
        if key.startswith("powerinfer.calibration.")
    }
    assert record["tokens"] == 256 * len(texts) and len(record["text_sha256"]) == 64
    assert record["recall"] == pytest.approx([r.recall for r in check.layers])
    assert record["predicted_share"] == pytest.approx([r.predicted_share for r in check.layers])
    assert record["firing_share"] == pytest.approx([r.firing_share for r in check.layers])
    assert record["kl"] == pytest.approx(check.divergence.kl.mean)
    ratio = np.exp(check.divergence.log_ratio.mean)
    assert record["perplexity_ratio"] == pytest.approx(ratio)
    for tensor in GGUFFile(source).tensors.values():  # nothing else has changed
        if ".fc" not in tensor.name:
            assert np.array_equal(file.tensors[tensor.name].data, tensor.data)

    found = json.loads(report.read_text())
    assert found["ranks"] == [32, 32] and found["predictor_type"] == wanted.name
    assert found["tokens"] == 256
    kinds = [(p["kind"], p["target_recall"]) for p in found["points"]]
    recalls = (0.8, 0.9, 0.95, 0.98, 0.99)
    wanted = [(kind, recall) for kind in ("factors", "signs") for recall in recalls]
    assert kinds == [("dense", None), ("exact", None), *wanted]
    points = dict(zip(kinds, found["points"], strict=True))
    for kind, recall in wanted:
        point = points[kind, recall]
        most = recall + (0.02 if kind == "factors" else 0.1)  # many counts of signs are equal
        assert recall - 0.02 < point["recall"] < most
        assert 0 < point["kl"] < 1 and 0 < point["firing_share"] < 1
        assert recall * point["firing_share"] < point["predicted_share"] + 0.02 < 1.02
        assert point["bytes_per_token"] > point["ffn_bytes_per_token"] > point["predictor_bytes"]
    dense, exact = points["dense", None], points["exact", None]
    assert dense["bytes_per_token"] > exact["bytes_per_token"] and exact["kl"] == 0
    assert exact["predictor_bytes"] == 0 and exact["recall"] is None
    # One bit for each weight of the decider
    assert points["signs", 0.9]["predictor_bytes"] == 2 * 64 * c.n_ff / 8
    assert points["factors", 0.8]["kl"] > points["factors", 0.99]["kl"]
    shipped, point = found["shipped"], points["factors", 0.95]
    assert (shipped["kind"], shipped["target_recall"]) == ("shipped", 0.95)
    assert shipped["kl"] == pytest.approx(check.divergence.kl.mean)
    for name in ("recall", "predicted_share", "bytes_per_token", "predictor_bytes"):
        assert shipped[name] == pytest.approx(point[name], rel=0.01)
    for point in found["points"]:
        others = [p for p in found["points"] if p["kl"] < point["kl"]]
        is_beaten = any(p["bytes_per_token"] < point["bytes_per_token"] for p in others)
        assert point["on_frontier"] is not is_beaten


def test_masks_of_the_sign_predictor(tiny_gguf, tmp_path, monkeypatch):
    """Each layer's own threshold, on the FFN's normed input."""
    model, seen = load_model(tiny_gguf("opt", "f32")), []
    data = captured(model, tmp_path)

    def spy(engine, texts, base, masks=None):
        def watched(ops, il):
            masks(ops, il)
            n, b = ops.plan.step.n_tok, ops.plan.buffers
            seen.append((il, b.h[:n].copy(), b.mask[:n].astype(bool)))

        return measure(engine, texts, base, masks=masks and watched)

    monkeypatch.setattr(curve, "measure", spy)
    monkeypatch.setattr(curve, "RECALLS", (0.9,))
    with Engine(model, EXACT) as base:
        fitted = Fitted([random_predictor(0, 64, 160)] * 2, GGMLType.F16, 0.9, None)
        fitted = dataclasses.replace(fitted, quality=measure(base, TEXTS, base))
    report = curve.frontier(model, {}, fitted, data, EXACT, TEXTS)
    assert [p["kind"] for p in report["points"]] == ["dense", "exact", "signs"]
    assert [il for il, _, _ in seen] == [0, 1] * len(TEXTS)

    def agreement(il, x):
        signs = [np.where(v < 0, -1, 1) for v in (x, model.weights.layers[il].decider.float32())]
        return signs[0] @ signs[1].T

    for il, h, mask in seen:
        found = agreement(il, data[il].x(slice(None)))[data[il].fired(slice(None))]
        threshold = np.sort(found)[int(0.1 * len(found))]
        assert np.array_equal(mask, agreement(il, h) >= threshold)


def test_hot_first_files_and_back(tiny_gguf, text, tmp_path, capfd):
    """Predictors trained on a profiled file go back to the original order with it."""
    hot, trained, back = (tmp_path / f"{n}.gguf" for n in range(3))
    assert run(capfd, "profile", tiny_gguf("bias", "f32"), "-f", text, "-o", hot)[0] == 0
    assert train(capfd, hot, text, trained, "--type", "f32")[0] == 0
    assert run(capfd, "profile", trained, "--undo", "-o", back)[0] == 0
    assert GGUFFile(trained).get_str("powerinfer.neuron_order") == "hot-first"
    records = {}
    for path in (hot, trained, back):
        keys = GGUFFile(path).metadata.items()
        for what in ("profile", "calibration"):
            found = {k: np.array(v.value).tolist() for k, v in keys if f"powerinfer.{what}." in k}
            records[path, what] = found
    assert len(records[hot, "profile"]) == 2 and records[hot, "calibration"] == {}
    assert records[trained, "profile"] == records[hot, "profile"]
    assert records[back, "profile"] == {} != records[trained, "calibration"]
    assert records[back, "calibration"] == records[trained, "calibration"]
    ids, scores, logits = tiny.token_ids(), {}, {}
    for path in (trained, back):
        with Engine(path, RunOptions(threads=2)) as engine:
            assert engine.mode == "predicted"
            scores[path], logits[path] = kept(engine, [ids])["scores", 1], engine.logits(ids)
    perm = GGUFFile(trained).tensors["blk.1.ffn_perm"].numpy()
    assert np.abs(scores[back][:, perm] - scores[trained]).max() < 1e-2
    assert np.abs(logits[back] - logits[trained]).max() < 1e-2 * logits[back].std()


def test_an_interrupted_run_goes_on(tiny_gguf, text, tmp_path, monkeypatch, capfd):
    source, target = tiny_gguf("mha", "f16"), tmp_path / "x.gguf"
    work, grown, captures = tmp_path / "x.gguf.work", [], []
    plain_grow, plain_capture = command.grow, command.capture

    def grow(*args):
        if len(grown) == stop_after:
            raise KeyboardInterrupt
        grown.append(args[2])
        return plain_grow(*args)

    def count(engine, texts, folder, progress):
        return plain_capture(engine, texts, folder, lambda n: captures.append(n) or progress(n))

    monkeypatch.setattr(command, "grow", grow)
    monkeypatch.setattr(command, "capture", count)
    stop_after = 1
    assert train(capfd, source, text, target)[0] == 130
    assert grown == [256] and captures and not target.exists()  # checked on the last window
    assert (work / "layer_0.npz").exists() and not (work / "layer_1.npz").exists()

    captures.clear(), grown.clear()
    stop_after = 2
    assert train(capfd, source, text, target)[0] == 0
    assert len(grown) == 1 and captures == []
    assert list(tmp_path.iterdir()) == [target]
    straight = tmp_path / "straight.gguf"
    grown.clear()
    assert train(capfd, source, text, straight)[0] == 0
    assert len(grown) == 2 and straight.read_bytes() == target.read_bytes()


def test_what_was_made_for_other_goals_is_made_again(tiny_gguf, text, tmp_path, monkeypatch, capfd):
    source, target, work = tiny_gguf("mha", "f16"), tmp_path / "x.gguf", tmp_path / "x.gguf.work"
    grown, plain = [], command.grow
    monkeypatch.setattr(command, "grow", lambda *args: grown.append(1) or plain(*args))

    def layers_grown(*args):
        grown.clear()
        # Too small in every case, so that the finished layers stay.
        code, _, err = train(capfd, source, text, target, "--max-size", "0.1%", *args)
        assert code == 1 and "--max-size allows" in err
        return len(grown)

    assert layers_grown() == 2
    assert layers_grown() == layers_grown("--max-kl", 0.5) == 0
    assert layers_grown("--recall", 0.9) == 2
    assert layers_grown("--recall", "90%") == 0
    assert layers_grown("--recall", 0.9, "--type", "f16") == 2
    assert layers_grown("--recall", 0.9, "--type", "f16", "--max-share", 3) == 2
    assert layers_grown("--recall", 0.9, "--type", "f16", "--max-share", 3, "--seed", 1) == 2
    (work / "layer_0.npz").write_bytes((work / "layer_0.npz").read_bytes()[:999])
    assert layers_grown("--recall", 0.9, "--type", "f16", "--max-share", 3, "--seed", 1) == 1
    source = tiny_gguf("bias", "f16")
    assert layers_grown("--recall", 0.9, "--type", "f16", "--max-share", 3, "--seed", 1) == 2


def test_goals_that_are_not_reached(tiny_gguf, text, tmp_path, capfd):
    source, target = tiny_gguf("mha", "f16"), tmp_path / "x.gguf"
    line = one_sentence(train(capfd, source, text, target, "--max-size", "1%"), "train-predictors")
    assert "even the smallest predictors need" in line and "--max-size allows" in line
    line = one_sentence(train(capfd, source, text, target, "--max-kl", "1e-12"), "train-predictors")
    assert "a KL of 1e-12 is not reached: even at a recall of 0.998" in line
    assert not target.exists()
    code, _, err = train(capfd, source, text, target, "--max-share", "1")
    assert code == 0 and "warning: layers 0, 1 name more than 1 times" in err


def test_a_kl_that_is_reached(tiny_gguf, text, tmp_path, capfd):
    """By more recall than was asked for."""
    source, target = tiny_gguf("mha", "f16"), tmp_path / "x.gguf"
    found = {}
    for args in (("--recall", 0.7), ("--recall", 0.7, "--max-kl", 0.02)):
        assert train(capfd, source, text, target, *args)[0] == 0
        file = GGUFFile(target)
        record = "powerinfer.calibration."
        found[len(args)] = [file.get_float(record + key) for key in ("kl", "target_recall")]
    assert found[2][0] > 0.02 > found[4][0]
    assert found[2][1] == pytest.approx(0.7)
    assert found[4][1] in [pytest.approx(1 - 0.3 / 2**i) for i in range(1, 6)]


def test_train_predictors_failures(tiny_gguf, text, tmp_path, monkeypatch, capfd):
    source, target = tiny_gguf("mha", "f16"), tmp_path / "x.gguf"
    (tmp_path / "short").write_text("Only a few words.")
    (tmp_path / "latin").write_bytes(b"K\xe4se")
    for model, args, message in (
        (source, ["-f", tmp_path / "short"], "short is too short"),
        (source, ["-f", tmp_path / "latin"], "not UTF-8"),
        (source, ["-f", tmp_path / "missing"], "No such file"),
        (tmp_path / "missing.gguf", [], "No such file"),
        (text, [], "not a GGUF file"),
        (tiny_gguf("swiglu", "f16"), [], "is a dense model"),
    ):
        result = train(capfd, model, text, target, *args)
        assert message in one_sentence(result, "train-predictors"), args
        assert "capturing" not in result[2]  # at once
        assert not target.exists() and not (tmp_path / "x.gguf.work").exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    result = train(capfd, source, text, target, "--method", "trained")
    assert "training needs torch" in one_sentence(result, "train-predictors")
    common = ("-f", text, "-o", target, "--max-size", "20%")
    code, _, err = run(capfd, "train-predictors", source, *common)
    assert code == 0 and "torch is not installed: predictors in closed form" in err


def test_outputs_are_checked_at_the_start(tiny_gguf, text, tmp_path, monkeypatch, capfd):
    def fail(*_):
        pytest.fail("work was done")

    source, notes, target = tiny_gguf("mha", "f16"), tmp_path / "notes.txt", tmp_path / "x.gguf"
    notes.write_text("do not lose me")
    for name in ("capture", "grow", "rewrite"):
        monkeypatch.setattr(command, name, fail)
    nowhere, before = tmp_path / "nowhere", source.read_bytes()
    for model, args, message in (
        (source, ["-o", notes], "not overwritten"),
        (source, ["-o", nowhere / "x.gguf"], "nowhere is not a directory"),
        (source, ["-o", notes / "x.gguf"], "notes.txt is not a directory"),
        (source, ["-o", tmp_path], "is not a regular file"),
        (source, ["-o", source], "is the input itself"),
        (notes, ["-o", notes], "is the input itself"),
        (source, ["--report", nowhere / "x.json"], "nowhere is not a directory"),
        (source, ["--report", tmp_path], "is not a regular file"),
    ):
        result = train(capfd, model, text, target, *args)
        assert message in one_sentence(result, "train-predictors"), args
    assert source.read_bytes() == before and notes.read_text() == "do not lose me"
    assert list(tmp_path.iterdir()) == [notes]
    pytest.importorskip("matplotlib")
    result = train(capfd, source, text, target, "--plot", nowhere / "x.png")
    assert "nowhere is not a directory" in one_sentence(result, "train-predictors")
    assert list(tmp_path.iterdir()) == [notes]


def test_train_predictors_usage(tiny_gguf, text, tmp_path, capfd):
    source = tiny_gguf("mha", "f16")
    for args, message in (
        ([], "-f FILE makes predictors"),
        (["-f", text, "--export", tmp_path], "one of them"),
        (["-f", text, "--recall", "1"], "1 is not between 0 and 1"),
        (["-f", text, "--recall", "0"], "0 is not between"),
        (["-f", text, "--recall", "nan"], "nan is not between"),
        (["-f", text, "--recall", "100%"], "100% is not between"),
        (["-f", text, "--recall", "much"], "invalid"),
        (["-f", text, "--max-size", "-1"], "-1 is not between"),
        (["-f", text, "--max-share", "0.5"], "--max-share is 1 or more"),
        (["-f", text, "--max-share", "nan"], "--max-share is 1 or more"),
        (["-f", text, "--max-share", "inf"], "--max-share is 1 or more"),
        (["-f", text, "--max-kl", "0"], "--max-kl is above 0"),
        (["-f", text, "--max-kl", "nan"], "--max-kl is above 0"),
        (["-f", text, "--type", "q3"], "invalid choice"),
        (["-f", text, "-n", "63"], "63 is below 64"),
        (["-f", text, "--method", "magic"], "invalid choice"),
    ):
        code, out, err = run(capfd, "train-predictors", source, *args)
        assert (code, out) == (2, "") and message in err, args


def test_plot(tiny_gguf, text, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "x.png"
    code, _, err = train(
        capfd, tiny_gguf("mha", "f16"), text, tmp_path / "x.gguf", "--plot", picture
    )
    assert code == 0 and f"wrote {picture}" in err
    assert picture.read_bytes().startswith(b"\x89PNG")


# -- predictors in the original's layout ------------------------------------------------------


def random_order(path, folder):
    """Write a file again in a random order of neurons."""
    config, rng = load_model(path).config, np.random.default_rng(8)
    orders = [rng.permutation(config.n_ff).astype(np.int32) for _ in range(config.n_layer)]
    rewrite(path, folder / "mixed.gguf", Changes(Firing("random", orders, None)))
    return folder / "mixed.gguf"


@pytest.mark.parametrize("is_profiled", [False, True], ids=["", "profiled"])
@pytest.mark.parametrize("name", ["bias", "bamboo", "falcon7", "opt"])
def test_export_of_predictors(name, is_profiled, tiny_gguf, tiny_checkpoint, tmp_path, capfd):
    source = tiny_gguf(name, "f16", True)
    path = random_order(source, tmp_path) if is_profiled else source
    folder = tmp_path / "out"
    code, out, _ = run(capfd, "train-predictors", path, "--export", folder)
    assert (code, out) == (0, "")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model_0.pt", "model_1.pt"]
    back = convert(tiny_checkpoint(name), tmp_path / "back.gguf", "f16", folder)
    assert load_model(back).config.sparse_threshold == 0.5
    kept_ = []
    for file in (source, back):
        with Engine(file, RunOptions(mode="predicted", threads=2)) as engine:
            kept_.append(kept(engine, TEXTS))
    for il in range(2):
        for what in ("scores", "mask"):
            assert np.array_equal(kept_[0][what, il], kept_[1][what, il])
    wanted = random_predictors(tiny.MODELS[name], tmp_path / "in", 40)
    for il in range(2):
        first, last = (read_tensors(f / f"model_{il}.pt") for f in (wanted, folder))
        for key, cut in (("fc1.weight", np.s_[:40]), ("fc2.weight", np.s_[:, :40])):
            assert np.array_equal(last[key].float32()[cut], first[key].float32())


def with_keys(path, target, **keys):
    values = {key: None if value is None else Value.of(value) for key, value in keys.items()}
    changes = Changes(keys={f"powerinfer.{key}": value for key, value in values.items()})
    rewrite(path, target, changes)
    return target


def test_normed_predictors_are_exported_with_the_norm_inside(tiny_gguf, tiny_checkpoint, tmp_path):
    normed = with_keys(
        tiny_gguf("bias", "f32", True),
        tmp_path / "normed.gguf",
        predictor_input="normed",
        sparse_threshold=None,
    )
    export_predictors(tmp_path / "out", load_model(normed))
    back = convert(tiny_checkpoint("bias"), tmp_path / "back.gguf", "f32", tmp_path / "out")
    assert load_model(back).config.predictor_input == "residual"
    masks, scores = [], []
    for file in (normed, back):
        with Engine(file, RunOptions(mode="predicted", threads=2)) as engine:
            keep = kept(engine, TEXTS)
            masks.append([keep["mask", il] for il in range(2)])
            scores.append([keep["scores", il] for il in range(2)])
    masks, scores = np.array(masks), np.array(scores)
    sure = np.abs(scores).min(axis=0) > 1e-3
    assert np.array_equal(masks[0][sure], masks[1][sure]) and sure.mean() > 0.99
    assert 0.2 < masks.mean() < 0.8 and not np.allclose(scores[0], scores[1])


def test_what_the_originals_layout_cannot_say(tiny_gguf, text, tmp_path, capfd):
    plain, out = tiny_gguf("mha", "f16", True), tmp_path / "out"
    trained = tmp_path / "trained.gguf"
    assert train(capfd, tiny_gguf("mha", "f16"), text, trained)[0] == 0
    biased = with_keys(trained, tmp_path / "0.gguf", layer_thresholds=None)
    for path, message in (
        (tiny_gguf("mha", "f16"), "has no predictors"),
        (trained, "thresholds that differ by layer"),
        (biased, "predictors with a bias"),
        (
            with_keys(plain, tmp_path / "1.gguf", layer_thresholds=np.array([0.5, 0.25])),
            "thresholds that differ by layer",
        ),
        (with_keys(plain, tmp_path / "2.gguf", predictor_input="normed"), "a threshold of 0"),
        (
            with_keys(
                tiny_gguf("opt", "f16", True),
                tmp_path / "3.gguf",
                predictor_input="normed",
                sparse_threshold=None,
            ),
            "only with RMS norm",
        ),
    ):
        result = run(capfd, "train-predictors", path, "--export", out)
        assert message in one_sentence(result, "train-predictors")
        assert not out.exists()
    # The same threshold in every layer is one threshold.
    same = with_keys(plain, tmp_path / "4.gguf", layer_thresholds=np.array([0.25, 0.25]))
    assert run(capfd, "train-predictors", same, "--export", out)[0] == 0
    assert json.loads((out / "config.json").read_text()) == {"sparse_threshold": 0.25}
