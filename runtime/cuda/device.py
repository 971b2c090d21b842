"""The seam between the CUDA backend and a machine: memory, streams, events, graphs.

`gpu.GPU` is a real one; the tests have one that runs kernels on the CPU, late and in any order
that the streams allow. Addresses are plain integers, in one address space with the host's (UVA),
and nothing here knows what lies at them. Every method raises DeviceError when the device fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ..errors import PowerInferError
from ..formats import U8Array

ALIGNMENT = 256  # bytes, of everything in a slab
STAGING = 16 << 20  # bytes of one of the two staging buffers
TIMEOUT_S = 60.0  # longer than anything that one wait is for


class DeviceError(PowerInferError):
    """The device failed, is lost, or does not answer; or has no memory for what was asked."""


class Event(Protocol):
    """A point in the work of a stream."""

    def is_done(self) -> bool:
        """Return whether the work before it is done."""


class Graph(Protocol):
    """Captured work, to be repeated with the arguments that it was captured with."""

    def launch(self, stream: Stream) -> None:
        """Queue all of it on a stream."""


class Stream(Protocol):
    """Work for the device, done in order; queueing returns at once.

    Whatever addresses it was given must stay valid until it is done.
    """

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """Copy bytes between addresses of the device or of pinned host memory."""

    def memset(self, dst: int, byte: int, nbytes: int) -> None:
        """Set bytes of the device."""

    def launch(
        self, kernel: str, grid: tuple[int, ...], block: int, args: np.ndarray, shared: int = 0
    ) -> None:
        """Run a kernel. `grid`: one to three sizes, each at least 1; `block`: threads.

        `args`: the kernel's struct, as arguments.fill makes it; it is copied here and now.
        `shared`: bytes of dynamic shared memory.
        """

    def record(self) -> Event:
        """Return an event after all work queued so far."""

    def wait(self, event: Event) -> None:
        """Let later work of this stream start only after an event, of any stream."""

    def write_value(self, address: int, base: int, number: int) -> None:
        """Write a 32-bit word, after the work before it and visibly so. Needs has_wait_value.

        The word at `address` becomes the one at `base` plus `number`. Both are pinned memory.
        """

    def wait_value(self, address: int, base: int, number: int) -> None:
        """Let later work start only when a 32-bit word is written. Needs has_wait_value.

        That is when the word at `address` is >= the one at `base` plus `number`; the comparison is
        cyclic, int32(difference) >= 0, so that counters may wrap. Nothing on the device ends this
        wait but the word: whoever queues it must be sure to write.
        """

    def is_done(self) -> bool:
        """Return whether all work queued so far is done."""

    def synchronize(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until all work queued so far is done.

        DeviceError after `timeout_s`: the device is given up then, and later calls raise too.
        """

    def capture(self) -> AbstractContextManager[Graph]:
        """Capture, instead of queueing, what is queued in the block; the graph is whole after it.

        Other streams take part if they wait for an event of this one, and this one for theirs.
        Nothing is allocated or synchronized in it; an event that was recorded in it is for `wait`
        only.
        """


class Device(Protocol):
    """One GPU, or what stands for one."""

    name: str
    memory_total: int  # bytes
    has_wait_value: bool  # whether work can be queued behind a wait for the host

    def memory_free(self) -> int:
        """Return how many bytes could be allocated now, by anybody."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of new device memory, aligned to ALIGNMENT, its content unknown."""

    def free(self, address: int) -> None:
        """Give back what `allocate` returned."""

    def pinned(self, nbytes: int) -> tuple[U8Array, int]:
        """Return host memory that the device reads and writes too, zeroed, and its device address.

        It lives as long as the array or a view of it. Like `allocate`, this may wait for all work
        of the device: in the thread that the device waits for, for ever.
        """

    def stream(self) -> Stream:
        """Return a new stream, independent of all others."""

    def exclusive(self) -> AbstractContextManager[Any]:
        """Return a lock, to be held as long as work that has been queued waits for the host.

        Who allocates or frees waits for all work, and for this before it.
        """

    def close(self) -> None:
        """Wait for all work if the device still answers, and free everything."""


def wait_until(
    is_done: Callable[[], bool], timeout_s: float = TIMEOUT_S, what: str = "the GPU"
) -> None:
    """Poll until something is done; DeviceError "... does not answer" after `timeout_s`.

    Never blocks in the driver, so that Ctrl-C works and a lost device cannot hang us. Other
    threads run meanwhile: at once for short waits, and without a busy core for long ones.
    """
    started = time.monotonic()
    while not is_done():
        waited = time.monotonic() - started
        if waited > timeout_s:
            raise DeviceError(f"{what} does not answer: nothing came back for {timeout_s:g} s")
        time.sleep(0 if waited < 0.02 else 0.0005)


def aligned(nbytes: int) -> int:
    """Return the bytes that something of `nbytes` occupies in a slab."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Slab:
    """One allocation on a device, handed out in order, and freed when the device is closed."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.size, self.used = nbytes, 0
        self.address = device.allocate(nbytes) if nbytes else 0

    def take(self, nbytes: int) -> int:
        """Return the address of the next `nbytes`, aligned. DeviceError if they do not fit."""
        if nbytes < 0 or aligned(nbytes) > self.size - self.used:
            raise DeviceError(
                f"{nbytes} bytes do not fit into the {self.size - self.used} that are left of "
                f"the {self.size} bytes of GPU memory set apart"
            )
        address = self.address + self.used
        self.used += aligned(nbytes)
        return address


class Uploader:
    """Host bytes to the device through two pinned buffers: one is filled while one travels.

    A mapped file is never registered for the device: what that does differs between drivers.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        progress: Callable[[int], Any] = lambda nbytes: None,
        nbytes: int = STAGING,
    ) -> None:
        self._stream, self._progress = stream, progress
        self._buffers = [device.pinned(nbytes) for _ in range(2)]
        self._sent: list[Event | None] = [None, None]  # after the last copy out of each buffer
        self._turn, self._used = 0, 0

    def upload(self, dst: int, pieces: Iterable[U8Array]) -> None:
        """Queue the bytes of `pieces`, one after the other, to go to `dst` and behind.

        `pieces`: uint8 arrays of any shape and size, made or repacked as they are asked for; each
        may be changed when the next is asked for. `progress` is told the bytes of every copy.
        """
        for piece in pieces:
            source = piece.reshape(-1)
            while len(source):
                buffer, address = self._room()
                part, source = source[: len(buffer)], source[len(buffer) :]
                buffer[: len(part)] = part
                self._stream.copy(dst, address, len(part))
                self._used += len(part)
                dst += len(part)
                self._progress(len(part))

    def _room(self) -> tuple[U8Array, int]:
        """Return what is left of the buffer whose turn it is: at least a byte, and its address."""
        if self._used == len(self._buffers[self._turn][0]):
            self._sent[self._turn] = self._stream.record()
            self._turn, self._used = 1 - self._turn, 0
            sent = self._sent[self._turn]
            if sent is not None:
                wait_until(sent.is_done)
        buffer, address = self._buffers[self._turn]
        return buffer[self._used :], address + self._used

    def finish(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until everything has arrived."""
        self._stream.synchronize(timeout_s)
