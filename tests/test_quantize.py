"""The quantiser: policy, bytes, refusals."""

import gguf
import numpy as np
import pytest
from powerinfer.quantize.encoder import quantize_file
from powerinfer.quantize.policy import Policy, parse_type
from powerinfer.runtime.errors import FileFormatError, ModelError, RequestError
from powerinfer.runtime.formats import GGMLType
from powerinfer.runtime.gguf import GGUFFile, Value, ValueType
from test_gguf import write

Q4_0, Q8_0, F16, F32 = GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.F16, GGMLType.F32


@pytest.mark.parametrize("target", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_equal_gguf_quants(target, threads, tiny_gguf, tmp_path):
    source = GGUFFile(tiny_gguf("gqa", "f32", True))
    out = tmp_path / "out.gguf"
    quantize_file(source.path, out, Policy(parse_type(target)), threads)
    file = GGUFFile(out)
    assert list(file.tensors) == list(source.tensors)
    for name, tensor in file.tensors.items():
        x = source.tensors[name].float32()
        type_ = gguf.GGMLQuantizationType(int(tensor.type))
        theirs = gguf.quants.quantize(x, type_)
        assert tensor.data.tobytes() == theirs.tobytes(), name


def test_the_gguf_package_reads_it(tiny_gguf, tmp_path):
    quantize_file(tiny_gguf("mha", "f16"), tmp_path / "x.gguf", Policy(Q4_0))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.file_type"].contents() == 2
    assert reader.fields["general.quantization_version"].contents() == 2
    assert reader.fields["general.architecture"].contents() == "llama"
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.ffn_up.weight"] == "Q4_0" and types["output.weight"] == "Q8_0"


def test_metadata_survives(tiny_gguf, tmp_path):
    source = GGUFFile(tiny_gguf("mha", "f16", True))
    quantize_file(source.path, tmp_path / "x.gguf", Policy(Q8_0))
    file = GGUFFile(tmp_path / "x.gguf")
    changed = {"general.file_type", "general.quantization_version"}
    assert set(file.metadata) - changed == set(source.metadata) - changed
    for key in set(source.metadata) - changed:
        ours, theirs = file.metadata[key], source.metadata[key]
        assert (ours.type, ours.element) == (theirs.type, theirs.element), key
        assert np.array_equal(ours.value, theirs.value), key


def test_policy():
    policy = Policy(Q4_0)
    cases = [
        ("blk.0.attn_norm.weight", F32, (64,), F32),
        ("blk.0.attn_q.bias", F16, (64,), F32),
        ("blk.0.ffn_freq", F32, (96,), F32),
        ("blk.0.ffn_perm", GGMLType.I32, (96,), GGMLType.I32),
        ("output.weight", F16, (384, 64), Q8_0),
        ("token_embd.weight", F16, (384, 64), Q8_0),
        ("blk.0.fc1.weight", F16, (64, 64), Q8_0),
        ("blk.0.ffn_up.weight", F16, (96, 64), Q4_0),
        ("blk.0.ffn_up.weight", F16, (96, 40), F16),
    ]
    for name, now, shape, wanted in cases:
        assert policy.type_of(name, now, shape) is wanted, name
    special = Policy(Q4_0, output_type=F16, predictor_type=Q4_0)
    assert special.type_of("output.weight", F16, (384, 64)) is F16
    assert special.type_of("blk.3.fc2.weight", F16, (96, 64)) is Q4_0
    assert Policy(F16).type_of("output.weight", F32, (384, 64)) is F16
    assert parse_type("Q4_0") is parse_type("q4_0") is Q4_0
    with pytest.raises(RequestError, match=r"unknown type 'q9'.*q4_0"):
        parse_type("q9")


def test_refuses_to_quantise_twice(tiny_gguf, tmp_path):
    q8_0 = tiny_gguf("mha", "q8_0")
    with pytest.raises(RequestError, match=r"is Q8_0 already.*--allow-requantize"):
        quantize_file(q8_0, tmp_path / "x.gguf", Policy(Q4_0))
    assert list(tmp_path.iterdir()) == []
    quantize_file(q8_0, tmp_path / "x.gguf", Policy(Q4_0), allow_requantize=True)
    ours, theirs = GGUFFile(tmp_path / "x.gguf"), GGUFFile(q8_0)
    name = "blk.0.ffn_up.weight"
    again = gguf.quants.quantize(theirs.tensors[name].float32(), gguf.GGMLQuantizationType.Q4_0)
    assert ours.tensors[name].data.tobytes() == again.tobytes()


def test_never_onto_its_input(tiny_gguf, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf("mha", "f16").read_bytes())
    (tmp_path / "link.gguf").symlink_to(path)
    before = path.read_bytes()
    for target in (path, tmp_path / "." / "x.gguf", tmp_path / "link.gguf"):
        with pytest.raises(RequestError, match="is the input itself"):
            quantize_file(path, target, Policy(Q4_0))
    assert path.read_bytes() == before


def test_weights_that_are_not_finite(tmp_path):
    x = np.ones((4, 64), np.float32)
    x[3, 63] = np.inf
    keys = {"general.name": Value(ValueType.STRING, "x")}
    path = write(tmp_path / "x.gguf", keys, {"blk.0.up.weight": (F32, x)})
    with pytest.raises(ModelError, match=r"blk\.0\.up\.weight holds NaN or infinity"):
        quantize_file(path, tmp_path / "y.gguf", Policy(Q4_0))
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_are_too_large_for_f16(tmp_path):
    x = np.ones((4, 64), np.float32)
    keys = {"general.name": Value(ValueType.STRING, "x")}
    for largest in (65519.0, 65520.0):  # the first still rounds to the largest
        x[3, 63] = largest
        path = write(tmp_path / "x.gguf", keys, {"blk.0.up.weight": (F32, x)})
        if largest < 65520:
            quantize_file(path, tmp_path / "y.gguf", Policy(GGMLType.F16))
            continue
        with pytest.raises(
            ModelError, match=r"blk\.0\.up\.weight has weights .* too large for f16"
        ):
            quantize_file(path, tmp_path / "z.gguf", Policy(GGMLType.F16))
    assert not (tmp_path / "z.gguf").exists()


def test_broken_input(tmp_path):
    for i, raw in enumerate((b"", b"GGUF", b"text " * 100)):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(raw)
        with pytest.raises(FileFormatError):
            quantize_file(path, tmp_path / "out.gguf", Policy(Q4_0))
    assert not (tmp_path / "out.gguf").exists()
