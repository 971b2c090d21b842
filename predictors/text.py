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
    """Cut a text into windows of `length` tokens, each with BOS where the model wants it.

    `limit`: of tokens in all (None: none). What is left over at the end is dropped, unless it is
    all there is. RequestError for less than two tokens.
    """
    if length < 2 or length > engine.context:
        raise RequestError(f"windows of {length} tokens: 2 to {engine.context} are possible")
    ids = engine.tokenize(text, add_bos=False)
    first = engine.tokenize("")  # BOS, or nothing
    step = length - len(first)
    wanted = len(ids) if limit is None else min(len(ids), max(limit * step // length, 2))
    if wanted < 2:
        raise RequestError("the text is too short: at least two tokens are needed")
    starts = range(0, max(wanted - step, 0) + 1, step)
    return [first + ids[start : min(start + step, wanted)] for start in starts]
