"""The gate that every kernel passes for every GPU it is for, without one; and the compiler's cache.

NVRTC compiles to machine code on any machine: `make nvrtc` installs it and runs this. Budgets: no
register is spilled, none lies in local memory, and a thread takes at most 128, or what the launch
comment of its kernel says ("block 128, registers 168").
"""

import os
import re
from types import SimpleNamespace

import pytest
from powerinfer.runtime.cuda import compiler
from powerinfer.runtime.cuda.arguments import FOLDER, kernels
from powerinfer.runtime.cuda.device import DeviceError

ARCHS = (75, 80, 86, 89, 90, 100, 120)
REGISTERS = 128  # a thread, unless its launch comment says otherwise
REGISTER_FILE = 65536  # of a multiprocessor, of all these archs
VERBOSE = (*compiler.OPTIONS, "--ptxas-options=-v")


@pytest.fixture(scope="module")
def library():
    if not compiler.find_library():
        pytest.skip("needs NVRTC: make nvrtc")
    return compiler.nvrtc()


def entries(compiled):
    """Return {kernel: (its PTX, what the assembler said of it)}."""
    ptx = re.split(r"\.entry\s+(\w+)", compiled.ptx)[1:]
    log = re.split(r"Compiling entry function '(\w+)'", compiled.log)[1:]
    logs = dict(zip(log[::2], log[1::2], strict=True))
    return {name: (text, logs[name]) for name, text in zip(ptx[::2], ptx[1::2], strict=True)}


def faults(name, ptx, log, registers=REGISTERS, block=None, size=None):
    """Return what is wrong with a compiled kernel, as sentences."""
    found = []
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    if not frames or any(n != "0" for frame in frames for n in frame):
        found.append(f"{name} uses local memory: {frames}")
    used = int(re.search(r"Used (\d+) registers", log)[1])
    threads = int(re.search(r"\.maxntid (\d+)", ptx)[1])
    if used > registers or used * threads > REGISTER_FILE:
        found.append(f"{name} takes {used} registers x {threads} threads")
    if block is not None and threads != block:
        found.append(f"{name} is bound to {threads} threads, its launch comment says {block}")
    takes = re.search(r"_param_0\[(\d+)\]", ptx)
    if size is not None and (takes is None or int(takes[1]) != size or "_param_1" in ptx):
        found.append(f"{name} does not take one struct of {size} bytes")
    return found


def budget(kernel):
    said = re.search(r"\bregisters (\d+)", kernel.launch)
    return int(said[1]) if said else REGISTERS


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel(library, arch):
    assert arch in library.archs
    units, headers = compiler.sources()
    found, wrong = set(), []
    for source, text in units.items():
        try:
            compiled = library.compile(text, source, arch, headers, VERBOSE)
        except DeviceError as error:  # the other files are looked at all the same
            wrong.append(str(error))
            continue
        assert compiled.cubin[:4] == b"\x7fELF"
        for name, (ptx, log) in entries(compiled).items():
            kernel = kernels()[name]
            assert kernel.source == source and f"for 'sm_{arch}'" in log
            found.add(name)
            size = kernel.arguments.itemsize
            wrong += faults(name, ptx, log, budget(kernel), kernel.block, size)
            if name == "gemv_q4_0":
                assert "dp4a" in ptx and wide_loads(ptx)
            # Where kernels may begin early, one that does not wait breaks the chain for all after.
            if ("griddepcontrol.wait" in ptx) != (arch >= 90):
                wrong.append(f"{name}: does it wait for its predecessors?")
            assert set(re.findall(r"mma\.sync\.aligned\.(\w+)\.row\.col\.\w+\.(\w+)", ptx)) == (
                products(name, arch)
            ), name
    assert not wrong, "\n".join(wrong)
    assert found == set(kernels())


def products(kernel, arch):
    """Return the products of tensor cores that a kernel is made of, as (shape, type)."""
    if "gemm_" not in kernel:
        return set()
    if "down" in kernel or kernel.endswith(("f16", "f32")):
        return {("m16n8k8", "tf32")} if arch >= 80 else set()
    if arch < 80:
        return {("m8n8k16", "s8")}
    return {("m16n8k16" if kernel.endswith("q6_k") else "m16n8k32", "s8")}


