"""The picture of who fires, and the numbers behind it."""

import json
import struct
import sys

import numpy as np
import pytest
import tiny
from powerinfer.predictors.order import Changes, rewrite
from powerinfer.predictors.profile import Firing
from powerinfer.runtime.errors import ModelError, RequestError
from powerinfer.runtime.gguf import GGUFFile, Value
from powerinfer.runtime.weights import load_model
from powerinfer.tools.heat import Heat, Record, read_heat

from powerinfer.__main__ import run_command

RECORD = "powerinfer.calibration."


def run(capfd, *args):
    code = run_command("heat", [str(a) for a in args], "heat")
    out, err = capfd.readouterr()
    return code, out, err


def made_up(n_layer, n_ff, seed=5):
    """Return how often neurons fire: [n_layer, n_ff], hottest first; the last layer is silent."""
    frequency = np.sort(np.random.default_rng(seed).random((n_layer, n_ff)) ** 4)[:, ::-1]
    frequency[-1] *= n_layer == 1
    return frequency.astype(np.float32)


def keys_of(recall, predicted, target=None):
    keys = {
        RECORD + "recall": Value.of(np.array(recall)),
        RECORD + "predicted_share": Value.of(np.array(predicted)),
    }
    return keys | ({} if target is None else {RECORD + "target_recall": Value.of(target)})


@pytest.fixture
def profiled(tiny_gguf, tmp_path):
    """(keys=..., predictors=False) -> a tiny model's file that says who fires."""

    def make(keys=None, predictors=False):
        model, target = tiny.MODELS["mha"], tmp_path / "tiny.gguf"
        frequency = made_up(model.n_layer, model.n_ff)
        # The neurons lie in a random order before.
        orders = [np.random.default_rng(il).permutation(model.n_ff) for il in range(model.n_layer)]
        counts = [np.empty(model.n_ff, np.float32) for _ in orders]
        for count, order, row in zip(counts, orders, frequency, strict=True):
            count[order] = row
        firing = Firing("made up", [o.astype(np.int32) for o in orders], counts)
        rewrite(tiny_gguf("mha", "f16", predictors), target, Changes(firing, keys=keys or {}))
        return target

    return make


