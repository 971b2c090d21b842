"""Run the CUDA kernels of this project on the CPU, fast, or with every access checked.

    sim = load("gemv.cu", check=True)
    x = sim.array(np.ones(64, np.float32), "x")
    y = sim.empty(8, np.float32, "y")
    sim.launch("gemv_f32", grid=(1, 1), block=256, args=arguments.fill("gemv_f32", x=x, y=y, ...))
    y.numpy()

The headers beside this file make g++ understand CUDA C++. What it compiled is kept in the user's
cache, by the content of all that went into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from powerinfer.runtime.paths import cache_dir

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "runtime" / "cuda"
HEADERS = ("fibers.h", "checks.h", "cusim.h", "guard.h", "launch.h")
ALIGNMENT = 256
ON_GPU = os.environ.get("CUSIM") == "gpu"
KEPT_DAYS = 14  # what has not been used for so long is deleted

# Threads switch in an asm statement, which -fipa-reference does not look into: it would take what
# other threads write meanwhile, in static variables, for unchanged.
_COMMON = [
    "-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-extern-tls-init",
    "-fno-ipa-reference", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-U_FORTIFY_SOURCE", "-fcf-protection=none", "-march=native", "-w",
    "-DCUSIM", "-D_GLIBCXX_INCLUDE_NEXT_C_HEADERS",  # C's own, a third of a small file's time
]  # fmt: skip
# Tests compile more than they run: by -O2 kernels are no faster than it takes longer.
_FAST = ["-O1"]
# Nothing is optimised away unseen, and no call (the last one) stands for accesses.
_CHECK = [
    "-O0", "-g1", "-DCUSIM_CHECK",
    "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds,shift-exponent,signed-integer-overflow,integer-divide-by-zero",
    "-fno-builtin",
]  # fmt: skip

_ATTRIBUTE = r"(?:alignas|__align__)\s*\([^)]*\)\s*"
_DYNAMIC = re.compile(
    rf"extern\s+__shared__\s+(?:{_ATTRIBUTE})?([\w:\s]+?)\s*(?:{_ATTRIBUTE})?\b(\w+)\s*\[\s*\]"
)
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\)\s*'
    r"(\w+)\s*\(\s*(?:const\s+)?(\w+)\s+\w+\s*\)"
)

# What a fault can be, by Kind of fibers.h; the last two are found before a kernel runs.
KINDS = (
    "",
    "out of bounds",
    "uninitialised read",
    "race",
    "divergence",
    "misaligned",
    "arithmetic",
    "endless",
    "early",
    "launch",
    "source",
)

# Arrays that no kernel writes: what may be read before the kernels before have ended.
CONSTANTS = {"w", "w.q", "w.d", "weight", "bias", "base"}
# What load(replace=) may take away, so that no kernel waits for the kernels before it.
WAIT = "cusim::wait_for_predecessors();"


class SimError(Exception):
    """A kernel did what it must not, or could not be compiled or launched.

    `kind` is one of KINDS; the message names kernel, block, thread, memory and line.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class _Fault(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int32) for n in ("kind",)),
        *((n, ctypes.c_uint32) for n in ("thread", "other_thread", "block", "other_block")),
        *((n, ctypes.c_int32) for n in ("size", "line", "write", "other_write")),
        *((n, ctypes.c_uint64) for n in ("address", "place", "other_place")),
        ("text", ctypes.c_char * 4096),
    )