def wide_loads(ptx):
    """Return the loads from global memory of 128 bits."""
    return re.findall(r"ld\.global[\w.:]*\.(?:v4\.[ufb]32|v2\.[ufb]64)", ptx)


def test_the_gate_sees_faults(library):
    text = """
    struct k_args { const float* x; float* y; int n; };
    extern "C" __global__ void __launch_bounds__(BLOCK) k(const k_args p) {
        float sums[SUMS];
        for (int i = 0; i < SUMS; i++) sums[i] = p.x[i];
        for (int j = 0; j < p.n; j++)
            for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * sums[(i * 7 + 3) % SUMS] + p.x[j];
        for (int i = 0; i < SUMS; i++) p.y[i] = sums[INDEX];
    }"""

    def look(sums, index, bound=64, **expected):
        defines = (f"-DSUMS={sums}", f"-DBLOCK={bound}", f"-DINDEX={index}")
        compiled = library.compile(text, "k.cu", 80, {}, (*VERBOSE, *defines))
        ((ptx, log),) = entries(compiled).values()
        assert not wide_loads(ptx)
        return faults("k", ptx, log, **expected)

    assert look(8, "i") == []
    assert look(8, "i", block=64, size=24) == []
    assert "uses local memory" in look(150, "i", bound=1024)[0]  # 64 registers: spilled
    assert "uses local memory" in look(100, "(p.n + i) % 100")[0]  # indexed at run time
    assert "registers x 64 threads" in look(150, "i")[0]
    assert look(150, "i", registers=255) == []
    assert "bound to 64 threads" in look(8, "i", block=128)[0]
    assert "one struct of 32 bytes" in look(8, "i", size=32)[0]


def test_wide_loads_are_known():
    for load in ("ld.global.nc.v4.u32", "ld.global.v4.f32", "ld.global.nc.L1::no_allocate.v2.b64"):
        assert wide_loads(f" {load} {{%r1, %r2}}, [%rd1];")
    for load in ("ld.global.v2.u32", "ld.shared.v4.u32", "ld.global.u64", "st.global.v4.u32"):
        assert not wide_loads(f" {load} {{%r1, %r2}}, [%rd1];")


def test_errors_name_the_line(library):
    with pytest.raises(DeviceError) as caught:
        library.compile(
            '#include "a.cuh"\n__device__ int f() {\n return wrong; }', "b.cu", 75, {"a.cuh": ""}
        )
    assert str(caught.value).startswith("NVRTC cannot compile b.cu for sm_75: b.cu(3): error: ")
    assert "wrong" in caught.value.__notes__[0]
    with pytest.raises(DeviceError, match=r"a\.cuh\(2\): error"):
        library.compile('#include "a.cuh"', "b.cu", 75, {"a.cuh": "\nint a = b;"})
    with pytest.raises(DeviceError, match=r"NVRTC cannot compile b\.cu for sm_99"):
        library.compile("", "b.cu", 99, {})


def test_no_header_of_cuda_is_needed(library):
    """Ours are the only files that are included: users need no toolkit."""
    for name, text in [pair for part in compiler.sources() for pair in part.items()]:
        for included in re.findall(r"^\s*#\s*include\s*(\S+)", text, re.M):
            assert (FOLDER / included.strip('"')).is_file(), (name, included)


