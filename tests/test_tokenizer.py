"""Tokenising against the sentencepiece library, and streams that never break a character."""

import unicodedata

import numpy as np
import pytest
import sentencepiece
from conftest import DEMO
from powerinfer.runtime.errors import FileFormatError, RequestError
from powerinfer.runtime.gguf import GGUFFile, Value, ValueType
from powerinfer.runtime.gguf_writer import GGUFWriter
from powerinfer.runtime.tokenizer import StreamDecoder, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_gguf):
    return load_tokenizer(GGUFFile(demo_gguf("f16")))


@pytest.fixture(scope="module")
def theirs():
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))


def random_texts(n):
    """Random Unicode: words, spaces, digits, many scripts, emoji, controls, odd spaces."""
    rng = np.random.default_rng(5)
    ranges = [(32, 127), (32, 127), (160, 0x250), (0x370, 0x530), (0x4E00, 0x9FFF)]
    ranges += [(0x1F300, 0x1F6FF), (0, 32), (0x2000, 0x2070), (0xAC00, 0xD7A3), (0xE000, 0x10FFFF)]
    words = ["the LORD", "God ", "\n", "  ", "\u2581", "<s>", "</s>", "<0x41>", "123", "\t"]
    for _ in range(n):
        parts = []
        for _ in range(rng.integers(0, 12)):
            if rng.random() < 0.4:
                parts.append(words[rng.integers(len(words))])
            else:
                low, high = ranges[rng.integers(len(ranges))]
                codes = rng.integers(low, high, rng.integers(1, 8)).tolist()
                parts.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
        yield "".join(parts)


def test_random_unicode(tokenizer, theirs):
    for text in random_texts(2000):
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == theirs.encode(text), repr(text)
        # What the marker character means cannot be seen in the pieces: it comes back as a space.
        assert tokenizer.decode(ids) == text.replace("\u2581", " "), repr(text)
        assert tokenizer.decode(ids) == theirs.decode(ids), repr(text)


def test_all_of_the_held_out_text(tokenizer, theirs):
    text = (DEMO / "heldout.txt").read_text("utf-8")
    assert tokenizer.encode(text, add_bos=False) == theirs.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text)[0] == tokenizer.bos == 1


def test_streamed_pieces_join_to_the_whole(tokenizer):
    for text in random_texts(300):
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer, at_start=True)
        pieces = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" in text or not any("\ufffd" in p for p in pieces)


def test_a_character_is_never_broken(tokenizer):
    ids = tokenizer.encode("a\U0001f642b", add_bos=False)
    assert len(ids) >= 6  # four of them are bytes
    stream = StreamDecoder(tokenizer, at_start=True)
    pieces = [p for p in map(stream.push, ids) if p]
    assert "\U0001f642" in pieces and not any(unicodedata.category(p[0]) == "Cs" for p in pieces)
    # Cut inside the character: a replacement character at the end, and not before.
    stream = StreamDecoder(tokenizer, at_start=True)
    pieces = [stream.push(i) for i in ids[:-2]]
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == "\ufffd"


def test_invalid_bytes_and_ids(tokenizer):
    ff = [3 + 0xFF]
    assert tokenizer.decode(ff) == "\ufffd"
    for bad in (-1, tokenizer.n_vocab):
        with pytest.raises(RequestError, match="outside the vocabulary"):
            tokenizer.decode([bad])
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_a_text_that_goes_on_keeps_its_space(tokenizer):
    ids = tokenizer.encode("God said", add_bos=False)
    assert tokenizer.decode(ids) == "God said"
    stream = StreamDecoder(tokenizer, at_start=False)
    assert "".join(map(stream.push, ids)) == " God said"


def test_original_tokenizer_with_a_normaliser(samples, tmp_path):
    """This one maps characters (nmt_nfkc) and squeezes spaces; the file carries its table."""
    from conftest import convert

    theirs = sentencepiece.SentencePieceProcessor(
        model_file=str(samples / "hf" / "tokenizer.model")
    )
    ours = load_tokenizer(GGUFFile(convert(samples / "hf", tmp_path / "x.gguf", "f16")))
    for text in [*random_texts(300), "ｆｕｌｌ  width", "  a  b  ", "ﬁne"]:
        assert ours.encode(text, add_bos=False) == theirs.encode(text), repr(text)


# -- damaged vocabularies ---------------------------------------------------------------------

BYTES = [f"<0x{i:02X}>" for i in range(256)]
GOOD = {
    "model": Value(ValueType.STRING, "llama"),
    "tokens": ["<unk>", "<s>", "</s>", *BYTES, "a", "b"],
    "scores": [0.0] * 259 + [-1, -2],
    "token_type": [2, 3, 3, *[6] * 256, 1, 1],
}


def tokens(i, piece):
    return {"tokens": [piece if j == i else p for j, p in enumerate(GOOD["tokens"])]}


def token_type(i, type_):
    return {"token_type": [type_ if j == i else t for j, t in enumerate(GOOD["token_type"])]}


def vocabulary(path, **changes):
    v = GOOD | changes
    with GGUFWriter(path, "llama") as writer:
        for name, value in v.items():
            if isinstance(value, list):
                kind = {"tokens": ValueType.STRING, "scores": ValueType.FLOAT32}.get(name)
                value = Value(ValueType.ARRAY, value, kind or ValueType.INT32)
            if value is not None:
                writer.add(f"tokenizer.ggml.{name}", value)
    return GGUFFile(path)


def test_good_vocabulary(tmp_path):
    tokenizer = load_tokenizer(vocabulary(tmp_path / "x.gguf"))
    assert tokenizer.decode([259, 3 + 0x41, 260]) == "aAb"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no tokenizer"),
        ({"model": Value(ValueType.STRING, "magic")}, "'magic' tokenizer; supported"),
        ({"model": Value(ValueType.UINT32, 3)}, "is UINT32, not a string"),
        ({"tokens": None}, "lacks the tokens"),
        ({"token_type": [1]}, "261 tokens, 1 types"),
        ({"scores": [0.0]}, "bad token scores"),
        ({"scores": [0.0] * 260 + [float("nan")]}, "bad token scores"),
        (token_type(260, 7), "bad token types"),
        (token_type(260, -1), "bad token types"),
        (tokens(9, "<0x-1>"), "'<0x-1>' is no byte"),
        (tokens(9, "<0x041>"), "is no byte"),
        (tokens(259, ""), "token 259 is empty"),
        (tokens(259, "b"), "no good"),
        (token_type(0, 1), "exactly one unknown"),
        ({"bos_token_id": Value(ValueType.UINT32, 261)}, "'tokenizer.ggml.bos_token_id' is 261"),
        ({"eos_token_id": Value(ValueType.INT32, -1)}, "'tokenizer.ggml.eos_token_id' is -1"),
        ({"add_bos_token": Value(ValueType.UINT32, 1)}, "not a boolean"),
    ],
)
def test_damaged_vocabulary(changes, message, tmp_path):
    file = vocabulary(tmp_path / "x.gguf", **changes)
    with pytest.raises(FileFormatError, match=message):
        load_tokenizer(file)
