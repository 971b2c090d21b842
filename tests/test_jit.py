"""Kernels that several processes compile at once."""

import json
import os
import subprocess
import sys
import threading

import pytest
from powerinfer.runtime.cpu import jit
from powerinfer.runtime.cpu.rows import WIDENS

pytestmark = pytest.mark.skipif(jit.fcntl is None, reason="no file locks")

SCRIPT = """
import json, time
from powerinfer.runtime.cpu import jit
from powerinfer.runtime.cpu.rows import WIDENS
here, real = [], jit.compile_cached

def compile_cached(decorator, signature, function, **options):
    hits = real(decorator, signature, function, **options)
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
