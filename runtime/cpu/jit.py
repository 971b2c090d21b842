"""How kernels are compiled and cached.

`inline` functions are building blocks. A Kernel is a C function, compiled when its address is
first asked for and cached on disk between runs; a `job` is one that the thread pool runs. numba's
cache looks only at the file of the function itself, so the directory's name carries a hash of all
that kernels are made of; and it does not lock its index, so each kernel has a folder of its own in
there. Where many are missing, processes of their own help to compile them; a lock for each kernel
says who is at it, whoever they belong to.

A constant type is a variable of the function around a kernel, or an argument that is `literally`
said to be one: then what is behind a comparison that is false for it is not compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba import types

from ..errors import RequestError
from ..paths import cache_dir, sweep
from . import isa

if numba.config.DISABLE_JIT:  # before anything is declared that would be no kernel
    raise RequestError("NUMBA_DISABLE_JIT is set: use --backend numpy, or unset it")
from . import simd

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Without the wrappers that Python or C would call (a fifth of the time to compile), so that kernels
# only may call these; Python may call their `py_func`.
_PIECE = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inline = numba.njit(forceinline=True, **_PIECE)
# Larger pieces stay functions: copied into every place that uses them they take long to compile.
function = numba.njit(**_PIECE)
_compiling = threading.Lock()
_COMPLETE = "complete"  # a file in the folder of a kernel that is there
# Processes that compile at once, this one included, and from how many kernels on: to start one
# takes as long as to compile one. How long one waits for another's kernel.
_PROCESSES, _MANY, _PATIENCE_S = 4, 6, 60.0


CONSTANTS = ("cache.py", "formats.py", "step.py")  # modules whose constants kernels hold


@functools.cache
def kernel_cache() -> Path:
    """Return the directory of compiled kernels for these sources, versions, this CPU and ISA.

    Of sources their places and times, too: numba's cache is for those that it was made from.
    """
    versions, b = f"{numba.__version__} {llvmlite.__version__} {isa.ISA}", llvmlite.binding
    cpu = f"{b.get_host_cpu_name()} {b.get_host_cpu_features().flatten()}"
    digest, here = hashlib.sha256(f"{versions} {cpu}".encode()), Path(__file__).parent
    for source in (*sorted(here.glob("*.py")), *(here.parent / name for name in CONSTANTS)):
        digest.update(f"{source} {source.stat().st_mtime_ns}".encode())
        digest.update(source.read_bytes())
    return cache_dir() / f"kernels-{digest.hexdigest()[:16]}"


def cached_kernels() -> int:
    """Return how many kernels there are in the cache."""
    return sum(1 for _ in kernel_cache().glob(f"*/{_COMPLETE}"))


def compile_cached(
    decorator: Callable[..., Any], signature: Any, function: Any, name: str, **options: Any
) -> Any:
    """Compile with numba's cache in our directory; without a writable one, every time."""
    folder = kernel_cache() / name
    with _compiling:
        # numba takes the place of its cache from a global; ours holds only while we compile.
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)
        try:
            compiled = decorator(signature, cache=True, error_model="numpy", **options)(function)
            with contextlib.suppress(OSError):
                (folder / _COMPLETE).touch()
            return compiled
        except Exception:
            # Read-only or full disk; or damaged cache files, which are swept away for next time.
            shutil.rmtree(folder, ignore_errors=True)
            return decorator(signature, error_model="numpy", **options)(function)
        finally:
            numba.config.CACHE_DIR = before


def nogil(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that Python calls, and that runs without the interpreter's lock."""
    return lambda function: compile_cached(
        numba.njit, signature, function, function.__name__, nogil=True
    )


_KERNELS: dict[str, Kernel] = {}


class Kernel:
    """A function of `n_args` words (intp) that machine code calls by its address."""

    def __init__(self, function: Callable[..., Any], n_args: int, name: str) -> None:
        self._function, self._signature = function, types.void(*[types.intp] * n_args)
        self.name = name
        self._compiled: Any = None
        _KERNELS[name] = self

    @property
    def address(self) -> int:
        if self._compiled is None:
            self._compiled = compile_cached(numba.cfunc, self._signature, self._function, self.name)
        return int(self._compiled.address)

    @property
    def is_cached(self) -> bool:
        folder = kernel_cache() / self.name
        # numba takes nothing from a folder that it could not write to.
        is_there = (folder / _COMPLETE).exists() and os.access(folder, os.W_OK)
        return self._compiled is not None or is_there


def job(function: Callable[..., Any]) -> Kernel:
    """Declare a job of the thread pool: `function(args, control, epoch, thread)`."""
    return Kernel(function, 4, f"job_{function.__name__}")


@contextlib.contextmanager
def _claim(kernel: Kernel, patience_s: float) -> Iterator[bool]:
    """Be the only one that compiles a kernel; yields False if another is, all this time."""
    deadline = time.monotonic() + patience_s
    with contextlib.ExitStack() as stack:
        try:
            if fcntl is None:
                raise OSError
            kernel_cache().mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(kernel_cache() / f"{kernel.name}.lock", "w"))
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        yield False
                        return
                    time.sleep(0.01)
        except OSError:
            pass  # no such locks here, or no cache: then some are compiled twice
        yield True


def compile_all(kernels: Sequence[Kernel]) -> None:
    """Make kernels ready to run, first those that no other process is compiling."""
    others = []
    for kernel in kernels:
        with _claim(kernel, 0) as is_ours:
            if is_ours:
                _ = kernel.address
            else:
                others.append(kernel)
    for kernel in others:
        with _claim(kernel, _PATIENCE_S):  # not for ever: it may have been stopped
            _ = kernel.address


_HELPER = """
import sys
from powerinfer.runtime.cpu import isa
isa.use(sys.argv[1])
from powerinfer.runtime.cpu import jit, operators
jit.compile_all([jit._KERNELS[name] for name in sys.argv[2:]])
"""


def _start_helpers(missing: Sequence[Kernel], n: int) -> list[subprocess.Popen[bytes]]:
    """Start n processes that compile the same kernels as this one, from the last one on."""
    if fcntl is None or not sys.executable or len(missing) < _MANY:
        return []
    command = [sys.executable, "-c", _HELPER, isa.ISA, *(k.name for k in reversed(missing))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    nothing = subprocess.DEVNULL
    with contextlib.suppress(OSError):  # without a cache, or without more processes
        kernel_cache().mkdir(parents=True, exist_ok=True)
        return [
            subprocess.Popen(
                command, env=environment, stdin=nothing, stdout=nothing, stderr=nothing
            )
            for _ in range(n)
        ]
    return []


def load_kernels(kernels: Sequence[Kernel], notify: Callable[[str], Any], n_cores: int = 1) -> None:
    """Make kernels ready to run; `notify` is told if that means compiling, seconds for each."""
    missing = [kernel for kernel in dict.fromkeys(kernels) if not kernel.is_cached]
    if missing:
        notify("compiling kernels, once")
        sweep("kernels-*")
        helpers = _start_helpers(missing, min(n_cores, _PROCESSES) - 1)
        try:
            compile_all(missing)
        finally:
            for helper in helpers:
                helper.terminate()
                helper.wait()
    for kernel in kernels:
        _ = kernel.address
    with contextlib.suppress(OSError):
        os.utime(kernel_cache())  # it is in use


@inline
def arg(args, i):
    """Return the i-th 64-bit word of a job's argument block."""
    return simd.load_i64(args + 8 * i)
