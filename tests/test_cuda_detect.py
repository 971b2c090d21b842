"""Finding a GPU, or why there is none, with a driver of our own."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
from powerinfer.runtime.cuda import compiler, detect

DRIVER = r"""
#include <cstring>
struct GPU { const char* name; unsigned long long memory; int major, minor; };
static const GPU gpus[] = { GPUS };
constexpr int n = sizeof(gpus) / sizeof(gpus[0]) - 1;  // the last one ends the list
extern "C" {
int cuInit(unsigned) { return INIT; }
int cuGetErrorName(int, const char** text) { *text = "CUDA_ERROR_OF_TEST"; return 0; }
int cuDriverGetVersion(int* v) { *v = VERSION; return 0; }
int cuDeviceGetCount(int* count) { *count = n; return 0; }
int cuDeviceGet(int* device, int i) { *device = i + 40; return i < n ? 0 : 101; }
int cuDeviceGetName(char* name, int size, int d) {
    std::strncpy(name, gpus[d - 40].name, size);
    return 0;
}
#ifndef OLD
int cuDeviceTotalMem_v2(unsigned long long* b, int d) { *b = gpus[d - 40].memory; return 0; }
#endif
int cuDeviceGetAttribute(int* v, int a, int d) {
    *v = a == 75 ? gpus[d - 40].major : gpus[d - 40].minor;
    return a == 75 || a == 76 ? 0 : 1;
}
}
"""
OLD, NEW = '{"Old 1", 1ull << 30, 6, 1}', '{"New 2", 24ull << 30, 8, 9}'


@pytest.fixture
def driver(tmp_path):
    """(gpus, init=0, version=13000, more options) -> library of a driver that knows these GPUs."""
    if not shutil.which("g++") or sys.platform == "win32":
        pytest.skip("needs g++")
    (tmp_path / "driver.cpp").write_text(DRIVER)

    def build(gpus="", init=0, version=13000, *options):
        values = {"GPUS": gpus + "{}", "INIT": init, "VERSION": version}
        defines = [f"-D{name}={value}" for name, value in values.items()]
        target = tmp_path / f"libfake{len(list(tmp_path.iterdir()))}.so"
        command = ["g++", "-shared", "-fPIC", *defines, *options, "-o", target, "driver.cpp"]
        subprocess.run(command, check=True, cwd=tmp_path)
        return str(target)

    return build


@pytest.fixture
def packages(monkeypatch):
    """Set what is installed: CuPy for some major version of CUDA, NVRTC for some."""

    def install(cupy=None, nvrtc=None):
        versions = {f"cupy-cuda{cupy}x": "14.0"}

        def version(name):
            if name not in versions:
                raise detect.PackageNotFoundError(name)
            return versions[name]

        spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: cupy if name == "cupy" else spec(name)
        )
        monkeypatch.setattr(detect, "version", version)
        monkeypatch.setattr(
            compiler, "find_library", lambda newest: "lib" if nvrtc and nvrtc <= newest else ""
        )

    return install


def test_usable_gpus(driver, packages):
    packages(13, 13)
    found = detect.find(driver(f"{OLD},{NEW},"))
    assert found == detect.Found((detect.FoundGPU(1, "New 2", 24 << 30, (8, 9)),), (13, 0), "")
    packages(12, 12)
    assert detect.find(driver(f"{NEW},", 0, 12040)).reason == ""


@pytest.mark.parametrize(
    ("options", "installed", "reason"),
    [
        (("",), (13, 13), "no GPU: the driver finds none"),
        ((NEW + ",", 100), (13, 13), "no GPU: the driver finds none"),
        ((NEW + ",", 803), (13, 13), "no GPU: cuInit gives CUDA_ERROR_OF_TEST (803)"),
        (
            (OLD + ",",),
            (13, 13),
            "Old 1 is too old: it has compute capability 6.1, and 7.5 is needed",
        ),
        (
            (NEW + ",", 0, 11080),
            (12, 12),
            "the GPU's driver is too old: it knows CUDA 11.8, and 12 or newer is needed",
        ),
        (
            (NEW + ",",),
            (None, None),
            "a GPU is there, but CuPy is not installed: pip install 'powerinfer-python[cuda13]'",
        ),
        (
            (NEW + ",", 0, 12040),
            (None, None),
            "a GPU is there, but CuPy is not installed: pip install 'powerinfer-python[cuda12]'",
        ),
        (
            (NEW + ",", 0, 12040),
            (13, 13),
            "CuPy is for CUDA 13, and the GPU's driver knows only 12.4: update the driver, or pip "
            "install 'powerinfer-python[cuda12]'",
        ),
        (
            (NEW + ",", 0, 12040),
            (12, 13),
            "a GPU is there, but NVRTC is not installed: pip install 'powerinfer-python[cuda12]'",
        ),
        (
            (NEW + ",", 0, 14010),
            (13, None),
            "a GPU is there, but NVRTC is not installed: pip install 'powerinfer-python[cuda13]'",
        ),
    ],
)
def test_reasons(driver, packages, options, installed, reason):
    packages(*installed)
    found = detect.find(driver(*options))
    assert found.reason == reason
    # A GPU is listed where the kernels would run on it, whatever else is missing.
    assert bool(found.gpus) == (" is there" in reason or "driver" in reason.split(":")[0][-30:])


def test_no_driver_or_a_strange_one(driver, tmp_path, capfd):
    assert detect.find("libnothing.so.1").reason == "no GPU: libnothing.so.1 is not on this machine"
    (tmp_path / "text.so").write_text("not a library")
    assert "is not on this machine" in detect.find(str(tmp_path / "text.so")).reason
    reason = detect.find(driver(f"{NEW},", 0, 13000, "-DOLD")).reason
    assert reason.startswith("no GPU: looking for one failed (AttributeError: ")
    assert capfd.readouterr() == ("", "")


def test_detection_needs_no_heavy_module():
    heavy = ("cupy", "numba", "numpy", "powerinfer.runtime.cuda.gpu")
    script = (
        "import sys; from powerinfer.runtime.cuda import detect; detect.find('libnothing.so.1');"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
