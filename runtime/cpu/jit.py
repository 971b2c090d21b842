"""How kernels are compiled and cached.

`inline` functions are building blocks. A `job` is what the thread pool runs: a C function
(args, control, epoch, thread), compiled when its address is first asked for, cached on disk
between runs. numba's cache looks only at the file of the function itself, so the directory's name
carries a hash of all kernel sources.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types

from ..errors import RequestError
from ..paths import cache_dir
from . import isa, simd

_JOB = types.void(types.intp, types.intp, types.intp, types.intp)

inline = numba.njit(forceinline=True, error_model="numpy")
shared = numba.njit(error_model="numpy")  # a function of its own: compiled once, called
_compiling = threading.Lock()


@functools.cache
def kernel_cache() -> Path:
    """Return the directory of compiled kernels for these sources, versions and this ISA."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {isa.ISA}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache_dir() / f"kernels-{digest.hexdigest()[:16]}"


def compile_cached(
    decorator: Callable[..., Any], signature: Any, function: Any, **options: Any
) -> Any:
    """Compile with numba's cache in our directory; without a writable one, every time."""
    with _compiling:
        # numba takes the place of its cache from a global; ours holds only while we compile.
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(kernel_cache())
        try:
            return decorator(signature, cache=True, error_model="numpy", **options)(function)
        except Exception:
            # Read-only or full disk; or damaged cache files, which are swept away for next time.
            shutil.rmtree(kernel_cache(), ignore_errors=True)
            return decorator(signature, error_model="numpy", **options)(function)
        finally:
            numba.config.CACHE_DIR = before


def nogil(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that Python calls, and that runs without the interpreter's lock."""
    return lambda function: compile_cached(numba.njit, signature, function, nogil=True)


class Job:
    """A function of the thread pool."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Any = None

    @property
    def address(self) -> int:
        if self._compiled is None:
            self._compiled = compile_cached(numba.cfunc, _JOB, self._function)
        return int(self._compiled.address)


def job(function: Callable[..., Any]) -> Job:
    """Declare a job: `function(args, control, epoch, thread)`, all addresses or numbers (intp)."""
    return Job(function)


def load_jobs(jobs: Sequence[Job], notify: Callable[[str], Any]) -> None:
    """Make all jobs ready to run; `notify` is told if that means compiling, half a minute once."""
    if numba.config.DISABLE_JIT:
        raise RequestError("NUMBA_DISABLE_JIT is set: use --backend numpy, or unset it")
    # numba writes one index file for each function in its cache.
    if len(list(kernel_cache().glob("*/*.nbi"))) < len(jobs):
        notify("compiling kernels, once")
    for job in jobs:
        _ = job.address


@inline
def arg(args, i):
    """Return the i-th 64-bit word of a job's argument block."""
    return simd.load_i64(args + 8 * i)
