"""A stand-in for the functions of `cupy.cuda` that runtime/cuda/gpu.py calls, on host memory.

Work is queued, and done only when somebody asks how far a stream is: then as much as events and
awaited words allow. "Kernels" are Python functions of the struct that a launch points at.
"""

import ctypes
from types import ModuleType

import numpy as np

NOT_READY = 600


class CUDAError(RuntimeError):
    """What CuPy raises: a text, and the number as `status`."""

    def __init__(self, status):
        super().__init__(f"cudaError{status}: something")
        self.status = status


class FakeCuda:
    """One GPU of 1 MiB. `kernels`: {name: (dtype, function)}; `fault`: what a query returns.

    A function that returns False is called again, until it does not.
    """

    def __init__(self, kernels):
        self.kernels = kernels
        self.memory = {}  # address: array, device and pinned memory alike
        self.queues = {}  # stream: work that has not been done
        self.events = {}  # event: whether it is done
        self.graphs = {}  # graph, and executable: captured work
        self.capturing = {}  # stream: work captured so far; streams that take part share a list
        self.captured = {}  # event: the capture that it was recorded in, or None
        self.launched = []  # (kernel, grid, block, shared, attributes)
        self.released = []  # names of what was given back, in order
        self.attributes = {}  # kernel: bytes of shared memory allowed
        self.functions = {}  # handle: name
        self.capability = 7, 5
        self.fault = self.n_handles = 0
        self.runtime, self.driver, self.libcuda = Runtime(self), Driver(self), LibCuda(self)

    def modules(self):
        """Return {name: module} to be put into sys.modules."""
        cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
        cupy.cuda, cuda.runtime, cuda.driver = cuda, self.runtime, self.driver
        return {"cupy": cupy, "cupy.cuda": cuda}

    def handle(self):
        self.n_handles += 1
        return self.n_handles

    def allocate(self, nbytes):
        used = sum(len(array) for array in self.memory.values())
        if used + nbytes > 1 << 20:
            raise CUDAError(2)
        array = np.full(nbytes + 256, 0xCD, np.uint8)
        at = array.ctypes.data
        aligned = array[-at % 256 :][:nbytes]
        self.memory[aligned.ctypes.data] = aligned
        return aligned.ctypes.data

    def release(self, name, table, handle):
        del table[handle]
        self.released.append(name)

    def enqueue(self, stream, work):
        """`work` returns whether it could be done now."""
        (self.capturing if stream in self.capturing else self.queues)[stream].append(work)

    def pump(self):
        """Do what can be done, in all streams."""
        again = True
        while again:
            again = False
            for queue in self.queues.values():
                while queue and queue[0]():
                    queue.pop(0)
                    again = True


def done(action):
    """Make work that can always be done."""
    return lambda: action() or True


