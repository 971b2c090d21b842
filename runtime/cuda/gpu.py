"""A real GPU behind the Device protocol, by CuPy's bindings of the CUDA runtime and driver.

Only CuPy's thinnest layer is used, functions that take integers: no memory pool, no current
stream, nothing that allocates behind a captured graph. What it lacks comes from the driver.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
from cupy.cuda import driver, runtime

from ..formats import U8Array
from . import arguments, compiler, detect
from .device import TIMEOUT_S, DeviceError, Event, Graph, Stream, wait_until

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="_Part")

_OUT_OF_MEMORY, _NOT_READY = 2, 600
# A kernel's own faults: illegal address or instruction, misalignment, assertion, time-out, ...
# After one of these the process has no more use of the device.
_KERNEL_FAULTS = {700, 702, 710, 714, 715, 716, 717, 718, 719}
_CLOSING_S = 5.0  # to finish what is still queued
_PLAIN_SHARED = 48 << 10  # bytes of shared memory that a kernel gets without being asked for
# Compute capability from which a kernel may begin before its predecessor ends, and the CUDA of the
# driver from which graphs keep to that.
_OVERLAPPING, _OVERLAPPING_GRAPHS = (9, 0), 12030


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the driver, of those whose value is an int."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = (
        *((f"{of}_{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: common.cuh, after_predecessors().
_MAY_OVERLAP = _Attribute(id=6, value=1)


class _Part:
    """What belongs to a GPU."""

    gpu: GPU

    def _owns(self, release: Callable[[int], Any], handle: int) -> int:
        """Return a handle, to be released with this object.

        Not at the end of the program, which frees all and must not wait for a stuck device.
        """
        weakref.finalize(self, _dead.append, (self.gpu.lost, release, handle)).atexit = False
        return handle


# Work of a device may wait for the host (ahead.py). Whoever allocates or frees memory, loads code
# or unloads it, waits for all work inside of the driver: for ever, if in the thread that is to
# answer; and from another one it may keep that thread out of the driver. So both sides hold this
# lock, and what the garbage collector finds, in whatever thread, is given back only under it.
_QUIET = threading.RLock()
_dead: collections.deque[tuple[list[str], Callable[[int], Any], int]] = collections.deque()
_MANY_DEAD = 1000  # events, mostly


def _give_back() -> None:
    """Release what nobody uses any more; with the lock held."""
    while _dead:
        lost, release, handle = _dead.popleft()
        if not lost:  # else it might wait for ever
            with suppress(runtime.CUDARuntimeError, driver.CUDADriverError):
                release(handle)


def _abandon(lost: list[str], allocated: set[int]) -> None:
    _dead.extend((lost, runtime.free, address) for address in allocated)


def _checked(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Make a method work on our device in any thread, and say its errors in a sentence."""

    @functools.wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        gpu = self.gpu
        if gpu.lost:
            raise DeviceError(gpu.lost[0])
        try:
            runtime.setDevice(gpu.number)
            return method(self, *args, **kwargs)
        except (runtime.CUDARuntimeError, driver.CUDADriverError) as error:
            if error.status == _OUT_OF_MEMORY:
                raise DeviceError(f"{gpu.name} is out of memory") from error
            if error.status in _KERNEL_FAULTS:
                gpu.lost.append(f"a kernel failed on {gpu.name}, start the program again: {error}")
                raise DeviceError(gpu.lost[0]) from error
            raise DeviceError(f"{gpu.name} fails: {error}") from error

    return call