# ---- what needs no NVRTC ----


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A compiler that copies, with its calls; sources and a cache of their own."""
    calls = []

    def compile(text, name, arch, headers):
        calls.append((name, arch))
        return SimpleNamespace(cubin=f"{arch} {text} {headers}".encode())

    library = SimpleNamespace(version=(13, 0), arch=lambda c: c[0] * 10 + c[1], compile=compile)
    monkeypatch.setattr(compiler, "nvrtc", lambda newest: library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name in ("a.cu", "b.cu", "common.cuh"):
        (folder / name).write_text(name)

    def run(capability=(8, 0)):
        """Compile; return the code, what was compiled, and what the user was told."""
        calls.clear()
        told = []
        made = compiler.compile_all(capability, told.append, folder=folder)
        return made, sorted(calls), told

    return SimpleNamespace(run=run, folder=folder, cache=tmp_path / "cache", library=library)


def test_compiled_once(machine):
    made, calls, told = machine.run()
    assert made["a.cu"] == b"80 a.cu {'common.cuh': 'common.cuh'}"
    assert calls == [("a.cu", 80), ("b.cu", 80)] and told == ["compiling GPU kernels, once"]
    assert machine.run() == (made, [], [])
    assert len(machine.run((9, 0))[1]) == 2
    assert machine.run()[1] == []
    (machine.folder / "common.cuh").write_text("new")
    again, calls, _ = machine.run()
    assert len(calls) == 2 and again["b.cu"].endswith(b"'new'}")
    machine.library.version = (13, 1)
    assert len(machine.run()[1]) == 2
    assert machine.run()[1] == []


def test_damaged_and_missing_cache_files(machine):
    made = machine.run()[0]
    (first, second) = sorted(machine.cache.rglob("*.cubin"))
    whole = first.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole[:-1] + b"?", b"?" + whole[1:]):
        first.write_bytes(damaged)
        assert machine.run()[:2] == (made, [("a.cu", 80)])
        assert first.read_bytes() == whole
    second.unlink()
    assert machine.run()[:2] == (made, [("b.cu", 80)])
    assert sorted(p.name for p in first.parent.iterdir()) == ["a.cubin", "b.cubin"]


def test_no_writable_cache(machine):
    machine.cache.write_text("a file where the folder would be")
    made, calls, _ = machine.run()
    assert len(made) == len(calls) == 2
    assert len(machine.run()[1]) == 2


def test_a_full_disk_leaves_no_half_file(machine, monkeypatch):
    class Full:  # stands for a file
        def __init__(self, handle, mode):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *error):
            os.close(self.handle)

        def write(self, data):
            os.write(self.handle, data[:10])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, "fdopen", Full)
    assert len(machine.run()[1]) == 2
    assert [p for p in machine.cache.rglob("*") if p.is_file()] == []


def test_arch_of_a_gpu():
    library = object.__new__(compiler.NVRTC)
    library.version, library.archs = (13, 0), (75, 80, 86, 89, 90, 100, 103, 120)
    expected = {(7, 5): 75, (8, 0): 80, (8, 7): 86, (8, 9): 89, (9, 0): 90, (10, 3): 103}
    expected |= {(10, 1): 100, (12, 1): 120}
    assert {c: library.arch(c) for c in expected} == expected
    for capability in ((6, 1), (7, 0), (13, 0)):
        with pytest.raises(DeviceError, match=r"NVRTC 13.0 makes no code for compute capability"):
            library.arch(capability)


def test_where_nvrtc_is(monkeypatch, tmp_path):
    files = {13: "cu13/lib/libnvrtc.so.13", 12: "cuda_nvrtc/lib/libnvrtc.so.12"}
    monkeypatch.setattr(compiler, "_WHEEL_FILES", files)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "a"), str(tmp_path / "b")])
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(compiler.ctypes.util, "find_library", lambda name: None)
    assert compiler.find_library() == ""
    twelve, thirteen = (tmp_path / "b" / files[major] for major in (12, 13))
    for path in (twelve, thirteen):
        path.parent.mkdir(parents=True)
        path.write_text("not a library")
        assert compiler.find_library() == str(path)
    assert compiler.find_library(14) == str(thirteen)
    assert compiler.find_library(12) == str(twelve)  # for a driver that knows no newer code
    compiler.nvrtc.cache_clear()
    with pytest.raises(DeviceError, match=f"{thirteen} cannot be used: "):
        compiler.nvrtc()
    monkeypatch.setattr(compiler, "NVRTC", lambda path: SimpleNamespace(version=(13, 1)))
    assert compiler.nvrtc(13).version == compiler.nvrtc(14).version == (13, 1)
    with pytest.raises(DeviceError, match=r"too new for a driver of CUDA 12: pip .*\[cuda12\]'"):
        compiler.nvrtc(12)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    compiler.nvrtc.cache_clear()
    with pytest.raises(DeviceError, match=r"pip install 'powerinfer-python\[cuda12\]'"):
        compiler.nvrtc(12)
    with pytest.raises(DeviceError, match=r"pip install 'powerinfer-python\[cuda13\]'"):
        compiler.nvrtc(99)
    compiler.nvrtc.cache_clear()
