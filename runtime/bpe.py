"""Byte-level BPE (GPT-2, OPT, Falcon, Llama 3), by the tokenizers library (extra `bpe`).

Pieces spell bytes as printable characters (GPT-2's table): what `tokenizer.ggml.tokens` holds.
How text is cut before merging is named by `tokenizer.ggml.pre`, as in llama.cpp.
"""

from __future__ import annotations

from typing import Any

from .errors import FileFormatError, ModelError, shown
from .gguf import Metadata, ValueType
from .tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, Tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = ("default", "gpt-2", "falcon", "llama-bpe")


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's printable character of every byte, reversed: character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()


class BPETokenizer(Tokenizer):
    """Byte-level BPE. Added tokens are found in text before anything else, as transformers does."""

    def __init__(self, file: Metadata) -> None:
        super().__init__(file, default_add_bos=False, default_add_space=False)
        merges = file.get_array("tokenizer.ggml.merges", [ValueType.STRING])
        if merges is None:
            raise FileFormatError(f"{file.path} lacks the merges of its tokenizer")
        pre = file.get_str("tokenizer.ggml.pre", "default")
        if pre not in PRE_TOKENIZERS:
            raise ModelError(
                f"{file.path} cuts text by {shown(pre)}; supported: {', '.join(PRE_TOKENIZERS)}"
            )
        pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
        if any(len(pair) != 2 or not all(pair) for pair in pairs):
            raise FileFormatError(f"{file.path} is damaged: a merge is not two pieces")
        vocabulary = {piece: i for i, piece in enumerate(self._pieces)}
        if len(vocabulary) != self.n_vocab:
            raise FileFormatError(f"{file.path} is damaged: two tokens are the same")
        # The library panics on merges of pieces that it does not have.
        if not all(a in vocabulary and b in vocabulary and a + b in vocabulary for a, b in pairs):
            raise FileFormatError(f"{file.path} is damaged: a merge is not in the vocabulary")
        try:
            import tokenizers
            from tokenizers import models
        except ImportError:
            raise ModelError(
                f"{file.path} has a byte-level BPE tokenizer: pip install 'powerinfer-python[bpe]'"
            ) from None
        try:
            model = models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe")
        except Exception as error:  # the library raises bare Exceptions
            raise FileFormatError(f"{file.path} is damaged: {error}") from None
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = _pre_tokenizer(pre, self.strips_first_space)
        for type_, add in (
            (USER_DEFINED, self._tokenizer.add_tokens),
            (CONTROL, self._tokenizer.add_special_tokens),
        ):
            added = [p for p, t in zip(self._pieces, self._types, strict=True) if t == type_]
            add([tokenizers.AddedToken(p, normalized=False) for p in added])

    def _piece_bytes(self, i: int, piece: str, type_: int) -> bytes:
        if type_ in (CONTROL, UNUSED):
            return b""
        if type_ == NORMAL and all(c in _BYTES for c in piece):
            return bytes(_BYTES[c] for c in piece)
        return piece.encode()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _pre_tokenizer(pre: str, add_space: bool) -> Any:
    """Return what cuts text before merging."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

    if pre == "falcon":
        return Sequence(
            [
                Punctuation("contiguous"),
                ByteLevel(add_prefix_space=add_space),
                Digits(individual_digits=False),
                Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        )
    if pre == "llama-bpe":
        return Sequence(
            [
                Split(Regex(LLAMA3), "isolated"),
                ByteLevel(add_prefix_space=add_space, use_regex=False),
            ]
        )
    return ByteLevel(add_prefix_space=add_space)
