"""Hostile files through every command: one sentence, soon, in little memory."""

import random
import re
import sys
import time

import pytest
from attacks.gguf_files import HOSTILE
from attacks.mutate import mutate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from powerinfer.runtime.config import model_config
from powerinfer.runtime.errors import PowerInferError
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.runtime.tokenizer import load_tokenizer
from powerinfer.runtime.weights import load_weights

from powerinfer.__main__ import run_command


def peak_memory():
    """Return the most memory that this process has had, in bytes (0 where nobody says)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 35
    assert len(set(HOSTILE.values())) > 50


@pytest.mark.parametrize("name", HOSTILE)
def test_every_command_refuses(name, tmp_path, capfd):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    for command, args in (
        ("infer", ["-m", path, "-p", "x"]),
        ("quantize", [path, tmp_path / "out.gguf", "q4_0"]),
        ("inspect", [path]),
        ("convert", [path, "--outfile", tmp_path / "out.gguf"]),
    ):
        started, most = time.process_time(), peak_memory()
        code = run_command(command, [str(a) for a in args], command)
        assert time.process_time() - started < 1
        assert peak_memory() - most < 512 << 20
        out, err = capfd.readouterr()
        last = err.strip().split("\n")[-1]
        assert (code, out) == (1, "")
        assert re.match(rf"{command}: error: .*hostile\.gguf", last), err
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.gguf"]


def open_model(path):
    """Check a file as `infer` does, without running it."""
    file = GGUFFile(path)
    load_weights(file, model_config(file))
    load_tokenizer(file)


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 1 << 40))
def test_mutations(seed, tiny_gguf, tmp_path):
    """`make fuzz` does the same for longer, and runs what is accepted."""
    base = tiny_gguf("mha", "q8_0", True)
    raw, path = base.read_bytes(), tmp_path / "x.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(mutate(raw, random.Random(seed), GGUFFile(base).data_offset))
    try:
        open_model(path)
    except PowerInferError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


def test_truncation_at_every_structural_offset(tiny_gguf, tmp_path):
    base = GGUFFile(tiny_gguf("mha", "q8_0", True))
    raw, path = base.path.read_bytes(), tmp_path / "x.gguf"
    start = base._bytes.ctypes.data
    ends = [t.data.ctypes.data - start for t in base.tensors.values()]
    vocabulary = range(1200, base.data_offset - 4000, 97)  # thousands of strings, all alike
    cuts = [*range(1200), *vocabulary, *range(base.data_offset - 4000, base.data_offset), *ends]
    for cut in cuts:
        path.unlink(missing_ok=True)
        path.write_bytes(raw[:cut])
        with pytest.raises(PowerInferError):
            open_model(path)
