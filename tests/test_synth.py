"""Synthetic models: they run, do what trained ReLU models do, and say what they are."""

import numpy as np
import pytest
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.formats import GGMLType
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.runtime.weights import load_model
from powerinfer.tools import synth

KINDS = ("tiny", "tiny-falcon")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Shape -> q4_0 file."""
    folder = tmp_path_factory.mktemp("synth")
    for kind in KINDS:
        synth.write_synthetic(kind, folder / f"{kind}.gguf")
    return {kind: folder / f"{kind}.gguf" for kind in KINDS}


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["synth", *map(str, arguments)])
    synth.main()


def check(found):
    assert all(0.08 < x < 0.12 for x in found["fired"])
    assert all(0.10 < x < 0.16 for x in found["predicted"])
    assert all(x > 0.95 for x in found["recall"])
    assert all(0.22 < x < 0.32 for x in found["carriers"])
    assert found["finite"] and found["top_tokens"] > 30


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_fire_as_promised(kind, files):
    check(synth.verify(files[kind]))


def test_other_types_fire_alike(tmp_path):
    """Rounding adds errors of its own to the predictor's: the noise makes up for the difference."""
    synth.write_synthetic("tiny", tmp_path / "x.gguf", GGMLType.F16)
    check(synth.verify(tmp_path / "x.gguf"))
    assert load_model(tmp_path / "x.gguf").weights.output.type is GGMLType.F16


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode(kind, files):
    ids = np.random.default_rng(0).integers(3, 512, 40).tolist()
    logits, fired = {}, {}
    for mode in ("predicted", "exact", "dense"):
        with Engine(files[kind], RunOptions(mode=mode)) as engine:
            logits[mode] = engine.logits(ids)
            fired[mode] = engine.read(ids)[:, 3].sum()
            text = "Some text: a word17!"
            assert engine.detokenize(engine.tokenize(text)) == text
    scale = logits["dense"].std()
    assert np.abs(logits["exact"] - logits["dense"]).max() < 0.01 * scale
    assert 0 < np.abs(logits["predicted"] - logits["dense"]).max() < 0.5 * scale
    assert 0.95 * fired["exact"] < fired["predicted"] < fired["exact"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_the_file(kind, files):
    model = load_model(files[kind])
    assert "random weights" in model.config.name and kind in model.config.name
    assert "nonsense" in model.file.get_str("general.description")
    assert model.config.neuron_order == "hot-first"
    assert model.weights.has_predictors and model.weights.is_transposed
    assert model.weights.output.type is GGMLType.Q6_K
    for il, layer in enumerate(model.weights.layers):
        frequency = model.file.tensors[f"blk.{il}.ffn_freq"].numpy()
        assert 0.099 < frequency.mean() < 0.101
        assert frequency[: round(0.26 * len(frequency))].sum() == pytest.approx(
            0.8 * frequency.sum(), rel=0.01
        )
        assert f"blk.{il}.ffn_perm" in model.file.tensors
        assert layer.fc1.type is layer.decider.type is GGMLType.Q4_0
        assert layer.fc1.rows == model.config.n_embd // 4
        assert layer.decider_bias is layer.fc2_bias is None
        assert (layer.up is None) == (kind == "tiny-falcon")


def test_same_seed_same_bytes(files, tmp_path):
    synth.write_synthetic("tiny", tmp_path / "same.gguf")
    synth.write_synthetic("tiny", tmp_path / "other.gguf", seed=1)
    data = files["tiny"].read_bytes()
    assert (tmp_path / "same.gguf").read_bytes() == data
    assert (tmp_path / "other.gguf").read_bytes() != data


def test_command_line(tmp_path, monkeypatch, capsys):
    target = tmp_path / "x.gguf"
    options = ("--type", "q5_0", "--predictor-type", "q8_0", "--head-type", "q6_k", "--layers", 1)
    run_main(monkeypatch, "tiny", "-o", target, *options, "--verify")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [
        "fired",
        "predicted",
        "recall",
        "carriers",
    ]
    tensors = GGUFFile(target).tensors
    assert tensors["blk.0.ffn_up.weight"].type is GGMLType.Q5_0
    assert tensors["blk.0.fc2.weight"].type is GGMLType.Q8_0
    assert tensors["output.weight"].type is GGMLType.Q6_K
    assert "blk.1.ffn_up.weight" not in tensors


@pytest.mark.parametrize("arguments", [["3b"], ["tiny", "--layers", "0"], ["tiny", "--seed", "-1"]])
def test_bad_usage(arguments, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *arguments, "-o", tmp_path / "x.gguf")
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
