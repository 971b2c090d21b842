"""Reading checkpoints: real files of both kinds, and files that want to run code."""

import json
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
import torchfile
from powerinfer.convert.checkpoint import open_checkpoint, read_json, read_tensors
from powerinfer.runtime.errors import FileFormatError

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5, dtype=np.float16)


def test_safetensors(tmp_path):
    safetensors.numpy.save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path)
    assert np.array_equal(tensors["a"].float32(), A)
    assert np.array_equal(tensors["b"].float32(slice(1, 3)), B[1:3].astype(np.float32))


def test_safetensors_bf16(tmp_path):
    raw = (A.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # exact: small whole numbers
    info = {"a": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, len(raw)]}}
    head = json.dumps(info).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + raw)
    assert np.array_equal(open_checkpoint(tmp_path)["a"].float32(), A)


def test_torch_file(tmp_path):
    path = torchfile.write_tensors(tmp_path / "pytorch_model.bin", {"a": A, "b": B})
    for tensors in (read_tensors(path), open_checkpoint(tmp_path)):
        assert np.array_equal(tensors["a"].float32(), A)
        assert np.array_equal(tensors["b"].float32(), B.astype(np.float32))


def test_torch_views_share_a_storage(tmp_path):
    """A transposed view and an offset, as torch saves them: strides over one storage."""
    ops = torchfile.tensor_opcodes("0", A, shape=(4, 2), strides=(1, 4), offset=4)
    path = torchfile.write_zip(tmp_path / "x.pt", b"\x80\x02" + ops + b".", {"0": A.tobytes()})
    assert np.array_equal(read_tensors(path)[""].float32(), A[1:].T)


def test_shards(tmp_path):
    safetensors.numpy.save_file({"a": A}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"b": B}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert set(open_checkpoint(tmp_path)) == {"a", "b"}

    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard .*two\.safetensors is missing"):
        open_checkpoint(tmp_path)
    for bad in ("../one.safetensors", "/etc/passwd", "a\\b", 7):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(FileFormatError, match="not a file name"):
            open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"z": "one.safetensors"}}))
    with pytest.raises(FileFormatError, match="lacks z"):
        open_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(FileFormatError, match="no weight_map"):
        open_checkpoint(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def test_json_that_is_none(tmp_path):
    for text in ("", "[1]", "{", "\ufeff{}", "[" * 100_000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(FileFormatError):
            read_json(tmp_path / "x.json")


class Evil:
    def __reduce__(self):
        return (exec, ("open('evil_was_here', 'w')",))


def plain(**lies):
    return b"\x80\x02}X\x01\x00\x00\x00a" + torchfile.tensor_opcodes("0", A, **lies) + b"s."


# () paired with itself 60 times: 2^60 empty tuples to whoever walks through them.
DOUBLING = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
HOSTILE_PICKLES = {
    "code": (pickle.dumps(Evil(), protocol=2), "wants to call"),
    "code in protocol 4": (pickle.dumps(Evil(), protocol=4), "wants to call"),
    "os.system": (b"cos\nsystem\n(X\x02\x00\x00\x00lstR.", "wants to call"),
    "an instance": (b"(cos\nsystem\nX\x02\x00\x00\x00lso.", "pickle uses OBJ"),
    "unknown storage": (plain(storage=b"EvilStorage"), "unknown kind"),
    "storage too short": (plain(count=10**6), "too short"),
    "negative count": (plain(count=-1), "unknown kind"),
    "shape beyond the storage": (plain(shape=(300, 4)), "does not fit"),
    "offset beyond the storage": (plain(offset=5), "does not fit"),
    "negative offset": (plain(offset=-1), "does not fit"),
    "negative stride": (plain(strides=(-4, 1)), "size below 1"),
    "negative shape": (plain(shape=(-3, 4)), "size below 1"),
    "stride of 0 makes it huge": (plain(shape=(2**30, 4), strides=(0, 1)), "does not fit"),
    "shape and strides differ": (plain(strides=(1,)), "without a storage"),
    "no end": (b"\x80\x02}", "makes no sense"),
    "empty": (b"", "makes no sense"),
    "stack underflow": (b"\x80\x02R.", "makes no sense"),
    "mark missing": (b"\x80\x02t.", "makes no sense"),
    "memo missing": (b"\x80\x02h\x05.", "makes no sense"),
    "garbage": (b"\xff\xfe\xfd", "makes no sense"),
    "a number": (b"\x80\x02K\x07.", "does not hold tensors"),
    "tuples nested too deep": (
        b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
        "keys that are no names",
    ),
    "tuples that double": (b"\x80\x02}" + DOUBLING + b"Ns.", "keys that are no names"),
    "a name that doubles": (b"\x80\x02" + DOUBLING + b"X\x01\0\0\0x\x93.", "no name"),
    "a function that doubles": (b"\x80\x02" + DOUBLING + b")R.", "something without a name"),
    "a storage that doubles": (b"\x80\x02" + DOUBLING + b"Q.", "makes no sense"),
    "huge stride": (plain(shape=(1,), strides=(2**31 - 1,)), None),
    "empty tensor": (plain(shape=(0, 2**31 - 1)), "size below 1"),
    "recursive dict": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", None),
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickle_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, message = HOSTILE_PICKLES[name]
    path = torchfile.write_zip(tmp_path / "x.bin", program, {"0": A.tobytes()})
    if message is None:
        assert all(t.shape == (1,) for t in read_tensors(path).values())
    else:
        with pytest.raises(FileFormatError, match=message):
            read_tensors(path)
    assert not (tmp_path / "evil_was_here").exists()


def test_hostile_zips(tmp_path):
    good = torchfile.write_tensors(tmp_path / "x.bin", {"a": A}).read_bytes()
    for bad in (b"", b"not a zip", good[: len(good) // 2], pickle.dumps({"a": 1}, protocol=2)):
        (tmp_path / "y.bin").write_bytes(bad)
        with pytest.raises(FileFormatError):
            read_tensors(tmp_path / "y.bin")
    path = torchfile.write_zip(tmp_path / "z.bin", plain(), {})
    with pytest.raises(FileFormatError, match="storage '0' is missing"):
        read_tensors(path)


def test_hostile_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": A}, path)
    good = path.read_bytes()
    for bad in (b"", good[:5], good[:-1], struct.pack("<Q", 1 << 62) + good[8:], good[8:]):
        path.write_bytes(bad)
        with pytest.raises(FileFormatError):
            open_checkpoint(tmp_path)