class _Region(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("written", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
        ("is_constant", ctypes.c_uint64),
    )


_CELL = 40  # bytes of a Cell of checks.h
# Numbers of segments (checks.h) are not used twice by any library; and one launch at a time.
_clock = ctypes.c_uint32(1)
_lock = threading.RLock()


class Array:
    """Device memory [shape]: `address`, and what to do with it from the host.

    In check mode nothing lies beside it, and it is known which of its bytes have been written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, name: str, check: bool) -> None:
        self.shape, self.dtype, self.name = shape, np.dtype(dtype), name
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        # What a fault writes just before or behind it, where nothing is checked, is not the heap's.
        self._memory = np.empty(self.nbytes + 3 * ALIGNMENT, np.uint8)
        start = ALIGNMENT + -self._memory.ctypes.data % ALIGNMENT
        self._bytes = self._memory[start : start + self.nbytes]
        self._bytes.fill(0xFF)  # a NaN, for those who read what nobody wrote
        self.address = self._memory.ctypes.data + start
        self._written = np.zeros(self.nbytes if check else 0, np.uint8)
        self._cells = np.zeros(self.nbytes * _CELL if check else 0, np.uint8)

    @classmethod
    def of_host(cls, array: np.ndarray, name: str, check: bool) -> Array:
        """Return an Array that is the memory of a contiguous host array itself, all written."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous")
        self = cls.__new__(cls)
        self.shape, self.dtype, self.name, self.nbytes = (
            array.shape,
            array.dtype,
            name,
            array.nbytes,
        )
        self._memory, self._bytes = array, array.reshape(-1).view(np.uint8)
        self.address = array.ctypes.data
        self._written = np.ones(self.nbytes if check else 0, np.uint8)
        self._cells = np.zeros(self.nbytes * _CELL if check else 0, np.uint8)
        return self

    def numpy(self) -> np.ndarray:
        """Return a copy of what it holds now."""
        return self._bytes.view(self.dtype).reshape(self.shape).copy()

    def write(self, data: Any) -> None:
        """Fill it from an array of its shape, or from one value."""
        self._bytes.view(self.dtype).reshape(self.shape)[...] = data
        self._written.fill(1)

    fill = write

    def _region(self) -> tuple[int, int, int, int]:
        checks = self._written.ctypes.data, self._cells.ctypes.data
        return (self.address, self.nbytes, *checks, self.name in CONSTANTS)


