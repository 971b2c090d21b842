"""PowerInfer in Python: a GGUF toolchain and runtime for ReLU-sparse language models.

import powerinfer
llm = powerinfer.open("model.gguf", threads=2)
for piece in llm.generate("In the beginning", max_tokens=64, temperature=0):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .runtime.engine import Engine

__all__ = ["__version__", "open"]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # not worth the start-up time of every command

        return version("powerinfer-python")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open(
    path: str | os.PathLike[str], *, exact: bool = False, dense: bool = False, **options: Any
) -> Engine:
    """Open a model file and return an Engine.

    `exact` computes the decider of every neuron (lossless, no predictor), `dense` everything;
    `options` are fields of runtime.config.RunOptions: threads, context, backend, kv_type,
    sparse_threshold, ... Errors: OSError, and the PowerInferErrors that Engine documents.
    """
    from .runtime.config import RunOptions
    from .runtime.engine import Engine
    from .runtime.errors import RequestError

    if exact and dense:
        raise RequestError("exact and dense exclude each other")
    if exact or dense:
        options["mode"] = "exact" if exact else "dense"
    return Engine(path, RunOptions(**options))
