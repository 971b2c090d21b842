"""Is there a GPU that we can use, and if not, why: asked of the driver, before CuPy is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
LEAST = (7, 5)  # compute capability that the kernels are compiled and tested for
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class FoundGPU:
    """A GPU as the driver describes it; `number` is what --gpu takes."""

    number: int
    name: str
    memory: int  # bytes, in all
    capability: tuple[int, int]  # compute capability


@dataclass(frozen=True)
class Found:
    """What is there. `reason`: one sentence, why no GPU can be used; "" if one can."""

    gpus: tuple[FoundGPU, ...] = ()  # those that the kernels run on
    driver: tuple[int, int] = (0, 0)  # the newest CUDA that the driver knows
    reason: str = ""


def find(library: str = LIBRARY) -> Found:
    """Look for GPUs. Never raises, prints nothing; without a GPU it takes less than 1 ms."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return Found(reason=f"no GPU: {library} is not on this machine")
    try:
        return _look(driver)
    except _DriverError as error:
        return Found(reason=f"no GPU: {error}")
    except Exception as error:  # a driver that lacks a function; packages that are half there
        return Found(reason=f"no GPU: looking for one failed ({type(error).__name__}: {error})")


class _DriverError(Exception):
    pass


def _look(driver: ctypes.CDLL) -> Found:
    def call(name: str, *args: Any) -> None:
        code = getattr(driver, name)(*args)
        if code == _NO_DEVICE:
            raise _DriverError("the driver finds none")
        if code:
            text = ctypes.c_char_p()
            driver.cuGetErrorName(code, ctypes.byref(text))
            raise _DriverError(f"{name} gives {(text.value or b'error').decode()} ({code})")

    call("cuInit", 0)
    cuda = _number(call, "cuDriverGetVersion")
    known = (cuda // 1000, cuda % 1000 // 10)
    every = tuple(_gpus(call))
    gpus = tuple(gpu for gpu in every if gpu.capability >= LEAST)
    if not every:
        return Found((), known, "no GPU: the driver finds none")
    if not gpus:
        best = max(every, key=lambda gpu: gpu.capability)
        return Found((), known, f"{best.name} is too old: {_needs(best.capability, LEAST)}")
    return Found(gpus, known, _missing(known))


def _number(call: Callable[..., None], name: str, *args: int) -> int:
    value = ctypes.c_int()
    call(name, ctypes.byref(value), *args)
    return value.value


def _gpus(call: Callable[..., None]) -> Iterator[FoundGPU]:
    for i in range(_number(call, "cuDeviceGetCount")):
        device = _number(call, "cuDeviceGet", i)
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        call("cuDeviceGetName", name, len(name), device)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        major, minor = (_number(call, "cuDeviceGetAttribute", a, device) for a in (_MAJOR, _MINOR))
        yield FoundGPU(i, name.value.decode("utf-8", "replace"), memory.value, (major, minor))


def _needs(has: tuple[int, int], least: tuple[int, int]) -> str:
    return "it has compute capability {}.{}, and {}.{} is needed".format(*has, *least)


def _missing(driver: tuple[int, int]) -> str:
    """Return what keeps a GPU from being used, given the CUDA that its driver knows."""
    from . import compiler  # not needed where there is no GPU

    if driver < (12, 0):
        text = "the GPU's driver is too old: it knows CUDA {}.{}, and 12 or newer is needed"
        return text.format(*driver)
    major = min(driver[0], compiler.NEWEST)
    hint = f"pip install 'powerinfer-python[cuda{major}]'"
    if importlib.util.find_spec("cupy") is None:
        return f"a GPU is there, but CuPy is not installed: {hint}"
    made_for = _cupy_majors()
    if made_for and min(made_for) > driver[0]:
        text = (
            "CuPy is for CUDA {}, and the GPU's driver knows only {}.{}: update the driver, or {}"
        )
        return text.format(min(made_for), *driver, hint)
    if not compiler.find_library(driver[0]):
        return f"a GPU is there, but NVRTC is not installed: {hint}"
    return ""


def _cupy_majors() -> list[int]:
    """Return the versions of CUDA that installed packages cupy-cudaNNx are for."""
    found = []
    for major in range(11, 20):
        with suppress(PackageNotFoundError):
            version(f"cupy-cuda{major}x")
            found.append(major)
    return found
