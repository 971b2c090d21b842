"""Byte-level BPE against the tokenizers library that made the vocabularies."""

import json

import pytest
import tiny
import tokenizers
from conftest import DEMO, convert
from powerinfer.runtime.bpe import LLAMA3
from powerinfer.runtime.errors import FileFormatError, ModelError, PowerInferError
from powerinfer.runtime.gguf import GGUFFile, Value, ValueType
from powerinfer.runtime.gguf_writer import GGUFWriter
from powerinfer.runtime.tokenizer import StreamDecoder, load_tokenizer
from test_tokenizer import random_texts
from tokenizers import models, pre_tokenizers, processors, trainers

import powerinfer

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE = {
    "gpt-2": BYTE_LEVEL,
    "falcon": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            BYTE_LEVEL,
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def train(pre):
    """A small tokenizer as transformers would load it, with added tokens of both kinds."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE[pre]
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.N_VOCAB - 3,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(DEMO / "heldout.txt")], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<tool call>", normalized=False)])
    return tokenizer


def checkpoint(folder, name, pre, tokenizer):
    tiny.write_checkpoint(tiny.MODELS[name], folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("name", "pre"), [("falcon7", "falcon"), ("opt", "gpt-2"), ("mha", "llama-bpe")]
)
def test_random_unicode(name, pre, tmp_path):
    theirs = train(pre)
    path = convert(checkpoint(tmp_path / "m", name, pre, theirs), tmp_path / "x.gguf", "f16")
    file = GGUFFile(path)
    assert file.get_str("tokenizer.ggml.pre") == pre
    ours = load_tokenizer(file)
    extra = ["<tool call>", "a</s>b", "12345 x99", "don't DON'T", "  \n\n  x", "...!?;", ""]
    for text in [*random_texts(2000), *extra]:
        ids = ours.encode(text, add_bos=False)
        if pre == "llama-bpe":
            # Whole words of the vocabulary win over merges there.
            assert ours.decode(ids) == text.replace("<s>", "").replace("</s>", "")
            continue
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) or (
            ours.decode(ids) == text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")
        )
        stream = StreamDecoder(ours, at_start=True)
        pieces = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == ours.decode(ids)


def test_opt_files_of_the_slow_tokenizer(tmp_path):
    """vocab.json and merges.txt, as facebook/opt has them; the rest of the embedding is padding."""
    theirs = train("gpt-2")
    folder = tiny.write_checkpoint(tiny.MODELS["opt"], tmp_path / "m")
    model = json.loads(theirs.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"add_bos_token": True, "bos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    # What is not named a token is none: the word here is text.
    word = max((piece for piece in model["vocab"] if piece.isalpha() and piece.isascii()), key=len)
    settings |= {"errors": word, "additional_special_tokens": ["<unk>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with powerinfer.open(convert(folder, tmp_path / "x.gguf", "f32")) as llm:
        assert llm.tokenize("And God said")[0] == 1  # config.json's BOS
        ids = llm.tokenize("And God said, 123", add_bos=False)
        assert ids == theirs.encode("And God said, 123").ids
        assert llm.detokenize(ids) == "And God said, 123"
        assert llm.detokenize([383]) == ""
        assert llm.detokenize(llm.tokenize(word, add_bos=False)) == word
        assert len(list(llm.generate_tokens([1], max_tokens=5, ignore_eos=True))) == 5


def test_bos_of_a_post_processor(tmp_path):
    theirs = train("gpt-2")
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    path = convert(checkpoint(tmp_path / "m", "opt", "gpt-2", theirs), tmp_path / "x.gguf", "f16")
    assert load_tokenizer(GGUFFile(path)).encode("God") == theirs.encode("God").ids


def test_falcon_starts_without_bos(tmp_path):
    path = convert(
        checkpoint(tmp_path / "m", "falcon40", "falcon", train("falcon")),
        tmp_path / "x.gguf",
        "f16",
    )
    with powerinfer.open(path) as llm:
        assert llm.tokenize("God") == llm.tokenize("God", add_bos=False)
        assert len("".join(llm.generate("", max_tokens=9, temperature=0, ignore_eos=True))) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "not a BPE tokenizer"),
        ({"model": None}, "not a BPE tokenizer"),
        ({"normalizer": {"type": "NFKC"}}, "normalises text"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "not known"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{}]}}, "not known"),
        ({"added_tokens": [{"content": "x", "id": 100000}]}, "has the token 100000"),
        ({"added_tokens": [7]}, "makes no sense"),
        ({"added_tokens": 5}, "makes no sense"),
        ({"added_tokens": [{"content": ["x"], "id": 3}]}, "makes no sense"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [1]}}, "makes no sense"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": None}}, "makes no sense"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "not known"),
        ({"post_processor": {"type": "Sequence", "processors": 5}}, "makes no sense"),
    ],
)
def test_refused_tokenizer_json(change, message, tmp_path):
    folder = checkpoint(tmp_path / "m", "opt", "gpt-2", train("gpt-2"))
    data = json.loads((folder / "tokenizer.json").read_text()) | change
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(PowerInferError, match=message):
        convert(folder, tmp_path / "x.gguf", "f16")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("merges", "tokens", "pre", "error", "message"),
    [
        (["a b"], ["a", "b"], "gpt-2", FileFormatError, "damaged"),  # "ab" is not in it
        (["ab"], ["a", "b", "ab"], "gpt-2", FileFormatError, "not two pieces"),
        (["a  b"], ["a", "b", "ab"], "gpt-2", FileFormatError, "not two pieces"),
        (["a b"], ["a", "b", "b"], "gpt-2", FileFormatError, "two tokens are the same"),
        (["a b"], ["a", "b", "ab"], "magic", ModelError, "cuts text by 'magic'"),
        (None, ["a", "b", "ab"], "gpt-2", FileFormatError, "lacks the merges"),
    ],
)
def test_damaged_vocabulary(merges, tokens, pre, error, message, tmp_path):
    with GGUFWriter(tmp_path / "x.gguf", "opt") as writer:
        for name, value in (
            ("model", Value(ValueType.STRING, "gpt2")),
            ("pre", Value(ValueType.STRING, pre)),
            ("tokens", Value(ValueType.ARRAY, tokens, ValueType.STRING)),
            ("token_type", Value(ValueType.ARRAY, [1] * len(tokens), ValueType.INT32)),
            ("merges", merges and Value(ValueType.ARRAY, merges, ValueType.STRING)),
        ):
            if value is not None:
                writer.add(f"tokenizer.ggml.{name}", value)
    with pytest.raises(error, match=message):
        load_tokenizer(GGUFFile(tmp_path / "x.gguf"))
