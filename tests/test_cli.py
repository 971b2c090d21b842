"""The command lines: what goes to stdout, exit codes, and one sentence for every failure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torchfile

from powerinfer.__main__ import COMMANDS, main, run_command


def run(capfd, name, *args):
    """Run a command in this process; return (exit code, stdout, stderr)."""
    try:
        code = run_command(name, [str(a) for a in args], name)
    except SystemExit as usage:
        code = int(usage.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


def spawn(*args, **options):
    """Run `powerinfer ...` as a user does."""
    command = [sys.executable, "-m", "powerinfer", *map(str, args)]
    return subprocess.run(command, capture_output=True, timeout=200, **options)


def last_line(err):
    return err.strip().split("\n")[-1].split("\r")[-1]


# -- infer ------------------------------------------------------------------------------------


def test_infer_streams_prompt_and_continuation_and_nothing_else(demo_gguf):
    result = spawn(
        "infer", "-m", demo_gguf("q4_0"), "-p", "In the beginning", "-n", 20, "--temp", 0
    )
    out, err = result.stdout.decode(), result.stderr.decode()
    assert result.returncode == 0
    assert out.startswith("In the beginning ") and len(out.split()) > 12
    for line in ("load ", "prompt ", "decode ", "neurons ", "bound "):
        assert re.search(rf"^{line}", err, re.M), err
    assert "20 tokens" in err and "Traceback" not in err
    quiet = spawn(
        "infer",
        "-m",
        demo_gguf("q4_0"),
        "-p",
        "In the beginning",
        "-n",
        20,
        "--temp",
        0,
        "--no-echo",
    )
    assert "In the beginning" + quiet.stdout.decode() == out


def test_infer_options(capfd, demo_gguf, tmp_path):
    model = demo_gguf("q4_0")
    base = ("infer", "-m", model, "-n", "12", "-s", "3")
    code, first, _ = run(capfd, *base, "-p", "And God said")
    assert code == 0
    assert run(capfd, *base, "-p", "And God said")[1] == first
    assert run(capfd, *base, "-p", "And God said", "-t", 1)[1] == first
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("And God said\n", encoding="utf-8")
    assert run(capfd, *base, "-f", prompt)[1] == first
    _, out, _ = run(capfd, *base, "-e", "-p", r"é:\n\x41\\")
    assert out.startswith("é:\nA\\")
    _, out, _ = run(capfd, *base, "-p", "x", "--temp", 0, "--stop", " ")
    assert out.startswith("x") and " " not in out[1:]
    assert (
        run(capfd, *base, "-p", "x", "--exact", "--temp", 0)[1]
        == (run(capfd, *base, "-p", "x", "--dense", "--temp", 0)[1])
    )
    code, out, err = run(capfd, *base, "-p", "x", "--backend", "numpy", "--kv-type", "f32")
    assert code == 0 and "numpy backend" in err
    code, _, err = run(capfd, *base, "-p", "x", "--vram-budget", "4")
    assert code == 0 and "running on the CPU" in err
    _, out, _ = run(capfd, *base, "-p", "x", "--temp", 0, "--logit-bias", "5+100", "--ignore-eos")
    assert len(out) > 5


def test_infer_says_when_the_context_is_full(capfd, demo_gguf):
    model = demo_gguf("q4_0")
    code, _, err = run(capfd, "infer", "-m", model, "-p", "And", "-c", 32, "-n", -1, "--ignore-eos")
    assert code == 0 and "the context of 32 tokens is full" in err
    code, out, err = run(capfd, "infer", "-m", model, "-p", "And God said " * 20, "-c", 32)
    assert code == 1 and out == ""
    assert re.search(r"the prompt has \d+ tokens, the context 32", last_line(err))


def test_infer_usage_errors(capfd, demo_gguf):
    model = str(demo_gguf("q4_0"))
    for args, message in (
        ([], "one of -m FILE and --demo"),
        (["-m", model, "--demo"], "one of -m FILE and --demo"),
        (["-m", model, "-ngl", "33"], "--vram-budget"),
        (["-m", model, "-n", "-2"], "-2 is below -1"),
        (["-m", model, "-t", "0"], "0 is below 1"),
        (["-m", model, "-c", "x"], "invalid"),
        (["-m", model, "--temp", "-1"], "temperature is -1"),
        (["-m", model, "--temp", "nan"], "temperature is nan"),
        (["-m", model, "--top-p", "0"], "top_p is 0"),
        (["-m", model, "--exact", "--dense"], "not allowed with"),
        (["-m", model, "-p", "a", "-f", "b"], "exclude each other"),
        (["-m", model, "--logit-bias", "x"], "is not like"),
        (["-m", model, "--vram-budget", "-3"], "vram_budget is -3"),
        (["-m", model, "-t", "513"], "threads is 513"),
        (["-m", model, "-c", "9999999"], "context is 9999999"),
        (["-m", model, "--sparse-threshold", "nan"], "sparse_threshold is nan"),
        (["-m", model, "--nonsense"], "unrecognized"),
    ):
        code, out, err = run(capfd, "infer", *args)
        assert (code, out) == (2, ""), args
        assert message in err and "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_with_timings(demo_gguf):
    command = [sys.executable, "-m", "powerinfer", "infer", "-m", str(demo_gguf("q4_0"))]
    command += ["-p", "And", "-n", "-1", "-c", "100000", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    read = os.read(process.stdout.fileno(), 4)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130
    assert (read + out).startswith(b"And ")
    assert b"interrupted" in err and b"decode " in err and b"Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_leaves(demo_gguf):
    command = (
        f"{sys.executable} -m powerinfer infer -m {demo_gguf('q4_0')} -p And -n 200 | head -c 5"
    )
    result = subprocess.run(["sh", "-c", command], capture_output=True, timeout=200)
    assert len(result.stdout) == 5
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr


def test_demo(capfd):
    code, out, err = run(capfd, "infer", "--demo", "-p", "In the beginning", "-n", 30, "--temp", 0)
    assert code == 0 and out.startswith("In the beginning")
    assert "predicted mode" in err
    words = re.findall(r"[a-z]+", out.lower())
    common = {"the", "and", "of", "in", "god", "lord", "was", "to", "that", "he", "were", "his"}
    assert len(common & set(words)) >= 3  # recognisable English


# -- convert, quantize, inspect ---------------------------------------------------------------


def test_whole_chain(tiny_checkpoint, tmp_path, capfd):
    folder = tmp_path / "my model"
    folder.mkdir()
    for file in tiny_checkpoint("mha").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    predictors = tmp_path / "predictors"
    predictors.mkdir()
    from conftest import random_predictors

    random_predictors(tiny.MODELS["mha"], predictors, 32)
    code, out, err = run(capfd, "convert", folder, predictors)
    f16 = folder / "my model.f16.powerinfer.gguf"
    assert (code, out) == (0, "") and f16.exists() and "100%" in err
    code, out, err = run(capfd, "quantize", f16, "Q4_0", "2")
    q4_0 = folder / "my model.q4_0.powerinfer.gguf"
    assert (code, out) == (0, "") and q4_0.exists() and "100%" in err
    code, out, err = run(capfd, "infer", "-m", q4_0, "-p", "ab", "-n", "5", "--ignore-eos")
    assert code == 0 and out.startswith("ab") and "predicted mode" in err
    code, out, _ = run(capfd, "inspect", q4_0)
    assert code == 0 and "blk.0.ffn_down_t.weight" in out and "rank 32" in out
    code, out, _ = run(capfd, "inspect", "--json", q4_0)
    data = json.loads(out)
    assert data["keys"]["llama.block_count"]["value"] == 2
    assert data["sparsity"]["predictor_ranks"] == [32]
    assert {t["name"]: t["type"] for t in data["tensors"]}["blk.0.ffn_up.weight"] == "Q4_0"
    assert sum(t["bytes"] for t in data["tensors"]) < data["bytes"] == q4_0.stat().st_size


def test_default_names():
    from pathlib import Path

    from powerinfer.commands.quantize import default_target

    for source, wanted in (
        ("a/x.f16.powerinfer.gguf", "a/x.q4_0.powerinfer.gguf"),
        ("x.F16.gguf", "x.q4_0.gguf"),
        ("x.gguf", "x.q4_0.gguf"),
        ("llama-7b.v2", "llama-7b.v2.q4_0.gguf"),
    ):
        assert default_target(Path(source), "q4_0") == Path(wanted)


def test_quantize_arguments(capfd, tiny_gguf, tmp_path):
    source = tiny_gguf("mha", "f16", True)
    code, _, _ = run(
        capfd,
        *("quantize", "--output-type", "f16", "--predictor-type", "q4_0"),
        *(source, tmp_path / "out.gguf", "q4_0"),
    )
    assert code == 0
    _, out, _ = run(capfd, "inspect", "--json", tmp_path / "out.gguf")
    types = {t["name"]: t["type"] for t in json.loads(out)["tensors"]}
    assert types["output.weight"] == "F16" and types["blk.0.fc1.weight"] == "Q4_0"
    for args, message in (
        (["x"], "no TYPE"),
        (["a", "b", "q4_0"], "no TYPE"),
        (["q4_0", "two"], "number of threads"),
        (["q4_0", "0"], "number of threads"),
        (["q4_0", "2", "3"], "number of threads"),
        (["--output-type", "q9", "q4_0"], "unknown type"),
        ([], "required"),
    ):
        code, _, err = run(capfd, "quantize", source, *args)
        assert code == 2 and message in err, args
    code, _, err = run(capfd, "quantize", source, source, "q8_0")
    assert code == 1 and "is the input itself" in last_line(err)


def test_escapes_and_biases(capfd, demo_gguf):
    base = ("infer", "-m", demo_gguf("q4_0"), "-n", 0)
    for prompt, expected in ((r"\é\n", "\\é\n"), (r"a\x41\tb", "aA\tb"), (r"\\n\q", "\\n\\q")):
        assert run(capfd, *base, "-e", "-p", prompt)[1] == expected
    for bias in ("512", "x+1", "5+", "5+x", "-5+1"):
        code, _, err = run(capfd, *base, f"--logit-bias={bias}")
        assert code == 2 and "is not like" in err
    assert run(capfd, *base, "-p", "x", "--logit-bias", "42+1e-5")[0] == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_pipes_and_links(capfd, tiny_gguf, tiny_checkpoint, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    source = tiny_gguf("mha", "f16")
    for name, args in (
        ("infer", ["-m", tmp_path / "pipe", "-p", "x"]),
        ("infer", ["-m", source, "-f", tmp_path / "pipe"]),
        ("inspect", [tmp_path / "pipe"]),
        ("quantize", [tmp_path / "pipe", "q4_0"]),
        ("quantize", [source, tmp_path / "pipe", "q4_0"]),
        ("quantize", [source, "/dev/null", "q4_0"]),
    ):
        line = one_sentence(run(capfd, name, *args), name)
        assert "not a regular file" in line
    assert (tmp_path / "pipe").is_fifo() and not Path("/dev/null").is_file()
    # A link stays a link; the file behind it is written.
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    assert run(capfd, "quantize", source, tmp_path / "link.gguf", "q4_0")[0] == 0
    assert (tmp_path / "link.gguf").is_symlink() and (tmp_path / "real.gguf").stat().st_size > 1000


def test_other_files_are_not_overwritten(capfd, tiny_checkpoint, tiny_gguf, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("mha"), folder)
    before = (folder / "model.safetensors").read_bytes()
    for target in (folder / "model.safetensors", folder / "config.json"):
        line = one_sentence(run(capfd, "convert", folder, "--outfile", target), "convert")
        assert "not overwritten" in line
    assert (folder / "model.safetensors").read_bytes() == before
    long_name = tmp_path / ("x" * 250 + ".gguf")
    assert run(capfd, "quantize", tiny_gguf("mha", "f16"), long_name, "q4_0")[0] == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_leave_no_half_file(name, demo_gguf, tmp_path):
    """A quantisation that is slowed down until the signal has come."""
    number = getattr(signal, name)
    script = (
        "import sys, time\n"
        "from powerinfer.quantize import encoder\n"
        "from powerinfer.__main__ import run_command\n"
        "plain = encoder.convert_rows\n"
        "def slow(*args):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    return plain(*args)\n"
        "encoder.convert_rows = slow\n"
        "sys.exit(run_command('quantize', [sys.argv[1], sys.argv[2], 'q4_0', '1'], 'quantize'))\n"
    )
    command = [sys.executable, "-c", script, str(demo_gguf("f16")), str(tmp_path / "x.gguf")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 128 + number and b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX shells")
def test_closed_streams(demo_gguf, tmp_path):
    command = f"{sys.executable} -m powerinfer infer -m {demo_gguf('q4_0')} -p And -n 3 --temp 0"
    whole = subprocess.run(["sh", "-c", command], capture_output=True, timeout=200)
    quiet = subprocess.run(["sh", "-c", command + " 2>&-"], capture_output=True, timeout=200)
    assert (quiet.returncode, quiet.stdout) == (0, whole.stdout)
    gone = subprocess.run(["sh", "-c", command + " >&-"], capture_output=True, timeout=200)
    assert gone.returncode == 0 and b"Traceback" not in gone.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="Windows locks files that are mapped")
@pytest.mark.parametrize("backend", ["cpu", "numpy"])  # machine code; Python's own thread
def test_a_file_that_is_cut_short_while_it_is_read(backend, demo_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(demo_gguf("q4_0").read_bytes())
    script = (
        "import os, sys\n"
        "from powerinfer.__main__ import run_command\n"
        "from powerinfer.runtime.engine import Engine\n"
        "generate = Engine.generate\n"
        "def cut(self, *args, **options):\n"
        "    os.truncate(self.file.path, 4096)\n"
        "    return generate(self, *args, **options)\n"
        "Engine.generate = cut\n"
        "sys.exit(run_command('infer', sys.argv[1:], 'infer'))\n"
    )
    command = [sys.executable, "-c", script, "-m", path, "-p", "And", "-n", "3"]
    done = subprocess.run(
        [*command, "--backend", backend], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last_line(done.stderr).startswith(
        "infer: error: a file could not be read: it is shorter"
    )


def test_home_and_kernel_cache_of_all_kinds(demo_gguf, tmp_path):
    """No home, a home that is a file, damaged cache files: slower, but it runs."""
    (tmp_path / "file").write_text("")
    good = tmp_path / "cache"
    run_with = {"XDG_CACHE_HOME": str(good)}
    script = (
        "import sys, powerinfer\n"
        "from powerinfer.runtime.cpu.jit import compile_cached, nogil, kernel_cache\n"
        "double = nogil('int64(int64)')(lambda x: 2 * x)\n"
        "print(double(21), kernel_cache())\n"
    )
    (tmp_path / "module.py").write_text(
        script.replace("lambda x: 2 * x", "twice").replace(
            "double = ", "def twice(x):\n    return 2 * x\ndouble = "
        )
    )

    def answer(**environment):
        result = subprocess.run(
            [sys.executable, tmp_path / "module.py"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    assert answer(**run_with)[0] == "42"
    files = [*good.rglob("*.nbi"), *good.rglob("*.nbc")]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:10])
    assert answer(**run_with)[0] == "42"
    assert answer(XDG_CACHE_HOME=str(tmp_path / "file"))[0] == "42"


# -- failures ---------------------------------------------------------------------------------


def one_sentence(result, name):
    code, out, err = result
    assert code == 1 and out == "", err
    line = last_line(err)
    assert line.startswith(f"{name}: error: ") and len(line) > 20
    assert "Traceback" not in err
    return line


@pytest.mark.parametrize("name", ["infer", "quantize", "inspect"])
def test_broken_model_files(name, capfd, demo_gguf, tmp_path):
    raw = demo_gguf("q4_0").read_bytes()
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("Once upon a time there was a text file.")
    (tmp_path / "zeros.gguf").write_bytes(bytes(4096))
    for cut in (3, 10, 100, 5000, len(raw) // 2, len(raw) - 1000):
        (tmp_path / f"cut{cut}.gguf").write_bytes(raw[:cut])
    (tmp_path / "directory.gguf").mkdir()
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "missing.gguf"]
    for path in paths:
        args = {
            "infer": ["-m", path, "-p", "x"],
            "quantize": [path, tmp_path / "out.gguf", "q8_0"],
            "inspect": [path],
        }[name]
        line = one_sentence(run(capfd, name, *args), name)
        assert path.name in line
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".*"))


def test_unreadable_file(capfd, demo_gguf, monkeypatch):
    import builtins

    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    path = demo_gguf("q4_0")
    monkeypatch.setattr(builtins, "open", denied)
    line = one_sentence(run(capfd, "inspect", path), "inspect")
    assert line.endswith(f"{path}: Permission denied")


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_full_disk(demo_gguf, tmp_path):
    """A limit on the size of files stands in for a full disk: writes fail midway."""

    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    source = demo_gguf("f16")
    result = spawn("quantize", source, tmp_path / "x.gguf", "q8_0", preexec_fn=limit)
    assert result.returncode == 1
    assert "error: " in last_line(result.stderr.decode())
    assert b"Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_convert_failures(capfd, tiny_checkpoint, tmp_path):
    line = one_sentence(run(capfd, "convert", tmp_path / "nothing"), "convert")
    assert "not a directory" in line
    folder = tmp_path / "m"
    folder.mkdir()
    line = one_sentence(run(capfd, "convert", folder), "convert")
    assert "config.json: No such file" in line
    for file in tiny_checkpoint("swiglu").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    line = one_sentence(run(capfd, "convert", folder), "convert")
    assert "--dense" in line
    (folder / "model.safetensors").unlink()
    torchfile.write_zip(folder / "pytorch_model.bin", b"cos\nsystem\n(X\x02\0\0\0lstR.", {})
    line = one_sentence(run(capfd, "convert", "--dense", folder), "convert")
    assert "refused" in line and "os.system" in line
    assert not list(folder.glob("*.gguf"))
    code, _, err = run(capfd, "convert", folder, "--outtype", "q3")
    assert code == 2 and "invalid choice" in err


def test_no_memory(capfd, demo_gguf, monkeypatch):
    """What cannot be allocated is a sentence, too."""

    def full(*_args):
        raise MemoryError

    monkeypatch.setattr("powerinfer.runtime.engine.KVCache", full)
    line = one_sentence(run(capfd, "infer", "-m", demo_gguf("q4_0"), "-p", "x"), "infer")
    assert "not enough memory" in line


def test_front_door(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("powerinfer-python ")
    for argv, code in (([], 2), (["nonsense"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == code
    capfd.readouterr()
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"powerinfer {name}" in capfd.readouterr().out
