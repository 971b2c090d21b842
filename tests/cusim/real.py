"""A real GPU in the place of the simulator, for the tests of kernels: CUSIM=gpu pytest ...

Memory is pinned: kernels and host see the same bytes at the same address. What checks accesses or
plants faults is skipped; results are compared as ever.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from powerinfer.runtime.cuda import arguments, detect

from . import sim


@functools.cache
def gpu() -> Any:
    """Open GPU 0, once for all tests."""
    from powerinfer.runtime.cuda.gpu import GPU

    return GPU(0)


def unavailable() -> str:
    """Return why there is no GPU to use, "" if there is one."""
    return detect.find().reason


class RealGPU(sim.Simulator):
    """All kernels of this project, on a GPU."""

    def __init__(self) -> None:
        super().__init__([], check=False)
        self._stream = gpu().stream()

    @property
    def kernels(self) -> list[str]:
        return list(arguments.kernels())

    def empty(self, shape: int | tuple[int, ...], dtype: Any, name: str = "array") -> sim.Array:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return self._keep(Pinned(shape, dtype, name))

    def register(self, data: np.ndarray, name: str = "host") -> sim.Array:
        pytest.skip("a GPU does not see memory that is not pinned")

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: bytes | np.ndarray | np.void,
        shared: int = 0,
        order_seed: int | None = None,
    ) -> None:
        data = args if isinstance(args, bytes) else args.tobytes()
        struct = np.frombuffer(data, arguments.arguments(kernel)).copy()
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        assert isinstance(block, int)
        self._stream.launch(kernel, grid, block, struct, shared)
        self._stream.synchronize(20)


class Pinned(sim.Array):
    """Host memory that the device sees."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, name: str) -> None:
        super().__init__((), np.uint8, name, check=False)
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self._memory, self.address = gpu().pinned(max(self.nbytes, 1))
        self._bytes = self._memory[: self.nbytes]
        self._bytes.fill(0xFF)
