"""Which instructions the kernels use: one path, chosen when this module is imported.

From the CPU's features, never its name: a kernel that needs a missing feature aborts the process
inside LLVM.
"""

from __future__ import annotations

import platform

import llvmlite.binding
from numba.core import config


def _choose_isa() -> str:
    if config.CPU_NAME or config.CPU_FEATURES:  # the user told numba to target something else
        return "generic"
    has = llvmlite.binding.get_host_cpu_features()
    if all(has.get(f) for f in ("avx512f", "avx512bw", "avx512vl", "avx512vnni")):
        return "avx512vnni"
    if all(has.get(f) for f in ("avx2", "fma", "f16c")):
        return "avx2"
    return "generic"


ISA = _choose_isa()
# vpdpbusd multiplies unsigned by signed bytes: signed weights are shifted by 128 there, and the
# accumulator starts at -128 * sum(x). The other paths multiply signed bytes as they are.
Q8_BIAS = 128 if ISA == "avx512vnni" else 0

# Without instructions for it LLVM would call a helper that the process does not have.
HAS_HALF = ISA != "generic" or platform.machine().lower() in ("arm64", "aarch64")
