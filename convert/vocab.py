"""Tokenizer files of a checkpoint -> the tokenizer keys of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.bpe import LLAMA3
from ..runtime.errors import FileFormatError, ModelError
from ..runtime.gguf import Value, ValueType
from ..runtime.paths import regular
from ..runtime.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED
from .checkpoint import read_json

MAX_TOKENIZER = 64 << 20  # bytes
_UNIGRAM, _BPE = 1, 2  # sentencepiece's TrainerSpec.model_type


def tokenizer_keys(folder: Path, config: dict[str, Any], n_vocab: int) -> dict[str, Value]:
    """Return the `tokenizer.*` keys for the checkpoint in `folder`.

    `n_vocab`: rows of the embedding; missing tokens are filled with unused ones. ModelError when
    the tokenizer is of a kind that is not supported or larger than the embedding,
    FileNotFoundError when there is none.
    """
    if (folder / "tokenizer.model").exists():
        return _sentencepiece_keys(folder / "tokenizer.model", config, n_vocab)
    if (folder / "tokenizer.json").exists() or (folder / "merges.txt").exists():
        return _bpe_keys(folder, config, n_vocab)
    raise FileNotFoundError(
        f"{folder} has no tokenizer (tokenizer.model, tokenizer.json, or vocab.json and merges.txt)"
    )


def _sentencepiece_keys(path: Path, config: dict[str, Any], n_vocab: int) -> dict[str, Value]:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if regular(path).stat().st_size > MAX_TOKENIZER:
        raise FileFormatError(f"{path} is too large for a tokenizer")
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise FileFormatError(f"{path} is not a SentencePiece model") from None
    if not model.pieces:
        raise FileFormatError(f"{path} has no pieces")
    kind = {_UNIGRAM: "t5", _BPE: "llama"}.get(model.trainer_spec.model_type)
    if kind is None:
        raise ModelError(f"{path} is neither a BPE nor a unigram model")

    pieces = [p.piece for p in model.pieces]
    scores = [p.score for p in model.pieces]
    types = [p.type for p in model.pieces]
    for piece, token in _added_tokens(path.parent / "added_tokens.json"):
        if token < len(pieces):
            continue  # it repeats a piece of the model
        if token != len(pieces):
            raise FileFormatError(f"{path.parent}/added_tokens.json leaves out token {len(pieces)}")
        pieces.append(piece)
        types.append(USER_DEFINED)
    if len(pieces) > n_vocab:
        raise ModelError(f"{path} has {len(pieces)} tokens, the embedding only {n_vocab}")
    pieces += [f"[PAD{i}]" for i in range(len(pieces), n_vocab)]
    types += [UNUSED] * (n_vocab - len(types))
    scores += [0.0] * (n_vocab - len(scores))

    settings = _settings(path.parent)
    normalizer = model.normalizer_spec
    trained = model.trainer_spec
    keys = {
        "tokenizer.ggml.model": Value(ValueType.STRING, kind),
        "tokenizer.ggml.pre": Value(ValueType.STRING, "default"),
        "tokenizer.ggml.scores": Value(
            ValueType.ARRAY, np.array(scores, np.float32), ValueType.FLOAT32
        ),
        **_token_keys(pieces, types, config, max(trained.bos_id, 0), max(trained.eos_id, 0)),
        "tokenizer.ggml.add_bos_token": Value(
            ValueType.BOOL, settings.get("add_bos_token") is not False
        ),
        "tokenizer.ggml.add_eos_token": Value(ValueType.BOOL, False),
        "tokenizer.ggml.add_space_prefix": Value(ValueType.BOOL, normalizer.add_dummy_prefix),
        "tokenizer.ggml.remove_extra_whitespaces": Value(
            ValueType.BOOL, normalizer.remove_extra_whitespaces
        ),
        **_template_key(settings),
    }
    if normalizer.precompiled_charsmap:
        charsmap = np.frombuffer(normalizer.precompiled_charsmap, np.uint8)
        keys["tokenizer.ggml.precompiled_charsmap"] = Value(
            ValueType.ARRAY, charsmap, ValueType.UINT8
        )
    return keys


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _template_key(settings: dict[str, Any]) -> dict[str, Value]:
    template = settings.get("chat_template")
    if not isinstance(template, str) or not template:
        return {}
    return {"tokenizer.chat_template": Value(ValueType.STRING, template)}


def _token_keys(
    pieces: list[str], types: list[int], config: dict[str, Any], bos: int, eos: int
) -> dict[str, Value]:
    """Return tokens, their types, and the ids of BOS and EOS (config.json's, else those given)."""

    def token_id(key: str, fallback: int) -> Value:
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        is_good = isinstance(value, int) and 0 <= value < len(pieces)
        return Value(ValueType.UINT32, value if is_good else fallback)

    return {
        "tokenizer.ggml.tokens": Value(ValueType.ARRAY, pieces, ValueType.STRING),
        "tokenizer.ggml.token_type": Value(
            ValueType.ARRAY, np.array(types, np.int32), ValueType.INT32
        ),
        "tokenizer.ggml.bos_token_id": token_id("bos_token_id", bos),
        "tokenizer.ggml.eos_token_id": token_id("eos_token_id", eos),
    }


def _bpe_keys(folder: Path, config: dict[str, Any], n_vocab: int) -> dict[str, Value]:
    """Keys of a byte-level BPE tokenizer: tokenizer.json, or GPT-2's vocab.json and merges.txt."""
    settings = _settings(folder)
    added: dict[str, tuple[int, bool]] = {}  # piece -> id, whether it is special
    if (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        data = read_json(path)
        model = data.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            raise ModelError(f"{path} is not a BPE tokenizer")
        if data.get("normalizer") is not None:
            raise ModelError(f"{path} normalises text, which is not supported")
        vocabulary, merges = model.get("vocab"), model.get("merges")
        try:
            pre, add_space = _pre_of(path, data.get("pre_tokenizer"))
            for token in data.get("added_tokens") or []:
                added[token.get("content", "")] = (token.get("id", -1), bool(token.get("special")))
            starts_with_bos = _starts_with_special(data.get("post_processor"))
        except (AttributeError, TypeError):  # something is of another type than it always is
            raise FileFormatError(f"{path} makes no sense") from None
    else:
        path = folder / "vocab.json"
        vocabulary = read_json(path)
        lines = _read_text(folder / "merges.txt").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        pre, add_space = "gpt-2", bool(settings.get("add_prefix_space", False))
        # The slow tokenizers of GPT-2's family name their special tokens here.
        others = settings.get("additional_special_tokens")
        named = [token for key, token in settings.items() if key.endswith("_token")]
        for token in [*named, *(others if isinstance(others, list) else ())]:
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in vocabulary:
                added[token] = (vocabulary[token], True)
        starts_with_bos = False
    add_bos = settings.get("add_bos_token", starts_with_bos)

    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise FileFormatError(f"{path} has no vocabulary or no merges")
    merges = [" ".join(m) if isinstance(m, list) else m for m in merges]
    if not all(isinstance(m, str) and len(m.split(" ")) == 2 for m in merges):
        raise FileFormatError(f"{path} has a merge that is not two pieces")
    pieces, types = [f"[PAD{i}]" for i in range(n_vocab)], [UNUSED] * n_vocab
    kinds = [(piece, token, NORMAL) for piece, token in vocabulary.items()]
    kinds += [(p, i, CONTROL if special else USER_DEFINED) for p, (i, special) in added.items()]
    for piece, token, type_ in kinds:
        if not isinstance(token, int) or isinstance(token, bool) or not piece:
            raise FileFormatError(f"{path} does not map tokens to numbers")
        if not 0 <= token < n_vocab:
            raise ModelError(f"{path} has the token {token}, the embedding only {n_vocab}")
        pieces[token], types[token] = piece, type_
    return {
        "tokenizer.ggml.model": Value(ValueType.STRING, "gpt2"),
        "tokenizer.ggml.pre": Value(ValueType.STRING, pre),
        **_token_keys(pieces, types, config, 0, 0),
        "tokenizer.ggml.merges": Value(ValueType.ARRAY, merges, ValueType.STRING),
        "tokenizer.ggml.add_bos_token": Value(ValueType.BOOL, bool(add_bos)),
        "tokenizer.ggml.add_space_prefix": Value(ValueType.BOOL, add_space),
        **_template_key(settings),
    }


def _read_text(path: Path) -> str:
    if regular(path).stat().st_size > MAX_TOKENIZER:
        raise FileFormatError(f"{path} is too large")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise FileFormatError(f"{path} is not UTF-8") from None


def _pre_of(path: Path, pre_tokenizer: Any) -> tuple[str, bool]:
    """Return llama.cpp's name for a pre-tokenizer, and whether it puts a space before text."""
    parts = pre_tokenizer if isinstance(pre_tokenizer, dict) else {}
    steps = parts.get("pretokenizers", [parts])
    kinds = [step.get("type") for step in steps]
    byte_level: dict[str, Any] = next((s for s in steps if s.get("type") == "ByteLevel"), {})
    add_space = bool(byte_level.get("add_prefix_space", False))
    if kinds == ["ByteLevel"] and byte_level.get("use_regex", True) is not False:
        return "gpt-2", add_space
    if kinds == ["Punctuation", "ByteLevel", "Digits", "Split"]:
        return "falcon", add_space
    if kinds == ["Split", "ByteLevel"] and steps[0].get("pattern", {}).get("Regex") == LLAMA3:
        return "llama-bpe", add_space
    raise ModelError(f"{path} cuts text in a way that is not known: {kinds}")


def _starts_with_special(post_processor: Any) -> bool:
    """Whether a tokenizer.json puts a special token (BOS) before a text."""
    if not isinstance(post_processor, dict):
        return False
    for step in post_processor.get("processors", [post_processor]):
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and single:
            return isinstance(single[0], dict) and "SpecialToken" in single[0]
    return False


def _added_tokens(path: Path) -> list[tuple[str, int]]:
    """Return (piece, id) of added_tokens.json in the order of ids; [] when there is none."""
    if not path.exists():
        return []
    added = read_json(path)
    if not all(isinstance(token, int) and piece for piece, token in added.items()):
        raise FileFormatError(f"{path} does not map tokens to numbers")
    return sorted(added.items(), key=lambda item: item[1])


assert NORMAL == 1  # sentencepiece and GGUF number the types of pieces alike
