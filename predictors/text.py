"""Texts to measure and to learn from, as windows of tokens."""

from __future__ import annotations

from pathlib import Path

from ..runtime.engine import Engine
from ..runtime.errors import RequestError
from ..runtime.paths import regular


def read_text(path: Path) -> str:
    """Return a file's text; RequestError if it is not UTF-8 or empty, OSError if not there."""
    try:
        text = regular(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text") from None
    if not text:
        raise RequestError(f"{path} is empty")
    return text


def windows(engine: Engine, text: str, length: int, limit: int | None = None) -> list[list[int]]:
    """Cut a text into windows of `length` tokens; the first of each is BOS if the model wants one.

    As in llama.cpp's perplexity tool, BOS takes the place of a token. `limit`: of tokens in all
    (None: none). What is left over at the end is dropped, unless it is all there is. RequestError
    for less than three tokens.
    """
    if length < 3 or length > engine.context:
        raise RequestError(f"windows of {length} tokens: 3 to {engine.context} are possible")
    ids = engine.tokenize(text, add_bos=False)[:limit]
    if len(ids) < 3:
        raise RequestError("the text is too short: at least three tokens are needed")
    bos = engine.tokenize("")  # or nothing
    starts = range(0, max(len(ids) - length, 0) + 1, length)
    return [bos + ids[start + len(bos) : start + length] for start in starts]
