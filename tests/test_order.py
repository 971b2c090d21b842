"""Firing data of the original, and files rewritten in hot-first order."""

import itertools
import shutil

import numpy as np
import pytest
import tiny
import torchfile
from conftest import kl
from powerinfer.predictors.legacy import find_firing, read_activations, read_gpuidx
from powerinfer.predictors.order import Changes, rewrite
from powerinfer.predictors.profile import Firing
from powerinfer.runtime.errors import FileFormatError, ModelError, RequestError
from powerinfer.runtime.formats import GGMLType, encode
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.runtime.gguf_writer import GGUFWriter

import powerinfer
from powerinfer.__main__ import run_command

N_FF = 96


def random_firing(n_layer, n_ff, seed=0):
    rng = np.random.default_rng(seed)
    counts = [rng.random(n_ff).astype(np.float32) for _ in range(n_layer)]
    orders = [np.argsort(-c, kind="stable").astype(np.int32) for c in counts]
    return Firing(None, orders, counts)


def relative(a, b):
    return float(np.abs(a - b).max() / b.std())


@pytest.mark.parametrize("outtype", ["f32", "q4_0", "q5_1"])
@pytest.mark.parametrize("name", ["mha", "bias", "bamboo", "falcon7", "opt"])
def test_order_changes_no_logit(name, outtype, tiny_gguf, tmp_path):
    """Beyond the rounding of sums taken in another order."""
    source = tiny_gguf(name, outtype, True)
    model = tiny.MODELS[name]
    target = tmp_path / "x.gguf"
    rewrite(source, target, Changes(random_firing(model.n_layer, model.n_ff)))
    ids = tiny.token_ids()
    for mode in ({}, {"exact": True}, {"dense": True}):
        with powerinfer.open(source, kv_type="f32", **mode) as a:
            before = a.logits(ids)
        with powerinfer.open(target, kv_type="f32", **mode) as b:
            assert b.config.neuron_order == "hot-first"
            assert relative(b.logits(ids), before) < (1e-5 if outtype == "f32" else 5e-2)


def test_rows_move_whole(tiny_gguf, tmp_path):
    source, target = GGUFFile(tiny_gguf("bias", "q4_0", True)), tmp_path / "x.gguf"
    firing = random_firing(2, N_FF)
    rewrite(source.path, target, Changes(firing))
    file = GGUFFile(target)
    for il, order in enumerate(firing.orders):
        p = f"blk.{il}."
        for name in ("ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight", "fc2.weight"):
            assert np.array_equal(file.tensors[p + name].data, source.tensors[p + name].data[order])
        for name in ("ffn_gate.bias", "ffn_up.bias"):
            moved = file.tensors[p + name].numpy()
            assert np.array_equal(moved, source.tensors[p + name].numpy()[order])
        for name in ("ffn_down_t.bias", "fc1.weight", "attn_q.weight"):
            assert np.array_equal(file.tensors[p + name].data, source.tensors[p + name].data)
        assert np.array_equal(file.tensors[p + "ffn_perm"].numpy(), order)
        assert (np.diff(file.tensors[p + "ffn_freq"].numpy()) <= 0).all()
    again = random_firing(2, N_FF, seed=1)  # by the rows of the file as it is now
    rewrite(target, tmp_path / "y.gguf", Changes(again))
    twice = GGUFFile(tmp_path / "y.gguf").tensors
    for il, (first, second) in enumerate(zip(firing.orders, again.orders, strict=True)):
        order = twice[f"blk.{il}.ffn_perm"].numpy()
        assert np.array_equal(order, first[second])
        name = f"blk.{il}.ffn_gate.weight"
        assert np.array_equal(twice[name].data, source.tensors[name].data[order])
    with pytest.raises(RequestError, match="is the input itself"):
        rewrite(target, target, Changes(None))


