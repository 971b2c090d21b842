"""Who fires, counted; `powerinfer profile`: hot first, back again, from and to activation files."""

import hashlib
import re

import numpy as np
import pytest
import tiny
import torchfile
from conftest import convert, random_predictors
from powerinfer.convert.checkpoint import read_tensors
from powerinfer.predictors.order import Changes, rewrite
from powerinfer.predictors.profile import PROFILE, Firing, carrying_share, profile
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.gguf import GGUFFile, Value
from test_cli import one_sentence, run
from truth import HELDOUT, kept, random_texts, truth

import powerinfer
from powerinfer.commands import profile as command

TEXTS = random_texts(3, 41)
N_FF = 96


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(HELDOUT.read_text("utf-8")[:1000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(HELDOUT.read_text("utf-8")[5000:6000], encoding="utf-8")
    return path


def table(path, name, il):
    return GGUFFile(path).tensors[f"blk.{il}.{name}"].numpy()


def record(path, prefix=PROFILE):
    """Return what a file says of the text that something was measured on."""
    keys = GGUFFile(path).metadata.items()
    return {key.removeprefix(prefix): v.value for key, v in keys if key.startswith(prefix)}


# -- counting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("name", ["mha", "bias", "bamboo", "prosparse", "falcon7", "opt"])
def test_counts(name, backend, tiny_gguf):
    options = RunOptions(mode="exact", backend=backend, chunk=16, threads=2)
    with Engine(tiny_gguf(name, "f32"), options) as engine:
        keep, done = kept(engine, TEXTS), []
        firing = profile(engine, TEXTS, "here", done.append)
        assert engine.watcher is None and done == [41, 41, 41] and firing.source == "here"
        for il in range(engine.config.n_layer):
            layer = truth(engine, il, keep["h", il])
            counts = firing.frequencies[il] * 123
            off = np.abs(np.rint(counts) - layer.fires.sum(axis=0))
            assert (off <= (~layer.sure).sum(axis=0)).all()
            assert np.abs(counts - np.rint(counts)).max() < 1e-4
            ordered = counts[firing.orders[il]]
            assert (np.diff(ordered) <= 0).all() and ordered[0] > ordered[-1]
            assert sorted(firing.orders[il]) == list(range(engine.config.n_ff))
    ids = b"".join(token.to_bytes(4, "little") for text in TEXTS for token in text)
    assert {key: value.value for key, value in firing.keys.items()} == {
        "powerinfer.profile.tokens": 123,
        "powerinfer.profile.text_sha256": hashlib.sha256(ids).hexdigest(),
    }


def test_neurons_that_fire_equally_often_keep_their_order():
    firing = Firing.of_counts("x", [np.array([1, 4, 0, 4, 1, 4])], 8)
    assert firing.orders[0].tolist() == [1, 3, 5, 0, 4, 2]
    assert firing.frequencies[0].tolist() == [0.125, 0.5, 0, 0.5, 0.125, 0.5]


def test_carrying_share():
    """Two neurons of ten do 80 % of it."""
    frequency = np.array([1, 1, 50, 3, 0, 2, 1, 31, 6, 5], np.float32) / 100
    assert carrying_share(frequency) == pytest.approx(0.2)
    assert carrying_share(frequency, 0.5) == pytest.approx(0.1)
    assert carrying_share(np.zeros(4, np.float32)) == 0
    assert carrying_share(np.ones(10, np.float32)) == pytest.approx(0.8)


# -- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize("predictors", [False, True], ids=["", "predictors"])
@pytest.mark.parametrize(
    ("name", "outtype"),
    [("mha", "q4_0"), ("bias", "f16"), ("bamboo", "f16"), ("falcon7", "q4_0"), ("opt", "f16")],
)
def test_there_and_back(name, outtype, predictors, tiny_gguf, text, tmp_path, capfd):
    source = tiny_gguf(name, outtype, predictors)
    hot, back = tmp_path / "hot.gguf", tmp_path / "back.gguf"
    code, out, err = run(capfd, "profile", source, "-f", text, "-o", hot, "-t", 2)
    assert (code, out) == (0, "") and str(hot) in err
    assert re.search(r"^    1 +\d+\.\d% +\d+\.\d%$", err, re.M)
    ids = tiny.token_ids()
    for mode in ({}, {"exact": True}):
        mode["kv_type"] = "f32"  # else sums that round the other way are far apart
        with powerinfer.open(source, **mode) as a, powerinfer.open(hot, **mode) as b:
            assert (a.mode, b.config.neuron_order) == (b.mode, "hot-first")
            before, after = a.logits(ids), b.logits(ids)
            # Of float sums; int8 activations may fall the other way.
            tolerance = 1e-5 if outtype == "f16" else 0.1
            assert np.abs(before - after).max() < tolerance * before.std()
    old, new = GGUFFile(source).tensors, GGUFFile(hot).tensors
    for il in range(2):
        perm, frequency = table(hot, "ffn_perm", il), table(hot, "ffn_freq", il)
        assert sorted(perm) == list(range(len(perm))) and list(perm) != list(range(len(perm)))
        assert (np.diff(frequency) <= 0).all() and 1 >= frequency[0] > frequency[-1] >= 0
        up = f"blk.{il}.ffn_up.weight"
        assert np.array_equal(new[up].data, old[up].data[perm])

    assert run(capfd, "profile", hot, "--undo", "-o", back)[0] == 0
    first, last = GGUFFile(source), GGUFFile(back)
    assert set(first.tensors) == set(last.tensors)
    for tensor in first.tensors.values():
        found = last.tensors[tensor.name]
        assert (found.type, found.shape) == (tensor.type, tensor.shape)
        assert np.array_equal(found.data, tensor.data), tensor.name
    assert last.get_str("powerinfer.neuron_order") == "original"
    for key, value in first.metadata.items():
        assert np.array_equal(last.metadata[key].value, value.value), key
    assert record(hot).keys() == {"tokens", "text_sha256"} and record(back) == {}


def test_frequencies_are_of_the_text(tiny_gguf, text, tmp_path, capfd):
    """-n and -c say how much of it, in which pieces; the record says what was run."""
    source, hot = tiny_gguf("mha", "f32"), tmp_path / "hot.gguf"
    assert run(capfd, "profile", source, "-f", text, "-o", hot, "-n", 200, "-c", 50)[0] == 0
    with powerinfer.open(source, exact=True) as engine:
        ids = engine.tokenize(text.read_text("utf-8"), add_bos=False)
        texts = [[1, *ids[i + 1 : i + 50]] for i in range(0, 200, 50)]
        keep = kept(engine, texts)
        for il in range(2):
            layer, perm = truth(engine, il, keep["h", il]), table(hot, "ffn_perm", il)
            off = np.abs(table(hot, "ffn_freq", il) - layer.fires.mean(axis=0)[perm])
            assert (off <= (~layer.sure).mean(axis=0)[perm] + 1e-6).all()
    digest = hashlib.sha256(np.array(texts, np.int32).tobytes()).hexdigest()
    assert record(hot) == {"tokens": 200, "text_sha256": digest}
    assert record(hot, "powerinfer.calibration.") == {}


def test_default_outputs(tiny_gguf, text, tmp_path, capfd):
    source = tmp_path / "x.q4_0.gguf"
    source.write_bytes(tiny_gguf("mha", "q4_0").read_bytes())
    assert run(capfd, "profile", source, "-f", text)[0] == 0
    assert run(capfd, "profile", tmp_path / "x.q4_0.hot.gguf", "--undo")[0] == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"x.q4_0.gguf", "x.q4_0.hot.gguf", "x.q4_0.hot.original.gguf"}


def test_profiling_again_composes(tiny_gguf, text, other_text, tmp_path, capfd):
    source = tiny_gguf("bias", "f32", True)
    once, twice, straight, back = (tmp_path / f"{n}.gguf" for n in range(4))
    for args in (
        (source, "-f", text, "-o", once),
        (once, "-f", other_text, "-o", twice),
        (source, "-f", other_text, "-o", straight),
        (twice, "--undo", "-o", back),
    ):
        assert run(capfd, "profile", *args)[0] == 0
    first, second = GGUFFile(source).tensors, GGUFFile(twice).tensors
    for il in range(2):
        perm, wanted = table(twice, "ffn_perm", il), table(straight, "ffn_perm", il)
        assert not np.array_equal(perm, table(once, "ffn_perm", il))
        for name in ("ffn_gate.weight", "ffn_down_t.weight", "ffn_up.bias", "fc2.weight"):
            old, new = (tensors[f"blk.{il}.{name}"] for tensors in (first, second))
            assert np.array_equal(new.float32(), old.float32()[perm])
        # By neuron, the frequencies are those of the second text alone.
        a, b = np.empty(N_FF), np.empty(N_FF)
        a[perm], b[wanted] = table(twice, "ffn_freq", il), table(straight, "ffn_freq", il)
        assert np.abs(a - b).max() < 0.01
    for tensor in GGUFFile(back).tensors.values():
        assert np.array_equal(tensor.data, first[tensor.name].data)
    assert record(twice) == record(straight) != record(once) and record(back) == {}


def test_what_predictors_were_calibrated_on_stays(tiny_gguf, text, tmp_path, capfd):
    """Beside the record of the profile, which goes when its counts do."""
    source, hot, other, back = (tmp_path / f"{n}.gguf" for n in range(4))
    prefix = "powerinfer.calibration."
    said = {"tokens": 512, "text_sha256": "ab" * 32, "kl": 0.25}
    changes = Changes(keys={prefix + key: Value.of(value) for key, value in said.items()})
    rewrite(tiny_gguf("mha", "f16", True), source, changes)
    random_counts(tmp_path / "a", 2, N_FF)
    for args in (
        (source, "-f", text, "-o", hot),
        (hot, "--activations", tmp_path / "a", "-o", other),
        (hot, "--undo", "-o", back),
    ):
        assert run(capfd, "profile", *args)[0] == 0
    assert len(record(hot)) == 2 and record(other) == record(back) == {}
    assert all(record(path, prefix) == said for path in (source, hot, other, back))
    # A change of something else keeps it.
    rewrite(hot, tmp_path / "same.gguf", Changes())
    assert record(tmp_path / "same.gguf") == record(hot)


# -- activation files -------------------------------------------------------------------------

DEEP = tiny.Tiny(n_embd=32, n_ff=64, n_layer=12, n_head=2, n_head_kv=2)


@pytest.fixture(scope="module")
def deep_gguf(tmp_path_factory, small_tokenizer):
    """A model of 12 layers: sorted as strings, activation_10 would come before activation_2."""
    folder = tmp_path_factory.mktemp("deep")
    checkpoint = tiny.write_checkpoint(DEEP, folder / "checkpoint")
    (checkpoint / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    predictors = random_predictors(DEEP, folder / "predictors", 32)
    return convert(checkpoint, folder / "deep.gguf", "f32", predictors)


def random_counts(folder, n_layer, n_ff):
    """Write activation files of counts that are all different; return the counts."""
    rng, all_counts = np.random.default_rng(5), []
    for il in range(n_layer):
        all_counts.append(rng.permutation(n_ff).astype(np.float32) + n_ff * il)
        torchfile.write_tensor(folder / f"activation_{il}.pt", all_counts[-1])
    return all_counts


def test_activations_are_taken_by_number(deep_gguf, text, tmp_path, capfd):
    """And by original neuron: a file that is hot-first already comes out the same."""
    counts = random_counts(tmp_path / "a", 12, 64)
    hot, straight, again = (tmp_path / f"{n}.gguf" for n in range(3))
    for args in (
        (deep_gguf, "-f", text, "-o", hot),
        (deep_gguf, "--activations", tmp_path / "a", "-o", straight),
        (hot, "--activations", tmp_path / "a", "-o", again),
    ):
        assert run(capfd, "profile", *args)[0] == 0
    for il, count in enumerate(counts):
        order = np.argsort(-count)
        assert np.array_equal(table(straight, "ffn_perm", il), order)
        expected = count[order] / (12 * 64 - 1)
        assert table(straight, "ffn_freq", il) == pytest.approx(expected)
    one, other = GGUFFile(straight).tensors, GGUFFile(again).tensors
    assert set(one) == set(other)
    assert all(np.array_equal(one[name].data, other[name].data) for name in one)
    assert not np.array_equal(table(hot, "ffn_perm", 0), table(again, "ffn_perm", 0))


@pytest.mark.parametrize("is_hot", [False, True], ids=["original", "hot"])
def test_export_and_import(is_hot, tiny_gguf, text, other_text, tmp_path, capfd):
    source = tiny_gguf("bamboo", "f32", True)
    if is_hot:
        assert run(capfd, "profile", source, "-f", other_text, "-o", tmp_path / "0.gguf")[0] == 0
        source = tmp_path / "0.gguf"
    folder, a, b = tmp_path / "counts", tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert run(capfd, "profile", source, "-f", text, "-o", a, "--export", folder)[0] == 0
    assert run(capfd, "profile", source, "--activations", folder, "-o", b)[0] == 0
    assert sorted(p.name for p in folder.iterdir()) == ["activation_0.pt", "activation_1.pt"]
    counts = [read_tensors(folder / f"activation_{il}.pt")[""].float32() for il in range(2)]
    tokens, most = GGUFFile(a).get_int("powerinfer.profile.tokens"), np.max(counts)
    for il, count in enumerate(counts):
        assert count.shape == (N_FF,) and np.array_equal(count, np.rint(count))
        perms, freqs = (
            [table(path, name, il) for path in (a, b)] for name in ("ffn_perm", "ffn_freq")
        )
        # The files do not say how many tokens they are of.
        assert freqs[0] * tokens == pytest.approx(count[perms[0]])
        assert freqs[1] * most == pytest.approx(count[perms[1]])
        if not is_hot:  # those that fire equally often may lie in another order there
            assert np.array_equal(perms[0], perms[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones(N_FF - 1, np.float32), r"holds \[95\], not the counts of 96 neurons"),
        (np.ones((2, N_FF), np.float32), r"holds \[2, 96\], not the counts"),
        (np.full(N_FF, np.nan, np.float32), "negative or no numbers"),
        (np.full(N_FF, np.inf, np.float32), "negative or no numbers"),
        (-np.ones(N_FF, np.float32), "negative or no numbers"),
        (b"cos\nsystem\n(X\x02\0\0\0lstR.", "os.system"),
        ("not a zip file", "not a PyTorch zip file"),
        (None, "No such file"),
    ],
)
def test_bad_activation_files(content, message, tiny_gguf, tmp_path, capfd):
    random_counts(tmp_path, 2, N_FF)
    path = tmp_path / "activation_1.pt"
    path.unlink()
    if isinstance(content, np.ndarray):
        torchfile.write_tensor(path, content)
    elif isinstance(content, bytes):
        torchfile.write_zip(path, content, {})
    elif content is not None:
        path.write_text(content)
    target = tmp_path / "x.gguf"
    result = run(capfd, "profile", tiny_gguf("mha", "f16"), "--activations", tmp_path, "-o", target)
    line = one_sentence(result, "profile")
    assert re.search(message, line) and "activation_1.pt" in line
    assert not target.exists()


# -- failures ---------------------------------------------------------------------------------


def test_profile_usage(tiny_gguf, text, tmp_path, capfd):
    model = tiny_gguf("mha", "f16")
    for args, message in (
        ([], "one of -f FILE, --activations DIR and --undo"),
        (["-f", text, "--undo"], "one of -f FILE"),
        (["-f", text, "--activations", tmp_path], "one of -f FILE"),
        (["--undo", "--export", tmp_path], "--undo counts nothing"),
        (["-f", text, "-n", "2"], "2 is below 3"),
        (["-f", text, "-c", "2"], "2 is below 3"),
        (["-f", text, "-t", "none"], "invalid"),
    ):
        code, out, err = run(capfd, "profile", model, *args)
        assert (code, out) == (2, "") and message in err, args


def test_profile_failures(tiny_gguf, tiny_checkpoint, text, tmp_path, capfd):
    model, target = tiny_gguf("mha", "f16"), tmp_path / "x.gguf"
    (tmp_path / "latin").write_bytes(b"K\xe4se")
    standard = convert(tiny_checkpoint("mha"), tmp_path / "standard.gguf", "f16", dense=True)
    random_counts(tmp_path / "a", 2, N_FF)
    for args, message in (
        ([model, "--undo"], "has no blk.0.ffn_perm: its order cannot be undone"),
        ([tiny_gguf("swiglu", "f16"), "-f", text], "is a dense model"),
        ([standard, "-f", text], "standard down projection"),
        ([standard, "--activations", tmp_path / "a"], "standard ffn_down"),
        ([model, "-f", tmp_path / "latin"], "not UTF-8"),
        ([model, "-f", tmp_path / "missing"], "No such file"),
        ([tmp_path / "missing.gguf", "-f", text], "No such file"),
        ([text, "-f", text], "not a GGUF file"),
    ):
        result = run(capfd, "profile", *args, "-o", target)
        assert message in one_sentence(result, "profile"), args
        assert not target.exists()


def test_outputs_are_checked_at_the_start(tiny_gguf, text, tmp_path, monkeypatch, capfd):
    def fail(*_):
        pytest.fail("work was done")

    model, notes, counts = tiny_gguf("mha", "f16"), tmp_path / "notes.txt", tmp_path / "a"
    notes.write_text("do not lose me")
    random_counts(counts, 2, N_FF)
    for name in ("profile", "read_activations", "rewrite_shown"):
        monkeypatch.setattr(command, name, fail)
    before = model.read_bytes()
    for source, target, message in (
        (model, notes, "not overwritten"),
        (model, tmp_path / "nowhere" / "x.gguf", "nowhere is not a directory"),
        (model, notes / "x.gguf", "notes.txt is not a directory"),
        (model, tmp_path, "is not a regular file"),
        (model, model, "is the input itself"),
        (notes, notes, "is the input itself"),
    ):
        for args in (("-f", text), ("--activations", counts), ("--undo",)):
            result = run(capfd, "profile", source, *args, "-o", target)
            assert message in one_sentence(result, "profile"), (target, args)
    assert model.read_bytes() == before and notes.read_text() == "do not lose me"
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "a"}