class _Library:
    """One compiled .cu file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = code = ctypes.CDLL(str(path))
        pointer = ctypes.c_void_p
        code.cusim_launch.argtypes = [
            ctypes.c_uint, pointer, pointer, pointer, ctypes.c_size_t, ctypes.c_uint64,
            ctypes.c_double, pointer, ctypes.c_uint, pointer, pointer,
        ]  # fmt: skip
        code.cusim_static_shared.restype = ctypes.c_size_t
        code.cusim_shared_offset.restype = ctypes.c_long
        code.cusim_shared_offset.argtypes = [ctypes.c_uint64]
        self.static_shared = int(code.cusim_static_shared())
        self.kernels: dict[str, tuple[int, int, int]] = {}  # number, bytes of arguments, threads
        name, size, threads = ctypes.c_char_p(), ctypes.c_size_t(), ctypes.c_uint()
        while code.cusim_kernel(
            len(self.kernels), ctypes.byref(name), ctypes.byref(size), ctypes.byref(threads)
        ):
            text = (name.value or b"").decode()
            self.kernels[text] = (len(self.kernels), size.value, threads.value)

    def place(self, offset: int, line: int = 0) -> str:
        """Return "file:line" of code, with those that it was inlined into."""
        command = ["addr2line", "-i", "-e", str(self.path), hex(offset - 1)]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        places = [Path(entry.split(" ")[0]).name for entry in found.splitlines()]
        places = [p for p in places if not p.startswith((*HEADERS, "??"))]
        return " in ".join(places) if places else f"line {line}"

    @functools.cached_property
    def _shared_names(self) -> list[tuple[int, int, str]]:
        found = subprocess.run(
            ["readelf", "-sWC", str(self.path)], capture_output=True, text=True, check=False
        )
        symbols = []
        for line in found.stdout.splitlines():
            m = re.match(r"\s*\d+: ([0-9a-f]+)\s+(\d+) TLS\s+\w+\s+\w+\s+\w+\s+(.*)", line)
            if m:
                name = re.sub(r"\[clone[^]]*\]|\(.*\)", "", m[3]).split("::")[-1]
                symbols.append((int(m[1], 16), int(m[2]), name))
        return sorted(symbols)

    def shared(self, address: int) -> str:
        """Return "shared name + offset" of an address, "" if it is not in shared memory."""
        offset = int(self.code.cusim_shared_offset(address))
        if offset < 0:
            return ""
        for begin, size, name in self._shared_names:
            if begin <= offset < begin + size:
                return f"shared {name} + {offset - begin}"
        return f"shared memory + {offset}"


class Simulator:
    """A GPU: kernels by name, and memory. One block runs at a time, one thread of it at a time."""

    def __init__(self, libraries: Sequence[_Library], check: bool) -> None:
        self.check = check
        self.time_limit = 60.0  # seconds of processor time that a launch may take
        self._kernels: dict[str, tuple[_Library, int, int, int]] = {}
        for library in libraries:
            for name, kernel in library.kernels.items():
                if name in self._kernels:
                    raise SimError("source", f"two kernels have the name {name}")
                self._kernels[name] = (library, *kernel)
        self._arrays: list[Array] = []
        self._regions: Any = None

    @property
    def kernels(self) -> list[str]:
        """The names of all kernels."""
        return list(self._kernels)

    def empty(self, shape: int | tuple[int, ...], dtype: Any, name: str = "array") -> Array:
        """Return new device memory that nothing has been written to."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return self._keep(Array(shape, dtype, name, self.check))

    def array(self, data: Any, name: str = "array") -> Array:
        """Return new device memory with a copy of `data`."""
        data = np.asarray(data)
        array = self.empty(data.shape, data.dtype, name)
        array.write(data)
        return array

    def register(self, data: np.ndarray, name: str = "host") -> Array:
        """Let kernels use the memory of a contiguous host array itself (check mode asks for it)."""
        return self._keep(Array.of_host(data, name, self.check))

    def free(self, array: Array) -> None:
        """Make an array unknown, so that kernels that still use it are found out."""
        self._arrays.remove(array)
        self._regions = None

    def _keep(self, array: Array) -> Array:
        self._arrays.append(array)
        self._regions = None
        return array

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: bytes | np.ndarray | np.void,
        shared: int = 0,
        order_seed: int | None = None,
    ) -> None:
        """Run all blocks of a kernel. `args`: its struct; `shared`: bytes of dynamic memory.

        `order_seed`: run blocks, and the threads of each, in the order of that seed instead of
        in their own. SimError.
        """
        if kernel not in self._kernels:
            raise SimError("launch", f"there is no kernel {kernel}")
        library, number, args_size, threads = self._kernels[kernel]
        grid3, block3 = _three(grid), _three(block)
        data = args if isinstance(args, bytes) else args.tobytes()
        n = block3[0] * block3[1] * block3[2]
        for wrong, what in (
            (len(data) != args_size, f"takes {args_size} bytes of arguments, not {len(data)}"),
            (min(*grid3, *block3) < 1, f"has an empty grid {grid} or block {block}"),
            (max(grid3[1:]) > 65535, f"has a grid {grid} beyond 65535 in y or z"),
            (n > threads, f"is for {threads} threads at most, not {n}"),
            (
                shared and library.static_shared + shared > 48 << 10,
                f"has {library.static_shared} + {shared} bytes of shared memory, more than 48 KiB",
            ),
        ):
            if wrong:
                raise SimError("launch", f"{kernel} {what}")
        fault = _Fault()
        with _lock:
            if self.check and self._regions is None:
                rows = sorted(a._region() for a in self._arrays if a.nbytes)
                self._regions = (_Region * len(rows))(*rows)
            failed = library.code.cusim_launch(
                number, (ctypes.c_uint * 3)(*grid3), (ctypes.c_uint * 3)(*block3), data, shared,
                0 if order_seed is None else order_seed + 1, self.time_limit, self._regions,
                len(self._regions) if self.check else 0, ctypes.byref(_clock), ctypes.byref(fault),
            )  # fmt: skip
        if failed == 2:
            raise MemoryError("no memory for the simulator's stacks")
        if failed:
            raise self._error(kernel, library, fault, grid3, block3)

    def _error(
        self, kernel: str, library: _Library, f: _Fault, grid: Sequence[int], block: Sequence[int]
    ) -> SimError:
        def who(block_number: int, thread: int) -> str:
            return f"block {_index(block_number, grid)}, thread {_index(thread, block)}"

        kind = KINDS[f.kind]
        where = f"{kernel}, {who(f.block, f.thread)}"
        text = f.text.decode(errors="replace")
        if kind == "divergence":
            line = f", line {f.line}" if f.line else ""  # none, if it has just left
            return SimError(kind, f"{where}{line}: {text}")
        if kind == "endless":
            last = f", and last waited in line {f.line}" if f.line else ""
            return SimError(kind, f"{where} still runs after {self.time_limit:g} s{last}")
        memory = library.shared(f.address) or self._memory(f.address)
        if not f.place:  # by a signal
            what = "divides by 0" if kind == "arithmetic" else f"crashes at {memory}"
            return SimError(kind, f"{where} {what}; check mode says where")
        where += f", {library.place(f.place, f.line)}"
        if text:
            return SimError(kind, f"{where}: {text}")
        doing = ("reads", "writes", "atomically changes")
        if kind == "misaligned":
            return SimError(
                kind, f"{where} {doing[f.write]} {memory}, no multiple of {f.size} bytes"
            )
        message = f"{where} {doing[f.write]} {f.size} bytes at {memory}"
        if kind == "early":
            message += " before it has waited for the kernels before it"
        if kind == "race":
            other = who(f.other_block, f.other_thread)
            message += (
                f", which {other}, {library.place(f.other_place)}, "
                f"{doing[f.other_write]} with nothing that says who is first"
            )
        return SimError(kind, message)

    def _memory(self, address: int) -> str:
        arrays = sorted(self._arrays, key=lambda a: a.address)
        i = bisect_right([a.address for a in arrays], address) - 1
        near = arrays[max(i, 0) : i + 2]
        if not near or not address:
            return f"address {address:#x}"

        def outside(a: Array) -> int:
            return max(a.address - address, address - (a.address + a.nbytes) + 1, 0)

        a = min(near, key=outside)
        if outside(a) > 1 << 30:
            return f"address {address:#x}"
        offset = address - a.address
        return f"{a.name} {'+' if offset >= 0 else '-'} {abs(offset)} (of {a.nbytes} bytes)"


