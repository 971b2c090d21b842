"""The reader against the gguf package, and against files made to break it."""

import os
import time

import gguf
import numpy as np
import pytest
from attacks.gguf_files import HOSTILE, PAD, U32, U64, header, key, string, tensor
from powerinfer.runtime import gguf as reader
from powerinfer.runtime.errors import FileFormatError
from powerinfer.runtime.formats import GGMLType, encode
from powerinfer.runtime.gguf import GGUFFile, Value, ValueType
from powerinfer.runtime.gguf_writer import GGUFWriter


def write(path, keys=None, tensors=None):
    """Write a file with our writer; `tensors`: name -> (type, float32 array)."""
    with GGUFWriter(path, "llama") as writer:
        for key, value in (keys or {}).items():
            writer.add(key, value)
        for name, (type_, x) in (tensors or {}).items():
            writer.declare(name, type_, x.shape)
        for name, (type_, x) in (tensors or {}).items():
            writer.write(name, encode(type_, x))
    return path


@pytest.fixture
def sample(tmp_path):
    x = np.arange(192, dtype=np.float32).reshape(3, 64)
    return write(
        tmp_path / "x.gguf",
        {
            "a.int": Value(ValueType.INT16, -3),
            "a.text": Value(ValueType.STRING, "grüße"),
            "a.flag": Value(ValueType.BOOL, True),
            "a.list": Value(ValueType.ARRAY, ["x", "", "yz"], ValueType.STRING),
            "a.numbers": Value(ValueType.ARRAY, np.array([1, 2, 3], "<f4"), ValueType.FLOAT32),
        },
        {"f": (GGMLType.F16, x), "v": (GGMLType.F32, x[0]), "q": (GGMLType.Q8_0, x)},
    )


def test_writer_and_reader_agree_with_the_gguf_package(sample):
    ours, theirs = GGUFFile(sample), gguf.GGUFReader(sample)
    assert ours.version == 3 and ours.magic == "GGUF"
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert mine.shape == tuple(reversed([int(n) for n in t.shape]))
        assert int(mine.type) == int(t.tensor_type)
        assert mine.data.tobytes() == t.data.tobytes()
    assert ours.get_int("a.int", low=-5) == -3
    assert ours.get_str("a.text") == "grüße"
    assert ours.get_bool("a.flag", False) is True
    assert ours.get_array("a.list", [ValueType.STRING]) == ["x", "", "yz"]
    assert ours.get_array("a.numbers", [ValueType.FLOAT32]).tolist() == [1, 2, 3]
    assert ours.get_array("nothing", [ValueType.STRING]) is None


def test_tensors_are_views_of_the_map(sample):
    tensor = GGUFFile(sample).tensors["f"]
    assert not tensor.data.flags.writeable and not tensor.data.flags.owndata
    assert np.shares_memory(tensor.numpy(), tensor.data)
    with pytest.raises(ValueError, match="not an array of plain numbers"):
        GGUFFile(sample).tensors["q"].numpy()


def test_getters_name_the_key(sample):
    file = GGUFFile(sample)
    with pytest.raises(FileFormatError, match=r"lacks the key 'nope'"):
        file.get_int("nope")
    with pytest.raises(FileFormatError, match=r"'a.text' is STRING, not an integer"):
        file.get_int("a.text")
    with pytest.raises(FileFormatError, match=r"'a.int' is -3, outside 0"):
        file.get_int("a.int")
    with pytest.raises(FileFormatError, match=r"'a.numbers' is not an array of STRING"):
        file.get_array("a.numbers", [ValueType.STRING])


def test_large_vocabulary_opens_quickly(tmp_path):
    words = [f"token{i:06d}" for i in range(128_000)]
    path = write(
        tmp_path / "v.gguf",
        {f"tokenizer.{k}": Value(ValueType.ARRAY, words, ValueType.STRING) for k in "ab"},
    )
    started = time.process_time()
    file = GGUFFile(path)
    took = time.process_time() - started
    assert file.get_array("tokenizer.a", [ValueType.STRING]) == words
    # Not a speed claim: two vocabularies in many times the 0.1 s that they need. A reader that
    # goes element by element through NumPy takes longer.
    assert took < 2


def test_a_failed_write_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="never written"),
        GGUFWriter(tmp_path / "x.gguf", "llama") as writer,
    ):
        writer.declare("a", GGMLType.F32, (2, 2))
    with pytest.raises(KeyboardInterrupt), GGUFWriter(tmp_path / "x.gguf", "llama") as writer:
        writer.declare("a", GGMLType.F32, (2, 2))
        writer.write("a", np.zeros((1, 2), np.float32))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(sample):
    before = sample.read_bytes()
    with pytest.raises(KeyError), GGUFWriter(sample, "llama"):
        raise KeyError
    assert sample.read_bytes() == before
    assert list(sample.parent.iterdir()) == [sample]


# -- hostile files (the files themselves: attacks/gguf_files.py) ------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(name, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(FileFormatError, match=r"hostile\.gguf") as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value)


def test_the_hostile_files_are_hostile_for_the_right_reason(tmp_path):
    """The same builders make a file that is accepted, so that a refusal says something."""
    path = tmp_path / "good.gguf"
    body = header(n_tensors=2, n_keys=2)
    body += key("general.alignment", 4, U32(32)) + key("a", 9, U32(8) + U64(1) + string("x"))
    path.write_bytes(body + tensor("a") + tensor("b", offset=256) + PAD * 2)
    assert list(GGUFFile(path).tensors) == ["a", "b"]


def test_truncated_anywhere(sample):
    raw = sample.read_bytes()
    data_start = GGUFFile(sample).data_offset
    cuts = [*range(data_start), *range(data_start, len(raw) - 32, 7)]
    for cut in cuts:
        sample.write_bytes(raw[:cut])
        with pytest.raises(FileFormatError):
            GGUFFile(sample)


def test_pwri_reads_old_type_numbers(tmp_path):
    raw = tensor("i", dims=(8,), type_=18) + PAD
    for magic, expected in ((b"PWRI", GGMLType.I32), (b"GGUF", None)):
        path = tmp_path / "x.gguf"
        path.write_bytes(header(n_tensors=1, magic=magic) + raw)
        if expected is None:  # there 18 is a block format of 256
            with pytest.raises(FileFormatError, match="IQ3_XXS blocks"):
                GGUFFile(path)
        else:
            assert GGUFFile(path).tensors["i"].type is expected


def test_directory_and_missing_file(tmp_path):
    with pytest.raises(FileFormatError, match="not a regular file"):
        GGUFFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("has_preadv", [True, False])
def test_loaded_in_pieces(has_preadv, sample, monkeypatch):
    """By several threads, or, where a file has but one position, by one."""
    monkeypatch.setattr(reader, "_LOADED_AT_ONCE", 100)
    if not has_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    assert bytes(GGUFFile(sample, load=True)._bytes) == sample.read_bytes()


def test_a_file_that_becomes_shorter_while_it_is_read(sample, monkeypatch):
    monkeypatch.setattr(reader, "_LOADED_AT_ONCE", 100)
    monkeypatch.setattr(os, "preadv", lambda *_: 0, raising=False)
    with pytest.raises(OSError, match="became shorter"):
        GGUFFile(sample, load=True)
