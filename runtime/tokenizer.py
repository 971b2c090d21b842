"""Text to token ids and back, from the vocabulary inside a GGUF file.

Vocabularies are handed to the library that made them (sentencepiece here, tokenizers in bpe.py),
rebuilt from the file's keys, so that the results are its own, to the letter.
"""

from __future__ import annotations

import codecs
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from .errors import FileFormatError, RequestError, shown
from .gguf import Metadata, ValueType

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"  # stands for a space inside pieces
UNKNOWN_TEXT = " \u2047 "  # what sentencepiece prints for the unknown piece
MAX_PIECE = 1 << 16  # bytes
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_MODEL_TYPES = {"llama": 2, "t5": 1}  # GGUF's name -> sentencepiece's TrainerSpec.model_type


class Tokenizer(ABC):
    """The tokenizer of a model file; `load_tokenizer` chooses the kind."""

    n_vocab: int
    bos: int
    eos: int
    add_bos: bool  # whether texts start with BOS
    strips_first_space: bool  # whether a text's first token carries a space that is not its own

    def __init__(self, file: Metadata, default_add_bos: bool, default_add_space: bool) -> None:
        self._path = file.path
        pieces = file.get_array("tokenizer.ggml.tokens", [ValueType.STRING])
        types = file.get_array("tokenizer.ggml.token_type", [ValueType.INT32, ValueType.UINT32])
        if pieces is None or types is None:
            raise FileFormatError(f"{file.path} lacks the tokens or types of its tokenizer")
        if not len(pieces) == len(types) > 0:
            raise FileFormatError(
                f"{file.path} is damaged: its tokenizer has {len(pieces)} tokens, "
                f"{len(types)} types"
            )
        if types.min() < NORMAL or types.max() > BYTE:
            raise FileFormatError(f"{file.path} is damaged: bad token types")
        self._pieces: list[str] = pieces
        self._types: list[int] = types.tolist()
        self.n_vocab = len(pieces)
        last = self.n_vocab - 1
        self.bos = file.get_int("tokenizer.ggml.bos_token_id", min(1, last), 0, last)
        self.eos = file.get_int("tokenizer.ggml.eos_token_id", min(2, last), 0, last)
        self.add_bos = file.get_bool("tokenizer.ggml.add_bos_token", default_add_bos)
        self.strips_first_space = file.get_bool(
            "tokenizer.ggml.add_space_prefix", default_add_space
        )
        for i, piece in enumerate(pieces):
            if not piece or len(piece) > MAX_PIECE:
                raise FileFormatError(f"{file.path} is damaged: token {i} is empty or too long")
        self._bytes = [
            self._piece_bytes(i, piece, type_)
            for i, (piece, type_) in enumerate(zip(pieces, self._types, strict=True))
        ]

    @abstractmethod
    def _piece_bytes(self, i: int, piece: str, type_: int) -> bytes:
        """Return what token i stands for."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without BOS."""

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Return the token ids of `text`, after BOS if the file (or `add_bos`) says so."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError("the text is not valid Unicode") from None
        ids = self._encode(text)
        return [self.bos, *ids] if (self.add_bos if add_bos is None else add_bos) else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; RequestError for an id outside the vocabulary."""
        stream = StreamDecoder(self, at_start=True)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def is_ordinary(self, token: int) -> bool:
        """Whether `token` spells text, rather than being a byte, unknown or a control token."""
        return self._types[token] in (NORMAL, USER_DEFINED)

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a text."""
        return token == self.eos

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one token; RequestError if it is outside the vocabulary."""
        if not 0 <= token < self.n_vocab:
            raise RequestError(f"token {token} is outside the vocabulary of {self.n_vocab}")
        return self._bytes[token]


def load_tokenizer(file: Metadata) -> Tokenizer:
    """Return the tokenizer of a model file.

    FileFormatError when the vocabulary is missing, damaged or of an unknown kind; ModelError when
    its library is not installed.
    """
    model = file.get_str("tokenizer.ggml.model", "")
    if not model:
        raise FileFormatError(f"{file.path} has no tokenizer (key 'tokenizer.ggml.model')")
    if model in _MODEL_TYPES:
        return SentencePieceTokenizer(file, _MODEL_TYPES[model])
    if model == "gpt2":
        from .bpe import BPETokenizer

        return BPETokenizer(file)
    raise FileFormatError(
        f"{file.path} has a {shown(model)} tokenizer; supported: {', '.join(_MODEL_TYPES)}, gpt2"
    )


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece BPE or unigram, by the sentencepiece library."""

    def __init__(self, file: Metadata, model_type: int) -> None:
        super().__init__(file, default_add_bos=True, default_add_space=True)
        scores = file.get_array("tokenizer.ggml.scores", [ValueType.FLOAT32])
        if scores is None or len(scores) != self.n_vocab or not np.isfinite(scores).all():
            raise FileFormatError(f"{file.path} is damaged: bad token scores")
        if self._types.count(UNKNOWN) != 1:
            raise FileFormatError(f"{file.path} is damaged: not exactly one unknown token")
        proto = _model_proto(
            self._pieces,
            scores.tolist(),
            self._types,
            model_type=model_type,
            charsmap=file.get_array(
                "tokenizer.ggml.precompiled_charsmap", [ValueType.UINT8, ValueType.INT8]
            ),
            add_space=self.strips_first_space,
            squeeze=file.get_bool("tokenizer.ggml.remove_extra_whitespaces", False),
        )
        import sentencepiece

        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(proto)
        except (RuntimeError, OSError) as error:
            raise FileFormatError(
                f"{file.path} has a vocabulary that is no good: {error}"
            ) from None

    def _piece_bytes(self, i: int, piece: str, type_: int) -> bytes:
        if type_ == BYTE:
            match = _BYTE_PIECE.fullmatch(piece)
            if match is None:
                raise FileFormatError(
                    f"{self._path} is damaged: token {i} {shown(piece)} is no byte"
                )
            return bytes([int(match[1], 16)])
        if type_ in (CONTROL, UNUSED):
            return b""
        if type_ == UNKNOWN:
            return UNKNOWN_TEXT.encode()
        return piece.replace(SPACE, " ").encode()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._sp.EncodeAsIds(text)
        return ids