class GPU(_Part):
    """GPU `number`, the kernels of a folder loaded; `notify` is told what takes seconds.

    DeviceError if it cannot be used.
    """

    def __init__(
        self,
        number: int = 0,
        notify: Callable[[str], Any] = lambda text: None,
        folder: Path = arguments.FOLDER,
    ) -> None:
        self.gpu, self.number, self.name = self, number, f"GPU {number}"
        self.lost: list[str] = []  # why it cannot be used any more, if so
        self._streams: weakref.WeakSet[GPUStream] = weakref.WeakSet()
        self._allocated: set[int] = set()
        # An engine that is dropped, not closed, gives its memory back, too.
        weakref.finalize(self, _abandon, self.lost, self._allocated).atexit = False
        self._functions: dict[str, int] = {}
        self._shared: dict[str, int] = {}  # bytes asked for, of kernels that take much
        self._kernels = arguments.kernels(folder)
        self._open(notify, folder)

    @_checked
    def _open(self, notify: Callable[[str], Any], folder: Path) -> None:
        properties = runtime.getDeviceProperties(self.number)
        self.name = properties["name"].decode()
        self.memory_total = int(properties["totalGlobalMem"])
        capability = int(properties["major"]), int(properties["minor"])
        cuda = runtime.driverGetVersion()
        self.overlaps = capability >= _OVERLAPPING and cuda >= _OVERLAPPING_GRAPHS
        cubins = compiler.compile_all(capability, notify, cuda // 1000, folder)
        with _QUIET:
            _give_back()
            self._modules = {
                source: self._owns(driver.moduleUnload, driver.moduleLoadData(cubin))
                for source, cubin in cubins.items()
            }
        self._library = ctypes.CDLL(detect.LIBRARY)
        # Where launches wait for what they launch, the host would wait for an answer of its own.
        self.has_wait_value = os.environ.get("CUDA_LAUNCH_BLOCKING", "0") == "0"

    def call(self, name: str, *args: Any) -> None:
        """Call a function of the driver that CuPy lacks."""
        driver.check_status(getattr(self._library, name)(*args))

    @_checked
    def memory_free(self) -> int:
        with _QUIET:
            _give_back()
        return int(runtime.memGetInfo()[0])

    @_checked
    def allocate(self, nbytes: int) -> int:
        try:
            with _QUIET:
                address = int(runtime.malloc(nbytes))
        except runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            wanted, free = nbytes / 2**30, self.memory_free() / 2**30
            text = f"{self.name} has no room for {wanted:.2f} GiB; {free:.2f} GiB are free"
            raise DeviceError(text) from error
        self._allocated.add(address)
        return address

    @_checked
    def free(self, address: int) -> None:
        self._allocated.remove(address)
        with _QUIET:
            runtime.free(address)

    @_checked
    def pinned(self, nbytes: int) -> tuple[U8Array, int]:
        with _QUIET:
            _give_back()
            array = np.asarray(_Pinned(self, nbytes))
        array[:] = 0
        host, address = ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64()
        self.call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), host, ctypes.c_uint(0))
        return array, address.value

    @_checked
    def stream(self) -> GPUStream:
        stream = GPUStream(self)
        self._streams.add(stream)
        return stream

    def function(self, kernel: str, args: np.ndarray, shared: int) -> int:
        """Return the handle of a kernel that takes these arguments and so much shared memory."""
        known = self._kernels[kernel]
        if kernel not in self._functions:
            handle = driver.moduleGetFunction(self._modules[known.source], kernel)
            self._functions[kernel] = handle
        handle = self._functions[kernel]
        if args.dtype != known.arguments or args.shape != (1,):
            raise TypeError(f"{kernel} takes one {known.struct}, as arguments.fill makes it")
        if shared > self._shared.get(kernel, _PLAIN_SHARED):
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(handle, attribute, shared)
            self._shared[kernel] = shared
        return handle

    def exclusive(self) -> AbstractContextManager[Any]:
        return _QUIET

    def close(self) -> None:
        try:
            for stream in list(self._streams):
                stream.synchronize(_CLOSING_S)
            for address in list(self._allocated):
                self.free(address)
            with _QUIET:
                _give_back()
        except DeviceError:  # to free would wait for ever
            return


class _Pinned(_Part):
    """Host memory that the device sees, for np.asarray, which keeps this object alive."""

    def __init__(self, gpu: GPU, nbytes: int) -> None:
        self.gpu = gpu
        flags = runtime.hostAllocPortable | runtime.hostAllocMapped
        address = self._owns(runtime.freeHost, runtime.hostAlloc(nbytes, flags))
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (address, False),
        }


def _is_done(status: int) -> bool:
    """Return what CuPy's query functions, which raise nothing, have returned."""
    if status not in (0, _NOT_READY):
        runtime.check_status(status)
    return status == 0