def _three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    x, y, z = (*(int(s) for s in sizes), 1, 1, 1)[:3]
    return x, y, z


def _index(number: int, sizes: Sequence[int]) -> str:
    x, y, z = number % sizes[0], number // sizes[0] % sizes[1], number // sizes[0] // sizes[1]
    return f"({x}, {y}, {z})" if sizes[2] > 1 else f"({x}, {y})" if sizes[1] > 1 else str(x)


def unavailable() -> str:
    """Return why the simulator cannot work here, "" if it can."""
    if ON_GPU:
        from . import real

        return real.unavailable()
    if platform.system() != "Linux":
        return "the kernel simulator needs Linux"
    if shutil.which("g++") is None or shutil.which("addr2line") is None:
        return "the kernel simulator needs g++ and binutils"
    return ""


def load(
    *sources: str | Path,
    check: bool = False,
    replace: Mapping[str, str] | None = None,
    define: Sequence[str] = (),
    optimize: Sequence[str] = (),
) -> Simulator:
    """Compile .cu files (relative to runtime/cuda, or absolute) and return what runs them.

    `replace` plants faults: each of its texts must be in one place, of one of the files or of the
    .cuh files beside them, and becomes the other. `define`: macros ("X" or "X=1"). SimError of
    kind "source" if that cannot be compiled. With CUSIM=gpu in the environment: real.py.
    """
    if ON_GPU:
        import pytest

        from . import real

        if check or replace or define or optimize:
            pytest.skip("needs the simulator")
        return real.RealGPU()
    if why := unavailable():
        raise SimError("source", why)
    paths = [KERNELS / source for source in sources]
    texts: dict[Path, str] = {}
    for path in paths:
        for file in (path, *sorted(path.parent.glob("*.cuh"))):
            texts[file] = file.read_text("utf-8")
    for old, new in (replace or {}).items():
        places = [file for file, text in texts.items() if old in text]
        count = sum(texts[file].count(old) for file in places)
        if count != 1:
            raise SimError("source", f"{old!r} is in {count} places, not in one")
        texts[places[0]] = texts[places[0]].replace(old, new)
    overlaps = int(any("after_predecessors" in text for text in texts.values()))
    flags = [
        *_COMMON,
        f"-DCUSIM_OVERLAPS={overlaps}",
        *(_CHECK if check else _FAST),
        *optimize,
        *(f"-D{d}" for d in define),
    ]
    libraries = []
    for path in paths:
        own = {f.name: t for f, t in texts.items() if f == path or f.suffix == ".cuh"}
        libraries.append(_library(_compiled(path.name, own, flags)))
    return Simulator(libraries, check)