class StreamDecoder:
    """Decode tokens one by one without ever breaking a multi-byte character.

    The pieces joined equal Tokenizer.decode of the whole. `at_start`: the first token begins
    the text, so that the space which encoding put before it is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = at_start and tokenizer.strips_first_space

    def push(self, token: int) -> str:
        """Return the text that is certain after `token`; it may be empty."""
        data = self._tokenizer.token_bytes(token)
        if self._strip and data:
            self._strip = False
            if self._tokenizer.is_ordinary(token):
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return what is left: a replacement character for an unfinished one."""
        return self._utf8.decode(b"", final=True)


def _model_proto(
    pieces: list[str],
    scores: list[float],
    types: list[int],
    model_type: int,
    charsmap: np.ndarray | None,
    add_space: bool,
    squeeze: bool,
) -> bytes:
    """Serialise a sentencepiece ModelProto (sentencepiece_model.proto).

    Written by hand because importing protobuf and filling 100,000 messages through it would
    take longer than everything else at start-up.
    """

    def varint(n: int) -> bytes:
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes([*out, n])

    def message(number: int, body: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(body)) + body

    def integer(number: int, value: int) -> bytes:
        return varint(number << 3) + varint(value)

    pack_score = struct.Struct("<f").pack
    out = []
    for piece, score, type_ in zip(pieces, scores, types, strict=True):
        raw = piece.encode()
        body = b"\x0a" + varint(len(raw)) + raw + b"\x15" + pack_score(score)
        out.append(message(1, body + integer(3, type_)))
    trainer = integer(3, model_type) + integer(35, int(BYTE in types))  # 35: byte_fallback
    normalizer = message(1, b"identity" if charsmap is None else b"from_file")
    if charsmap is not None:
        normalizer += message(2, charsmap.tobytes())
    normalizer += integer(3, int(add_space)) + integer(4, int(squeeze)) + integer(5, 1)
    return b"".join([*out, message(2, trainer), message(3, normalizer)])
