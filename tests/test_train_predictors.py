"""The command train-predictors, from text to file."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny
from powerinfer.predictors import frontier as curve
from powerinfer.predictors.fit import (
    Fitted,
)
from powerinfer.predictors.measure import measure
from powerinfer.predictors.text import windows
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.formats import GGMLType
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.runtime.weights import load_model
from test_cli import one_sentence, run
from truth import (
    EXACT,
    TEXTS,
    captured,
    kept,
    random_predictor,
    train,
    truth,
)

from powerinfer.commands import train_predictors as command


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
    for name in ("capture", "grow", "rewrite_shown"):
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
        (source, ["--report", source], "is the input itself"),
        (source, ["--report", text], "is the input itself"),
    ):
        result = train(capfd, model, text, target, *args)
        assert message in one_sentence(result, "train-predictors"), args
    assert source.read_bytes() == before and notes.read_text() == "do not lose me"
    assert list(tmp_path.iterdir()) == [notes]
    pytest.importorskip("matplotlib")
    result = train(capfd, source, text, target, "--plot", tmp_path / "x.xyz")
    assert "cannot be written as 'xyz'" in one_sentence(result, "train-predictors")
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
        (["-f", text, "-o", tmp_path / "x", "--report", tmp_path / "x"], "files of their own"),
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
