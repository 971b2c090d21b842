"""Whether a model runs on the GPU, and how much of it: found, planned, opened, said in a line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Plan
from ..config import RunOptions
from ..errors import RequestError
from ..footprint import ModelSizes, model_sizes
from ..plan import CROSSING, Placement, Rates
from ..plan import plan as make_placement
from ..weights import Model
from . import detect
from .device import Device, DeviceError
from .operators import CUDA

RESERVE = 512 << 20  # bytes of free GPU memory that are left to others, without a budget
MAX_HEAD_DIM = 256  # numbers of a head that attention.cu has room for
_PROBE = 256 << 20  # bytes that are copied to see how fast the device's memory is


def open_gpu(
    model: Model,
    plan: Plan,
    options: RunOptions,
    notify: Callable[[str], Any],
    progress: Callable[[int], Any] = lambda _: None,
) -> CUDA | None:
    """Return the GPU's backend, or None where the CPU is to do all; `notify` is told which and why.

    RequestError where a GPU was asked for (--backend cuda) and there is none that can be used;
    DeviceError where it fails once it has been opened.
    """
    must = options.backend == "cuda"
    if options.backend == "cpu" or options.gpu is None or options.vram_budget == 0:
        if must:
            raise RequestError("the backend cuda needs a GPU, and memory on it that it may use")
        return None
    try:
        device = _open(model, options.gpu, notify)
    except (RequestError, DeviceError) as error:
        if must:
            raise
        notify(f"{error}; running on the CPU")
        return None
    try:
        placement = place(model, plan, options, device)
        if placement.gpu_layers:
            backend = CUDA(plan, placement, device, options.threads, notify, progress)
            notify(describe(placement, device))
            return backend
        if must:
            raise RequestError(placement.note)
    except BaseException:
        device.close()
        raise
    device.close()
    notify(f"{device.name}: {placement.note}")
    return None


def _open(model: Model, number: int, notify: Callable[[str], Any]) -> Device:
    """Return GPU `number`; RequestError or DeviceError, which say why, if it cannot run a model."""
    found = detect.find()
    if found.reason:
        raise RequestError(found.reason)
    if number not in [gpu.number for gpu in found.gpus]:
        raise RequestError(
            f"no GPU {number}: there are {', '.join(str(gpu.number) for gpu in found.gpus)}"
        )
    head_dim = model.config.head_dim
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise RequestError(
            f"no GPU can be used: its kernels take heads of even sizes up to {MAX_HEAD_DIM}, and "
            f"this model's have {head_dim}"
        )
    return open_device(number, notify)


def open_device(number: int, notify: Callable[[str], Any]) -> Device:
    """Return GPU `number`, kernels compiled; DeviceError if it cannot be used."""
    try:
        from .gpu import GPU  # CuPy takes half a second to import
    except ImportError as error:
        raise DeviceError(f"no GPU: CuPy cannot be imported ({error})") from error
    return GPU(number, notify)


def place(model: Model, plan: Plan, options: RunOptions, device: Device) -> Placement:
    """Return what is to live on a device, as its memory, its speed and the options have it."""
    from ..cpu.bandwidth import Reader
    from ..cpu.isa import physical_cores

    budget = device.memory_free() - RESERVE
    if options.vram_budget is not None:
        budget = int(options.vram_budget * 2**30)
        if budget > device.memory_free():
            raise DeviceError(
                f"{device.name} has {device.memory_free() / 2**30:.2f} GiB free, less than the "
                f"budget of {options.vram_budget:g} GiB"
            )
    threads = options.threads or physical_cores()
    rates = Rates(read_rate(device), Reader(model.file.data).measure(threads, 2), CROSSING)
    return make_placement(sizes(model, plan), rates, max(budget, 0))


def sizes(model: Model, plan: Plan) -> ModelSizes:
    """Measure a model as a plan is to run it."""
    return model_sizes(
        model,
        plan.mode,
        len(plan.rope),
        plan.cache.k.dtype == np.float32,
        n_seq=len(plan.step.pages),
        n_tok=len(plan.step.tokens),
        n_out=len(plan.step.outputs),
    )


def read_rate(device: Device, nbytes: int = _PROBE) -> float:
    """Return how fast a device reads its memory, in bytes a second: half of what copies move."""
    nbytes = min(nbytes, device.memory_free() // 4)
    address, stream, best = device.allocate(2 * nbytes), device.stream(), float("inf")
    try:
        for _ in range(4):
            started = time.perf_counter()
            for _ in range(4):
                stream.copy(address + nbytes, address, nbytes)
            stream.synchronize()
            best = min(best, time.perf_counter() - started)
    finally:
        device.free(address)
    return 8 * nbytes / best


def describe(placement: Placement, device: Device) -> str:
    """Return in a line what a GPU has been given."""
    used, layers = placement.used / 2**30, len(placement.layers)
    text = f"{device.name}: {used:.2f} of {placement.budget / 2**30:.2f} GiB"
    if placement.is_everything:
        return f"{text}, all {layers} layers"
    there = f"{placement.gpu_layers} of {layers} layers"
    return f"{text}, {there}, {placement.served:.0%} of the activations; the CPU does the others"