@functools.cache
def _library(path: Path) -> _Library:
    return _Library(path)


@functools.cache
def _machine() -> str:
    """Return what compiled code depends on: compiler and processor."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return version.stdout + line
    return version.stdout + platform.processor()


def _compiled(name: str, texts: Mapping[str, str], flags: Sequence[str]) -> Path:
    headers = [(HERE / header).read_text("utf-8") for header in HEADERS]
    parts = [name, *(part for item in sorted(texts.items()) for part in item), *flags, *headers]
    digest = hashlib.sha256("\0".join([*parts, _machine()]).encode()).hexdigest()[:20]
    folder = cache_dir() / "cusim"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{Path(name).stem}-{digest}.so"
    with _locked(target.with_suffix(".lock")):
        if target.exists():
            os.utime(target)
        else:
            _compile(target, name, texts, flags)
            _prune(folder)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let only one process at a time do what is in the block."""
    import fcntl  # not on Windows

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prune(folder: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 86400
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _compile(target: Path, name: str, texts: Mapping[str, str], flags: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for file, text in texts.items():
            (folder / file).write_text(text, "utf-8")
        # Kernels may be made by macros: they are looked for in what the preprocessor leaves.
        defines = [flag for flag in flags if flag.startswith("-D")]
        plain = _gcc(["-E", "-P", *defines, "-x", "c++", name], folder)
        kernels = [(k[2], k[3], k[1]) for k in _KERNEL.finditer(plain)]
        dynamic = dict.fromkeys((d[1].strip(), d[2]) for d in _DYNAMIC.finditer(plain))
        if not kernels:
            raise SimError("source", f"{name} has no kernel that this understands")
        if len(dynamic) > 1:
            raise SimError(
                "source", f"{name} gives dynamic shared memory more than one name or type"
            )
        unit = folder / "unit.cc"
        unit.write_text(_unit(name, kernels, list(dynamic)), "utf-8")
        made_file = folder / "unit.so"
        _gcc([*flags, "-I", str(HERE), "-c", "unit.cc"], folder)
        # Without the flags: the runtime libraries of the sanitizers are not wanted.
        _gcc(["-shared", "-Wl,-z,defs", "unit.o", "-o", str(made_file), "-lm"], folder)
        moved = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(made_file, moved)
        os.replace(moved, target)


def _gcc(arguments: Sequence[str], folder: Path) -> str:
    done = subprocess.run(
        ["g++", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SimError("source", done.stderr)
    return done.stdout


def _unit(
    name: str, kernels: Sequence[tuple[str, str, str]], dynamic: Sequence[tuple[str, str]]
) -> str:
    """Return what is compiled: a .cu file between the headers, and a table of its kernels."""
    lines = ['#include "cusim.h"', f'#include "{name}"']
    for type_, array in dynamic:
        lines += [
            f"alignas(128) thread_local {type_} {array}[(48 << 10) / sizeof({type_})];",
            f"CUSIM_SLOW char* cusim_dynamic() {{ return reinterpret_cast<char*>({array}); }}",
        ]
    if not dynamic:
        lines.append("CUSIM_SLOW char* cusim_dynamic() { return nullptr; }")
    for kernel, struct, _ in kernels:
        lines.append(
            f"CUSIM_SLOW void cusim_run_{kernel}(const void* args) "
            f"{{ {kernel}(*static_cast<const {struct}*>(args)); }}"
        )
    rows = [
        f'    {{"{kernel}", cusim_run_{kernel}, sizeof({struct}), cusim::launch_bounds({bounds})}},'
        for kernel, struct, bounds in kernels
    ]
    return "\n".join(
        [
            *lines,
            "static const cusim::Entry cusim_kernels[] = {",
            *rows,
            "};",
            '#include "launch.h"',
            "",
        ]
    )
