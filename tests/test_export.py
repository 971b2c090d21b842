"""Predictors in the original's layout: there and back, and what it cannot say."""

import json

import numpy as np
import pytest
import tiny
from conftest import convert, random_predictors
from powerinfer.convert.checkpoint import read_tensors
from powerinfer.predictors.legacy import export_predictors
from powerinfer.predictors.order import Changes, rewrite
from powerinfer.predictors.profile import Firing
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.gguf import Value
from powerinfer.runtime.weights import load_model
from test_cli import one_sentence, run
from truth import TEXTS, kept, train


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