def test_upgrade_of_the_originals_files(samples, tmp_path, capfd):
    name = "sample.q4_0.powerinfer.gguf"
    for file in (name, name + ".generated.gpuidx"):
        shutil.copy(samples / file, tmp_path / file)
    engine = np.load(samples / "engine_logits.npz")
    ids = engine["ids"].tolist()
    with powerinfer.open(samples / name) as llm:
        before = llm.logits(ids)

    def upgraded():
        code = run_command("convert", [str(tmp_path / name)], "convert")
        assert code == 0
        path = tmp_path / "sample.q4_0.powerinfer.upgraded.gguf"
        with powerinfer.open(path) as llm:
            assert llm.file.magic == "GGUF" and llm.config.neuron_order == "hot-first"
            assert llm.mode == "predicted"
            assert kl(before, llm.logits(ids)) < 1e-3  # int8 steps that fall the other way
        return GGUFFile(path)

    file = upgraded()  # by the GPU index
    assert "gpuidx" in capfd.readouterr().err and "blk.0.ffn_freq" not in file.tensors
    shutil.copytree(samples / "activation", tmp_path / "activation")
    file = upgraded()  # counts say more
    assert "activation" in capfd.readouterr().err
    counts = read_activations(samples / "activation", 3, 768)
    for il in range(3):
        order = file.tensors[f"blk.{il}.ffn_perm"].numpy()
        assert np.array_equal(order, counts.orders[il])
        # The two agree on who is hot.
        hot = read_gpuidx(samples / (name + ".generated.gpuidx"), 3, 768).orders[il]
        n_hot = {0: 256, 1: 256, 2: 512}[il]
        assert (
            counts.frequencies[il][hot[:n_hot]].min() >= counts.frequencies[il][hot[n_hot:]].max()
        )


def test_upgrade_of_a_file_that_is_hot_first(samples, tmp_path, capfd):
    """Counts are by original numbers: once more, nothing changes."""
    name = "sample.q4_0.powerinfer.gguf"
    shutil.copy(samples / name, tmp_path / name)
    shutil.copytree(samples / "activation", tmp_path / "activation")
    files = [tmp_path / name, tmp_path / "once.gguf", tmp_path / "twice.gguf"]
    for source, target in itertools.pairwise(files):
        assert run_command("convert", [str(source), "--outfile", str(target)], "convert") == 0
    once, twice = GGUFFile(files[1]), GGUFFile(files[2])
    for key, tensor in once.tensors.items():
        assert np.array_equal(tensor.data, twice.tensors[key].data), key
    with pytest.raises(SystemExit, match="2"):
        run_command("convert", [str(files[1]), "--outtype", "q4_0"], "convert")
    assert "rewritten as it is" in capfd.readouterr().err


def test_nothing_beside_it(tiny_gguf, tmp_path, capfd):
    path = tmp_path / "x.gguf"
    shutil.copy(tiny_gguf("mha", "f16"), path)
    assert find_firing(path, 2, N_FF) is None
    assert run_command("convert", [str(path)], "convert") == 0
    assert "the order stays" in capfd.readouterr().err
    assert GGUFFile(tmp_path / "x.upgraded.gguf").get_str("powerinfer.neuron_order") == "original"


def test_activation_files_are_taken_by_number(tmp_path):
    """Sorted as strings, activation_10 would come before activation_2."""
    for i in range(12):
        counts = np.zeros(8, np.float32)
        counts[i % 8] = i + 1
        ops = torchfile.tensor_opcodes("0", counts)
        torchfile.write_zip(
            tmp_path / f"activation_{i}.pt", b"\x80\x02" + ops + b".", {"0": counts.tobytes()}
        )
    firing = read_activations(tmp_path, 12, 8)
    assert [int(order[0]) for order in firing.orders] == [i % 8 for i in range(12)]
    assert firing.frequencies[11][3] == 1 and firing.frequencies[5][5] == 0.5


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones(7, np.float32), r"holds \[7\], not the counts of 8"),
        (np.array([1, np.nan] * 4, np.float32), "negative or no numbers"),
        (-np.ones(8, np.float32), "negative or no numbers"),
        (np.zeros(8, np.float32), "no counts above 0"),
    ],
)
def test_damaged_activations(counts, message, tmp_path):
    ops = torchfile.tensor_opcodes("0", counts)
    path = tmp_path / "activation_0.pt"
    torchfile.write_zip(path, b"\x80\x02" + ops + b".", {"0": counts.tobytes()})
    with pytest.raises(FileFormatError, match=message):
        read_activations(tmp_path, 1, 8)
    torchfile.write_zip(path, b"cos\nsystem\n(X\x02\0\0\0lstR.", {})
    with pytest.raises(FileFormatError, match="wants to call"):
        read_activations(tmp_path, 1, 8)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_activations(tmp_path, 1, 8)


