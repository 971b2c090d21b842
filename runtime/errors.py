"""Errors that a user can cause. Each message is one sentence that says what is wrong or to do."""

from __future__ import annotations


class PowerInferError(Exception):
    """Base of every error with a message meant for the user; command lines exit with code 1."""


def shown(value: object) -> str:
    """Return `value` for a message: quoted, without control characters, at most 80 characters."""
    text = repr(value if not isinstance(value, str) else value[:100])
    return text if len(text) <= 80 else text[:77] + "..."


class FileFormatError(PowerInferError):
    """A file is damaged, truncated, hostile, or not what its name promises."""


class ModelError(PowerInferError):
    """A well-formed file describes a model that cannot be run or converted here."""


class RequestError(PowerInferError):
    """A request cannot be served as asked: prompt too long, option out of range, ..."""