class GPUEvent(_Part):
    """An event of CUDA, without a time."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        flags = runtime.eventDisableTiming
        self.handle = self._owns(runtime.eventDestroy, runtime.eventCreateWithFlags(flags))

    @_checked
    def is_done(self) -> bool:
        return _is_done(runtime.eventQuery(self.handle))


class GPUGraph(_Part):
    """A graph of CUDA, instantiated when its capture ends."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu, self.handle = gpu, 0

    def finish(self, captured: int, stream: int) -> None:
        """Make it of what was captured, and ready to run."""
        with _QUIET:
            try:
                handle = runtime.graphInstantiate(captured)
            finally:
                runtime.graphDestroy(captured)
            self.handle = self._owns(runtime.graphExecDestroy, handle)
            runtime.graphUpload(self.handle, stream)

    @_checked
    def launch(self, stream: Stream) -> None:
        runtime.graphLaunch(self.handle, cast(GPUStream, stream).handle)


class GPUStream(_Part):
    """A stream of CUDA that does not wait for the default stream."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        flags = runtime.streamNonBlocking
        self.handle = self._owns(runtime.streamDestroy, runtime.streamCreateWithFlags(flags))
        self._parameter = ctypes.c_void_p()  # what points at the one argument of a launch
        self._config = _Config(
            block_y=1,
            block_z=1,
            stream=self.handle,
            attributes=ctypes.pointer(_MAY_OVERLAP),
            n_attributes=int(gpu.overlaps),
        )

    @_checked
    def copy(self, dst: int, src: int, nbytes: int) -> None:
        runtime.memcpyAsync(dst, src, nbytes, runtime.memcpyDefault, self.handle)

    @_checked
    def memset(self, dst: int, byte: int, nbytes: int) -> None:
        runtime.memsetAsync(dst, byte, nbytes, self.handle)

    @_checked
    def launch(
        self, kernel: str, grid: tuple[int, ...], block: int, args: np.ndarray, shared: int = 0
    ) -> None:
        function, config = self.gpu.function(kernel, args, shared), self._config
        config.grid_x, config.grid_y, config.grid_z = (*grid, 1, 1)[:3]
        config.block_x, config.shared = block, shared
        self._parameter.value = args.ctypes.data  # the driver reads the struct during the call
        at = ctypes.byref
        handle = ctypes.c_void_p(function)
        self.gpu.call("cuLaunchKernelEx", at(config), handle, at(self._parameter), None)

    @_checked
    def record(self) -> Event:
        event = GPUEvent(self.gpu)
        runtime.eventRecord(event.handle, self.handle)
        return event

    @_checked
    def wait(self, event: Event) -> None:
        runtime.streamWaitEvent(self.handle, cast(GPUEvent, event).handle)

    def write_value(self, address: int, base: int, number: int) -> None:
        self._word("write_word", address, base, number)

    def wait_value(self, address: int, base: int, number: int) -> None:
        self._word("wait_word", address, base, number)

    def _word(self, kernel: str, address: int, base: int, number: int) -> None:
        # Kernels, since what the driver has for this cannot be captured everywhere.
        args = arguments.fill(kernel, word=address, base=base, number=number)
        self.launch(kernel, (1,), 32, args)

    @_checked
    def is_done(self) -> bool:
        return _is_done(runtime.streamQuery(self.handle))

    def synchronize(self, timeout_s: float = TIMEOUT_S) -> None:
        try:
            wait_until(self.is_done, timeout_s, self.gpu.name)
        except DeviceError as error:
            self.gpu.lost.append(str(error))
            raise
        if len(_dead) > _MANY_DEAD and _QUIET.acquire(blocking=False):
            try:
                _give_back()
            finally:
                _QUIET.release()

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        graph = GPUGraph(self.gpu)
        self._begin_capture()
        try:
            yield graph
        except BaseException:
            with suppress(DeviceError):  # it may have ended because of the same error
                self._drop_capture()
            raise
        self._end_capture(graph)

    @_checked
    def _begin_capture(self) -> None:
        # Relaxed: other threads, and the garbage collector, may free things meanwhile.
        runtime.streamBeginCapture(self.handle, runtime.streamCaptureModeRelaxed)

    @_checked
    def _drop_capture(self) -> None:
        captured = runtime.streamEndCapture(self.handle)
        if captured:
            runtime.graphDestroy(captured)

    @_checked
    def _end_capture(self, graph: GPUGraph) -> None:
        graph.finish(runtime.streamEndCapture(self.handle), self.handle)
