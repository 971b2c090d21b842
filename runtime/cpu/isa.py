"""Which instructions the kernels use: one path for the whole process, chosen before they are made.

From the CPU's features, never its name: a kernel that needs a missing feature aborts the process
inside LLVM.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

import llvmlite.binding
from numba.core import config

from ..errors import RequestError

_NEEDS = {
    "amx": ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "amx-tile", "amx-int8"),
    "avx512vnni": ("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}
# What LLVM may use when a lesser path is forced: no more than such a CPU has.
_CPU_NAMES = {"avx2": "haswell", "generic": "generic"}


def available() -> list[str]:
    """Return the paths that this CPU can run, best first."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return ["generic"]  # the user told numba to target something else; or numba knows better
    has = llvmlite.binding.get_host_cpu_features()
    names = [name for name, needs in _NEEDS.items() if all(has.get(f) for f in needs)]
    return [name for name in names if name != "amx" or _may_use_tiles()]


def features() -> tuple[list[str], list[str]]:
    """Return which of the features that kernels can use this CPU has, and which it lacks."""
    host = llvmlite.binding.get_host_cpu_features()
    names = dict.fromkeys(f for name in reversed(_NEEDS) for f in _NEEDS[name])
    return [f for f in names if host.get(f)], [f for f in names if not host.get(f)]


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux for AMX's tile registers: threads have no room for them before.

    Source: Documentation/arch/x86/xstate.rst (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
    """
    if sys.platform != "linux":
        return False
    try:
        return int(ctypes.CDLL(None).syscall(158, 0x1023, 18)) == 0
    except (OSError, AttributeError):
        return False


def _set(name: str) -> None:
    global ISA, HAS_AMX, HAS_VNNI, Q8_BIAS, HAS_HALF
    ISA, HAS_AMX, HAS_VNNI = name, name == "amx", name in ("amx", "avx512vnni")
    # vpdpbusd multiplies unsigned by signed bytes: signed weights are shifted by 128 there, and
    # the accumulator starts at -128 * sum(x). The other paths multiply signed bytes as they are.
    Q8_BIAS = 128 if HAS_VNNI else 0
    # Without instructions for it LLVM would call a helper that the process does not have.
    HAS_HALF = name != "generic" or platform.machine().lower() in ("arm64", "aarch64")


ISA, HAS_AMX, HAS_VNNI, Q8_BIAS, HAS_HALF = "", False, False, 0, False
_set(available()[0])


def use(name: str) -> None:
    """Force a path ("auto": the best). RequestError if this CPU or this process cannot."""
    if name in ("auto", ISA):
        return
    if name not in available():
        raise RequestError(f"this CPU cannot run {name}; it can run {', '.join(available())}")
    if f"{__package__}.simd" in sys.modules:
        raise RequestError(f"this process has made kernels for {ISA} already, not for {name}")
    if name in _CPU_NAMES:
        config.CPU_NAME, config.CPU_FEATURES = _CPU_NAMES[name], ""
    _set(name)


def physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        try:
            path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            with open(path, encoding="ascii") as file:
                cores.add(file.read().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