def gpuidx(path, hot, bucket, type_=GGMLType.I32):
    with GGUFWriter(path, "generic.gpu_index") as writer:
        arrays = {"blk.0.gpu_idx": hot, "blk.0.gpu_bucket": bucket}
        for name, values in arrays.items():
            writer.declare(name, type_, (len(values),))
        for values, name in zip(arrays.values(), arrays, strict=True):
            data = np.array(values, np.int32)
            writer.write(name, data if type_ is GGMLType.I32 else encode(type_, data))
    return path


def test_gpuidx(tmp_path):
    firing = read_gpuidx(gpuidx(tmp_path / "x", [0, 1, 0, 1], [1, 3]), 1, 4)
    assert firing.orders[0].tolist() == [1, 3, 0, 2] and firing.frequencies is None


@pytest.mark.parametrize(
    ("hot", "bucket", "type_", "message"),
    [
        ([0, 1, 0], [1], GGMLType.I32, "is not 4 times 0 or 1"),
        ([0, 2, 0, 1], [1, 3], GGMLType.I32, "is not 4 times 0 or 1"),
        ([0, 1, 0, 1], [1, 2], GGMLType.I32, "does not agree"),
        ([0, 1, 0, 1], [3, 1], GGMLType.I32, "does not agree"),
        ([0, 1, 0, 1], [1, 3, 9], GGMLType.I32, "does not agree"),
        ([0, 1, 0, 1], [1, 3], GGMLType.F32, "no list of numbers"),
    ],
)
def test_damaged_gpuidx(hot, bucket, type_, message, tmp_path):
    with pytest.raises(FileFormatError, match=message):
        read_gpuidx(gpuidx(tmp_path / "x", hot, bucket, type_), 1, 4)
    with pytest.raises(FileFormatError, match=r"lacks blk\.1"):
        read_gpuidx(gpuidx(tmp_path / "x", [0, 1, 0, 1], [1, 3]), 2, 4)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ffn_perm", np.zeros(N_FF, np.int32), "not an order"),
        ("ffn_perm", np.arange(1, N_FF + 1, dtype=np.int32), "not an order"),
        ("ffn_perm", np.arange(N_FF - 1, dtype=np.int32), "not an order"),
        ("ffn_freq", np.full(N_FF, np.nan, np.float32), "numbers from 0 to 1"),
        ("ffn_freq", np.full(N_FF, 1.5, np.float32), "numbers from 0 to 1"),
        ("ffn_freq", np.linspace(0, 1, N_FF, dtype=np.float32), "not sorted"),
        ("ffn_freq", np.arange(N_FF, dtype=np.int32), "numbers from 0 to 1"),
    ],
)
def test_damaged_tables_of_firing(name, values, message, tiny_gguf, tmp_path):
    source, target = GGUFFile(tiny_gguf("mha", "f16")), tmp_path / "x.gguf"
    type_ = GGMLType.I32 if values.dtype == np.int32 else GGMLType.F32
    with GGUFWriter(target, "llama") as writer:
        for key, value in source.metadata.items():
            if key != "general.architecture":
                writer.add(key, value)
        for t in source.tensors.values():
            writer.declare(t.name, t.type, t.shape)
        writer.declare(f"blk.1.{name}", type_, values.shape)
        for t in source.tensors.values():
            writer.write(t.name, t.data)
        writer.write(f"blk.1.{name}", values)
    with pytest.raises(ModelError, match=rf"blk\.1\.{name} is .*{message}"):
        powerinfer.open(target)