class Runtime:
    """cupy.cuda.runtime."""

    CUDARuntimeError = type("CUDARuntimeError", (CUDAError,), {})
    hostAllocPortable, hostAllocMapped = 1, 2
    eventDisableTiming, streamNonBlocking = 2, 1
    memcpyDefault, streamCaptureModeRelaxed = 4, 2

    def __init__(self, cuda):
        self._ = cuda

    def check_status(self, status):
        if status:
            raise self.CUDARuntimeError(status)

    def setDevice(self, device):
        self.check_status(101 if device else 0)

    def getDeviceProperties(self, device):
        major, minor = self._.capability
        name = {"name": b"Fake 1000", "totalGlobalMem": 1 << 20}
        return name | {"major": major, "minor": minor}

    def driverGetVersion(self):
        return 13000

    def memGetInfo(self):
        return (1 << 20) - sum(len(array) for array in self._.memory.values()), 1 << 20

    def malloc(self, size):
        try:
            return self._.allocate(size)
        except CUDAError as error:
            raise self.CUDARuntimeError(error.status) from None

    def free(self, ptr):
        self._.release("memory", self._.memory, ptr)

    def hostAlloc(self, size, flags):
        assert flags == 3
        return self.malloc(size)

    def freeHost(self, ptr):
        self._.release("pinned", self._.memory, ptr)

    def streamCreateWithFlags(self, flags):
        assert flags == 1
        stream = self._.handle()
        self._.queues[stream] = []
        return stream

    def streamDestroy(self, stream):
        self._.release("stream", self._.queues, stream)

    def streamQuery(self, stream):
        if self._.fault:
            return self._.fault
        self._.pump()
        return NOT_READY if self._.queues[stream] else 0

    def eventCreateWithFlags(self, flags):
        assert flags == 2
        event = self._.handle()
        self._.events[event] = True
        return event

    def eventDestroy(self, event):
        self._.release("event", self._.events, event)

    def eventRecord(self, event, stream):
        self._.events[event] = False
        self._.captured[event] = self._.capturing.get(stream)
        self._.enqueue(stream, done(lambda: self._.events.update({event: True})))

    def eventQuery(self, event):
        if self._.fault:
            return self._.fault
        self._.pump()
        return 0 if self._.events[event] else NOT_READY

    def streamWaitEvent(self, stream, event, flags=0):
        events, capture = self._.events, self._.captured[event]
        if capture is not None:  # the stream joins in, if it has not yet
            assert self._.capturing.setdefault(stream, capture) is capture
        self._.enqueue(stream, lambda: events[event])

    def memcpyAsync(self, dst, src, size, kind, stream):
        assert kind == 4
        self._.enqueue(stream, done(lambda: ctypes.memmove(dst, src, size)))

    def memsetAsync(self, ptr, value, size, stream):
        self._.enqueue(stream, done(lambda: ctypes.memset(ptr, value, size)))

    def streamBeginCapture(self, stream, mode=2):
        assert mode == 2 and stream not in self._.capturing
        self._.capturing[stream] = []

    def streamEndCapture(self, stream):
        if stream not in self._.capturing:
            raise self.CUDARuntimeError(401)
        graph, work = self._.handle(), self._.capturing[stream]
        self._.graphs[graph] = work
        self._.capturing = {s: w for s, w in self._.capturing.items() if w is not work}
        return graph

    def graphInstantiate(self, graph):
        executable = self._.handle()
        self._.graphs[executable] = self._.graphs[graph]
        return executable

    def graphDestroy(self, graph):
        self._.release("captured", self._.graphs, graph)

    def graphExecDestroy(self, graphExec):
        self._.release("graph", self._.graphs, graphExec)

    def graphUpload(self, graphExec, stream):
        assert graphExec in self._.graphs and stream in self._.queues

    def graphLaunch(self, graphExec, stream):
        for work in self._.graphs[graphExec]:
            self._.enqueue(stream, work)


class Driver:
    """cupy.cuda.driver."""

    CUDADriverError = type("CUDADriverError", (CUDAError,), {})
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self, cuda):
        self._ = cuda
        self._modules = {}

    def check_status(self, status):
        if status:
            raise self.CUDADriverError(status)

    def moduleLoadData(self, image):
        module = self._.handle()
        self._modules[module] = image
        return module

    def moduleUnload(self, module):
        self._.release("module", self._modules, module)

    def moduleGetFunction(self, module, funcname):
        self.check_status(0 if funcname.encode() in self._modules[module] else 500)
        function = self._.handle()
        self._.functions[function] = funcname
        return function

    def funcSetAttribute(self, f, attribute, value):
        assert attribute == 8
        self._.attributes[self._.functions[f]] = value


class LibCuda:
    """What is called of the driver's library itself; it takes ctypes values."""

    def __init__(self, cuda):
        self._ = cuda

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        c = config._obj
        name = self._.functions[function.value]
        dtype, work = self._.kernels[name]
        args = np.frombuffer(ctypes.string_at(parameters._obj.value, dtype.itemsize), dtype)[0]
        grid, block = (c.grid_x, c.grid_y, c.grid_z), (c.block_x, c.block_y, c.block_z)
        if 0 in grid + block or extra or c.shared > self._.attributes.get(name, 48 << 10):
            return 1
        overlaps = [(c.attributes[i].id, c.attributes[i].value) for i in range(c.n_attributes)]
        self._.launched.append((name, grid, block, c.shared, overlaps))
        self._.enqueue(c.stream, lambda: work(args) is not False)
        return 0

    def cuMemHostGetDevicePointer_v2(self, pointer, host, flags):
        pointer._obj.value = host.value
        return 0 if host.value in self._.memory and not flags.value else 1
