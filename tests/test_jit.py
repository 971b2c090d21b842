"""Kernels that several processes compile at once."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from powerinfer.runtime import paths
from powerinfer.runtime.cpu import jit
from powerinfer.runtime.cpu.rows import WIDENS

pytestmark = pytest.mark.skipif(jit.fcntl is None, reason="no file locks")

SCRIPT = """
import json, time
from powerinfer.runtime.cpu import jit
from powerinfer.runtime.cpu.rows import WIDENS
here, real = [], jit.compile_cached

def compile_cached(*args):
    hits = real(*args)
    here.append(hits.cache_hits)
    return hits

jit.compile_cached = compile_cached
said, helpers, start, kernels = [], [], jit._start_helpers, list(WIDENS.values())

def start_helpers(missing, n):
    helpers.extend(start(missing, n))
    while helpers and not any(kernel.is_cached for kernel in kernels):
        assert helpers[0].poll() is None
        time.sleep(0.01)
    return helpers

jit._start_helpers = start_helpers
jit.load_kernels(kernels, said.append, 2)
jit.load_kernels(kernels, said.append, 2)
codes = [helper.poll() for helper in helpers]
print(json.dumps([said, here, codes, [kernel.is_cached for kernel in kernels]]))
"""


def load_in_a_process(cache):
    command = [sys.executable, "-c", SCRIPT]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_helpers_share_the_work(tmp_path):
    """What a helper has compiled is loaded; nobody is left over; then there is nothing to do."""
    said, hits, codes, are_cached = load_in_a_process(tmp_path)
    assert said == ["compiling kernels, once"]
    assert len(hits) == len(WIDENS) and any(hits) and not all(hits)
    assert codes and None not in codes
    assert all(are_cached)
    for kernel in WIDENS.values():  # numba's index, which it does not lock: one for each
        assert len([*tmp_path.glob(f"powerinfer-python/*/{kernel.name}/**/*.nbi")]) == 1
    assert load_in_a_process(tmp_path)[0] == []


def test_others_first(tmp_path, monkeypatch):
    """While another process compiles a kernel those behind it are; then it is waited for."""
    monkeypatch.setattr(jit, "kernel_cache", lambda: tmp_path)
    compiled = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        @property
        def address(self):
            compiled.append(self.name)
            return 0

    first, second = Kernel("first"), Kernel("second")
    with jit._claim(first, 0) as is_ours:
        assert is_ours
        thread = threading.Thread(target=jit.compile_all, args=([first, second],))
        thread.start()
        while not compiled:
            assert thread.is_alive()
        assert compiled == ["second"]
    thread.join(60)
    assert compiled == ["second", "first"]


def test_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(jit, "kernel_cache", lambda: tmp_path / "file")
    assert jit._start_helpers(list(WIDENS.values()), 1) == []
    with jit._claim(WIDENS[0], 0) as is_ours:
        assert is_ours


def test_a_stopped_process_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "kernel_cache", lambda: tmp_path)
    monkeypatch.setattr(jit, "_PATIENCE_S", 0.1)
    kernel = WIDENS[0]
    with jit._claim(kernel, 0) as is_ours, jit._claim(kernel, 0) as is_theirs:
        assert (is_ours, is_theirs) == (True, False)
        jit.compile_all([kernel])
    assert kernel.is_cached


def test_the_cache_is_of_all_that_kernels_are_made_of(tmp_path, monkeypatch):
    runtime = shutil.copytree(Path(jit.__file__).parent.parent, tmp_path / "runtime")
    monkeypatch.setattr(jit, "__file__", str(runtime / "cpu" / "jit.py"))
    name, before = jit.kernel_cache.__wrapped__, set()
    for path in (None, "cpu/axpy.py", "cpu/simd.py", *jit.CONSTANTS):
        if path:
            (runtime / path).write_text((runtime / path).read_text() + "\n")
        before.add(name())
    os.utime(runtime / "cpu" / "rows.py", (0, 0))  # numba would take nothing made before
    before.add(name())
    assert len(before) == 4 + len(jit.CONSTANTS)
    (runtime / "engine.py").write_text("")
    assert name() in before


def test_kernels_hold_constants_of_no_other_module():
    """Modules without kernels may import what they like."""
    without = ("block.py", "isa.py", "jit.py", "operators.py", "pool.py")
    for path in Path(jit.__file__).parent.glob("*.py"):
        imported = re.findall(r"^from \.\.(\w+) import", path.read_text(), re.MULTILINE)
        if path.name not in without:
            assert {f"{module}.py" for module in imported} <= set(jit.CONSTANTS), path


def test_a_cache_that_nobody_may_write_to(tmp_path, monkeypatch):
    """numba takes nothing from it, so that what lies there is compiled again: it is not cached."""
    monkeypatch.setattr(jit, "kernel_cache", lambda: tmp_path)
    kernel = jit.Kernel(lambda a: None, 1, "of_no_use")
    del jit._KERNELS["of_no_use"]
    folder = tmp_path / kernel.name
    folder.mkdir()
    (folder / "complete").touch()
    assert kernel.is_cached
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    assert not kernel.is_cached


def test_unused_caches_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path)
    for name, days in (("kernels-a", 31), ("kernels-b", 29), ("cubin-a", 31)):
        (tmp_path / name / "kernel").mkdir(parents=True)
        (tmp_path / name / "kernel" / "code").touch()
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    paths.sweep("kernels-*")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cubin-a", "kernels-b"]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("NUMBA_ENABLE_AVX", "0", "['generic']"),
        ("NUMBA_CPU_FEATURES", "+sse2", "['generic']"),
        ("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT is set: use --backend numpy, or unset it"),
    ],
)
def test_what_numba_is_told(variable, value, says):
    """LLVM ends the process where a kernel needs what numba has left out."""
    script = """
from powerinfer.runtime.cpu import isa
from powerinfer.runtime.errors import RequestError
try:
    from powerinfer.runtime.cpu import jit
    print(isa.available())
except RequestError as error:
    print(error)
"""
    command, environment = [sys.executable, "-c", script], os.environ | {variable: value}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == says
