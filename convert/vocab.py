"""Tokenizer files of a checkpoint -> the tokenizer keys of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import FileFormatError, ModelError
from ..runtime.gguf import Value, ValueType
from ..runtime.tokenizer import NORMAL, UNUSED, USER_DEFINED
from .checkpoint import read_json

MAX_TOKENIZER = 64 << 20  # bytes
_UNIGRAM, _BPE = 1, 2  # sentencepiece's TrainerSpec.model_type


def tokenizer_keys(folder: Path, config: dict[str, Any], n_vocab: int) -> dict[str, Value]:
    """Return the `tokenizer.*` keys for the checkpoint in `folder`.

    `n_vocab`: rows of the embedding; missing tokens are filled with unused ones. ModelError when
    the tokenizer is of a kind that is not supported or larger than the embedding,
    FileNotFoundError when there is none.
    """
    path = folder / "tokenizer.model"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.model (SentencePiece)")
    return _sentencepiece_keys(path, config, n_vocab)


def _sentencepiece_keys(path: Path, config: dict[str, Any], n_vocab: int) -> dict[str, Value]:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if path.stat().st_size > MAX_TOKENIZER:
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
        pieces, scores, types = [*pieces, piece], [*scores, 0.0], [*types, USER_DEFINED]
    if len(pieces) > n_vocab:
        raise ModelError(f"{path} has {len(pieces)} tokens, the embedding only {n_vocab}")
    for i in range(len(pieces), n_vocab):
        pieces, scores, types = [*pieces, f"[PAD{i}]"], [*scores, 0.0], [*types, UNUSED]

    def token_id(key: str, fallback: int) -> int:
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) and 0 <= value < n_vocab else fallback

    settings_path = path.parent / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    normalizer = model.normalizer_spec
    keys = {
        "tokenizer.ggml.model": Value(ValueType.STRING, kind),
        "tokenizer.ggml.pre": Value(ValueType.STRING, "default"),
        "tokenizer.ggml.tokens": Value(ValueType.ARRAY, pieces, ValueType.STRING),
        "tokenizer.ggml.scores": Value(
            ValueType.ARRAY, np.array(scores, np.float32), ValueType.FLOAT32
        ),
        "tokenizer.ggml.token_type": Value(
            ValueType.ARRAY, np.array(types, np.int32), ValueType.INT32
        ),
        "tokenizer.ggml.bos_token_id": Value(
            ValueType.UINT32, token_id("bos_token_id", max(model.trainer_spec.bos_id, 0))
        ),
        "tokenizer.ggml.eos_token_id": Value(
            ValueType.UINT32, token_id("eos_token_id", max(model.trainer_spec.eos_id, 0))
        ),
        "tokenizer.ggml.add_bos_token": Value(
            ValueType.BOOL, settings.get("add_bos_token") is not False
        ),
        "tokenizer.ggml.add_eos_token": Value(ValueType.BOOL, False),
        "tokenizer.ggml.add_space_prefix": Value(ValueType.BOOL, normalizer.add_dummy_prefix),
        "tokenizer.ggml.remove_extra_whitespaces": Value(
            ValueType.BOOL, normalizer.remove_extra_whitespaces
        ),
    }
    if normalizer.precompiled_charsmap:
        charsmap = np.frombuffer(normalizer.precompiled_charsmap, np.uint8)
        keys["tokenizer.ggml.precompiled_charsmap"] = Value(
            ValueType.ARRAY, charsmap, ValueType.UINT8
        )
    template = settings.get("chat_template")
    if isinstance(template, str) and template:
        keys["tokenizer.chat_template"] = Value(ValueType.STRING, template)
    return keys


def _added_tokens(path: Path) -> list[tuple[str, int]]:
    """Return (piece, id) of added_tokens.json in the order of ids; [] when there is none."""
    if not path.exists():
        return []
    added = read_json(path)
    if not all(isinstance(token, int) and piece for piece, token in added.items()):
        raise FileFormatError(f"{path} does not map tokens to numbers")
    return sorted(added.items(), key=lambda item: item[1])


assert NORMAL == 1  # sentencepiece and GGUF number the types of pieces alike