def png_size(path):
    """Return (width, height) of a PNG file."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def carrying(frequency):
    """Return the share of neurons, hottest first, that first reaches 80 %; by counting."""
    total, need = 0.0, 0.8 * float(frequency.sum(dtype=np.float64))
    for i, f in enumerate(frequency.tolist()):
        total += f
        if total >= need > 0:
            return (i + 1) / len(frequency)
    return 0.0


def test_json_is_what_the_file_says(profiled, capfd):
    recall, predicted = [0.75, 0.5], [0.125, 0.25]
    path = profiled(keys_of(recall, predicted, 0.875), predictors=True)
    code, out, _ = run(capfd, path, "--json")
    assert code == 0 and not list(path.parent.glob("*.png"))
    numbers = json.loads(out)
    assert numbers["target_recall"] == 0.875
    frequency = made_up(2, tiny.MODELS["mha"].n_ff)
    for il, layer in enumerate(numbers["layers"]):
        assert layer["firing_share"] == pytest.approx(float(frequency[il].mean()), rel=1e-6)
        assert layer["carrying_share"] == carrying(frequency[il])
        assert (layer["recall"], layer["predicted_share"]) == (recall[il], predicted[il])
    assert len(numbers["layers"]) == 2 and 0 < numbers["layers"][0]["carrying_share"] < 0.5


def test_record_counts_only_with_predictors(profiled, capfd):
    """A record without predictors is what is left of a file whose predictors were removed."""
    for keys, predictors in ((keys_of([0.5, 0.5], [0.5, 0.5]), False), ({}, True)):
        _, out, _ = run(capfd, profiled(keys, predictors), "--json")
        numbers = json.loads(out)
        assert numbers["target_recall"] is None
        assert all(la["recall"] is la["predicted_share"] is None for la in numbers["layers"])


@pytest.mark.parametrize("recall", [[0.5], [0.5, 1.5], [0.5, np.nan], [-0.5, 0.5]])
def test_record_that_makes_no_sense(profiled, recall):
    model = load_model(profiled(keys_of(recall, [0.5, 0.5]), predictors=True))
    with pytest.raises(ModelError, match=r"calibration\.recall is not 2 numbers from 0 to 1"):
        read_heat(model)


def test_not_profiled(tiny_gguf, tmp_path, capfd):
    code, out, err = run(capfd, tiny_gguf("mha", "f16"), "-o", tmp_path / "x.png")
    assert code == 1 and out == "" and not (tmp_path / "x.png").exists()
    assert err.count("\n") == 1 and "powerinfer profile" in err and "ffn_freq" in err


def test_without_matplotlib(profiled, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = profiled()
    code, out, err = run(capfd, path)
    assert code == 1 and out == ""
    assert err.count("\n") == 1 and "powerinfer-python[plot]" in err
    code, out, _ = run(capfd, path, "--json")  # numbers need no picture
    assert code == 0 and len(json.loads(out)["layers"]) == 2


def test_picture(profiled, capfd):
    pytest.importorskip("matplotlib")
    path = profiled(keys_of([0.9, 0.95], [0.2, 0.3], 0.95), predictors=True)
    before = path.read_bytes()
    code, out, err = run(capfd, path)
    picture = path.with_name("tiny.heat.png")
    assert code == 0 and out == "" and err == f"wrote {picture}\n"
    width, height = png_size(picture)
    assert width == 1650 and 400 < height < 1000
    code, out, _ = run(capfd, path, "-o", path.with_name("a.svg"), "--json")
    assert code == 0 and len(json.loads(out)["layers"]) == 2
    assert b"<svg" in path.with_name("a.svg").read_bytes()[:1000]
    code, _, err = run(capfd, path, "-o", path)
    assert code == 1 and "is the input itself" in err and path.read_bytes() == before


def test_what_is_in_the_picture(profiled, monkeypatch):
    """The panels hold the numbers: seen by looking at the figure in place of saving it."""
    pytest.importorskip("matplotlib")
    from powerinfer.tools import plots

    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure))
    path = profiled(keys_of([0.9, 0.95], [0.2, 0.3], 0.95), predictors=True)
    heat = read_heat(load_model(path))
    plots.plot_heat(heat, path)
    [figure] = figures
    heat_map, _, shares, recall = figure.axes
    [image] = heat_map.images
    frequency = np.stack([GGUFFile(path).tensors[f"blk.{i}.ffn_freq"].numpy() for i in (0, 1)])
    assert np.allclose(np.asarray(image.get_array()) ** (1 / plots.GAMMA), frequency, atol=1e-6)
    assert heat_map.get_ylim() == (1.5, -0.5)  # layer 0 on top
    lines = {line.get_label(): line.get_xdata() for line in (*shares.lines, *recall.lines)}
    assert np.allclose(lines["fire"], frequency.mean(axis=1))
    assert np.allclose(lines["do 80 %"], [carrying(row) for row in frequency])
    assert np.allclose(lines["predicted"], [0.2, 0.3])
    assert np.allclose(lines["reached"], [0.9, 0.95])
    assert np.allclose(lines["target"], 0.95)
    assert f"Who fires in {heat.model}" in [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("n_layer", [1, 80])
def test_any_number_of_layers(n_layer, tmp_path):
    pytest.importorskip("matplotlib")
    from powerinfer.tools.plots import plot_heat

    frequencies = list(made_up(n_layer, 2500))
    share = np.full(n_layer, 0.5)
    heat = Heat("a $name$ of " + 100 * "x", frequencies, Record(share, share, None))
    plot_heat(heat, tmp_path / "x.png")
    width, height = png_size(tmp_path / "x.png")
    assert width == 1650 and height < 1.1 * width


def test_type_that_is_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from powerinfer.tools.plots import plot_heat

    with pytest.raises(RequestError, match="cannot be written as 'gguf'"):
        plot_heat(Heat("x", list(made_up(1, 8)), None), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_neighbours_are_averaged():
    from powerinfer.tools.plots import COLUMNS, _binned

    for n in (1, 7, COLUMNS, COLUMNS + 1, 5504):
        frequency = made_up(1, n)[0]
        binned = _binned(frequency)
        assert len(binned) == min(n, COLUMNS) and (np.diff(binned) <= 0).all()
        assert binned.max() <= frequency.max() and binned.min() >= frequency.min()
    assert np.array_equal(_binned(made_up(1, 96)[0]), made_up(1, 96)[0])
    assert np.allclose(_binned(np.arange(2.0 * COLUMNS, dtype=np.float32))[:2], [0.5, 2.5])
