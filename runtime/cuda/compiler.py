"""CUDA C++ to machine code (cubin) by NVRTC, cached on disk; no GPU, driver or CuPy is needed.

NVRTC is one library, called here as it is in C. It comes with the package nvidia-cuda-nvrtc, or
with an installed CUDA toolkit. Headers are handed over by name; nothing is read from elsewhere.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paths import cache_dir, sweep
from .arguments import FOLDER
from .device import DeviceError

# Generic lambdas count as host functions without the second, in NVRTC before 13.4.
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
# Where the wheels put it, in the folder `nvidia`, by major version of CUDA; newest first.
_WHEEL_FILES = (
    {13: "cu13/bin/x86_64/nvrtc64_13*_0.dll", 12: "cuda_nvrtc/bin/nvrtc64_12*_0.dll"}
    if sys.platform == "win32"
    else {13: "cu13/lib/libnvrtc.so.13", 12: "cuda_nvrtc/lib/libnvrtc.so.12"}
)
NEWEST = max(_WHEEL_FILES)


@dataclass(frozen=True)
class Compiled:
    """One translation unit: machine code, the PTX it was made from, and what NVRTC says."""

    cubin: bytes
    ptx: str
    log: str


def find_library(newest: int = NEWEST) -> str:
    """Return where NVRTC is, as the system's loader takes it; "" if it is not on this machine.

    `newest`: major version of CUDA; a driver loads no code that a newer one's NVRTC made.
    """
    spec = importlib.util.find_spec("nvidia")  # many packages share this folder
    for major, pattern in _WHEEL_FILES.items():
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(place).glob(pattern)):
                if major <= newest:
                    return str(path)
    return ctypes.util.find_library("nvrtc") or ""


class NVRTC:
    """The library: `version` (13, 0), `archs` (75, 80, ...) that it makes code for."""

    def __init__(self, library: str) -> None:
        if Path(library).is_absolute():  # its other half lies beside it, where not all look
            if sys.platform == "win32":
                os.add_dll_directory(str(Path(library).parent))
            for other in Path(library).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(other))
        self._library = ctypes.CDLL(library)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, n = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self._call("GetNumSupportedArchs", ctypes.byref(n))
        archs = (ctypes.c_int * n.value)()
        self._call("GetSupportedArchs", archs)
        self.version, self.archs = (major.value, minor.value), tuple(sorted(archs))

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._library, f"nvrtc{name}")(*args)
        if code:
            why = self._library.nvrtcGetErrorString(code).decode()
            raise DeviceError(f"NVRTC fails in nvrtc{name}: {why}")

    def arch(self, capability: tuple[int, int]) -> int:
        """Return the newest arch whose code a GPU runs: of its major version, no newer minor."""
        major, minor = capability
        fit = [a for a in self.archs if a // 10 == major and a % 10 <= minor]
        if not fit:
            version = ".".join(map(str, self.version))
            raise DeviceError(
                f"NVRTC {version} makes no code for compute capability {major}.{minor}"
            )
        return max(fit)

    def compile(
        self,
        source: str,
        name: str,
        arch: int,
        headers: Mapping[str, str],
        options: Sequence[str] = OPTIONS,
    ) -> Compiled:
        """Compile one text. `headers`: what it may include, by name. DeviceError with the log."""
        program = ctypes.c_void_p()
        names, texts = (_strings(list(part)) for part in (headers, headers.values()))
        (text, title), n = (source.encode(), name.encode()), len(headers)
        self._call("CreateProgram", ctypes.byref(program), text, title, n, texts, names)
        try:
            flags = [*options, f"--gpu-architecture=sm_{arch}"]
            try:
                self._call("CompileProgram", program, len(flags), _strings(flags))
            except DeviceError as error:
                log = self._get("ProgramLog", program).decode()
                what = next((line for line in log.splitlines() if "error" in line), str(error))
                failed = DeviceError(f"NVRTC cannot compile {name} for sm_{arch}: {what}")
                failed.add_note(log)
                raise failed from None
            cubin, ptx = self._get("CUBIN", program), self._get("PTX", program)
            return Compiled(cubin, ptx.decode(), self._get("ProgramLog", program).decode())
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw if what == "CUBIN" else buffer.value


def _strings(texts: Sequence[str]) -> Any:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


@functools.cache
def nvrtc(newest: int = NEWEST) -> NVRTC:
    """Return the library, as find_library does. DeviceError says how to install it."""
    found = find_library(newest)
    hint = f"pip install 'powerinfer-python[cuda{min(newest, NEWEST)}]'"
    if not found:
        raise DeviceError(f"NVRTC is not installed: {hint}")
    try:
        library = NVRTC(found)
    except (OSError, AttributeError) as error:
        raise DeviceError(f"{found} cannot be used: {error}") from None
    if library.version[0] > newest:  # of an installed toolkit
        raise DeviceError(f"NVRTC is too new for a driver of CUDA {newest}: {hint}")
    return library


def sources(folder: Path = FOLDER) -> tuple[dict[str, str], dict[str, str]]:
    """Return the texts of a folder's .cu files and of its headers, by file name."""
    units, headers = (
        {path.name: path.read_text("utf-8") for path in sorted(folder.glob(pattern))}
        for pattern in ("*.cu", "*.cuh")
    )
    return units, headers


def compile_all(
    capability: tuple[int, int],
    notify: Callable[[str], Any] = lambda text: None,
    newest: int = NEWEST,
    folder: Path = FOLDER,
) -> dict[str, bytes]:
    """Return the machine code for a GPU of every .cu file, by file name; from the cache if there.

    `notify` is told if that means compiling. `newest`: see find_library. Without a writable cache
    all is compiled every time. DeviceError.
    """
    library = nvrtc(newest)
    arch = library.arch(capability)
    units, headers = sources(folder)
    key = hashlib.sha256(repr((library.version, arch, OPTIONS, units, headers)).encode())
    cache = cache_dir() / f"cubin-{key.hexdigest()[:16]}"
    found = {name: _load(cache / f"{name}bin") for name in units}
    missing = [name for name, cubin in found.items() if cubin is None]
    if missing:
        notify("compiling GPU kernels, once")
        sweep("cubin-*")

    def make(name: str) -> bytes:
        cubin = library.compile(units[name], name, arch, headers).cubin
        _store(cache / f"{name}bin", cubin)
        return cubin

    with suppress(OSError):
        os.utime(cache)  # it is in use
    with ThreadPoolExecutor() as pool:
        made = dict(zip(missing, pool.map(make, missing), strict=True))
    return {name: cubin or made[name] for name, cubin in found.items()}


def _load(path: Path) -> bytes | None:
    """Return what _store wrote; None if it is not there or damaged."""
    with suppress(OSError):
        stored = path.read_bytes()
        digest, cubin = stored[:32], stored[32:]
        if hashlib.sha256(cubin).digest() == digest:
            return cubin
    return None


def _store(path: Path, cubin: bytes) -> None:
    """Write a file whole or not at all: under another name first."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
