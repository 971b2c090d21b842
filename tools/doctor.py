"""What this machine can do, and what is wrong with it, as far as this program is concerned."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..runtime.errors import RequestError

EXTRAS = {
    "bpe": ("tokenizers", "byte-level BPE tokenizers"),
    "train": ("torch", "training predictors"),
    "plot": ("matplotlib", "pictures"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `problem` is empty where all is well."""

    name: str
    value: str
    problem: str = ""


def examine(bandwidth: bool = True) -> list[Finding]:
    """Look at everything; `bandwidth`: also read memory for a second or two."""
    from ..runtime.cpu import isa

    found = [
        Finding("system", f"{platform.system()} {platform.machine()}, Python {_python()}"),
        Finding("packages", ", ".join(f"{p} {_version(p)}" for p in ("numpy", "numba", "gguf"))),
    ]
    paths = isa.available()
    slow = paths[0] == "generic" and platform.machine().lower() in ("x86_64", "amd64")
    reason = "no AVX2 here, or numba is told not to use it (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, "
    reason += "NUMBA_ENABLE_AVX): kernels will be slow"
    found.append(
        Finding("kernels", f"{isa.ISA} (can run: {', '.join(paths)})", reason if slow else "")
    )
    has, lacks = isa.features()
    found.append(Finding("CPU", f"{', '.join(has) or 'none'}; not {', '.join(lacks) or 'any'}"))
    cores, cpus = isa.physical_cores(), os.cpu_count() or 1
    found.append(Finding("cores", f"{cores} used by default, {cpus} logical", _load(cores)))
    found.append(_memory())
    found += _kernels(bandwidth, cores)
    found.append(_gpu())
    for extra, (package, what) in EXTRAS.items():
        is_there = importlib.util.find_spec(package) is not None
        hint = f'not installed: pip install "powerinfer-python[{extra}]"'
        found.append(
            Finding(f"extra {extra}", f"{what}: {_version(package) if is_there else hint}")
        )
    return found


def _gpu() -> Finding:
    from ..runtime.cuda import detect

    found = detect.find()
    names = [f"{gpu.number}: {gpu.name}, {gpu.memory / 2**30:.1f} GiB" for gpu in found.gpus]
    if not names:
        return Finding("GPU", found.reason)
    return Finding("GPU", "; ".join(names), found.reason)


def _python() -> str:
    return platform.python_version()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _load(cores: int) -> str:
    """Return a sentence if others keep the cores busy; "" where that is not known."""
    if not hasattr(os, "getloadavg"):
        return ""
    load = os.getloadavg()[0]
    if load < 0.5 * cores:
        return ""
    return f"other programs keep {load:.1f} of {cores} cores busy: decoding will be slower"


def _memory() -> Finding:
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except OSError:  # not Linux
        return Finding("memory", "not known on this system")
    sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in text.splitlines()}
    free, total = sizes["MemAvailable"], sizes["MemTotal"]
    problem = "little memory is free: large models will be read from disk" if free < 2 else ""
    return Finding("memory", f"{free:.1f} GiB free of {total:.1f}", problem)


def _kernels(bandwidth: bool, cores: int) -> list[Finding]:
    """Look at what needs kernels."""
    try:
        from ..runtime.cpu.jit import cached_kernels, kernel_cache
    except RequestError as error:  # numba is told not to compile
        return [Finding("kernel cache", "not used", str(error))]
    found = [_cache(kernel_cache(), cached_kernels())]
    if bandwidth:
        found.append(_bandwidth(cores))
    return found


def _cache(folder: Path, n_kernels: int) -> Finding:
    if folder.is_dir():
        files = [f for f in folder.rglob("*") if f.is_file()]
        size = sum(f.stat().st_size for f in files) / 2**20
        state = f"{folder}: {n_kernels} kernels, {size:.1f} MiB"
    else:
        state = f"{folder}: empty, the first run compiles kernels"
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    problem = ""
    if not os.access(parent, os.W_OK):
        problem = f"{parent} cannot be written: kernels are compiled at every start"
    elif shutil.disk_usage(parent).free < 100 << 20:
        problem = f"less than 100 MiB are free for {parent}"
    return Finding("kernel cache", state, problem)


def _bandwidth(cores: int) -> Finding:
    from ..runtime.cpu.bandwidth import Reader

    reader = Reader()
    rates = {threads: reader.measure(threads) / 1e9 for threads in sorted({1, cores})}
    shown = ", ".join(f"{rate:.1f} GB/s with {n} threads" for n, rate in rates.items())
    problem = ""
    if cores > 1 and rates[cores] < 1.1 * rates[1]:
        problem = "more threads read no faster than one: are the cores really there?"
    return Finding("memory read", shown, problem)


def as_text(found: list[Finding]) -> str:
    """Return the findings for people, problems under the lines that they are about."""
    lines = []
    for f in found:
        lines.append(f"{f.name:<14} {f.value}")
        if f.problem:
            lines.append(f"{'':<14} ! {f.problem}")
    problems = sum(bool(f.problem) for f in found)
    lines.append("all is well" if not problems else f"{problems} to look at (!)")
    return "\n".join(lines)


def as_json(found: list[Finding]) -> list[dict[str, Any]]:
    """Return the findings, ready for JSON."""
    return [vars(f) for f in found]
