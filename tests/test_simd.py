"""The vector layer: half precision against NumPy, dot products against integers; whole models."""

import itertools
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import test_operators
import test_rows
import tiny
from powerinfer.runtime.cache import Sequence
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.cpu import isa, simd
from powerinfer.runtime.cpu.elementwise import exp16, exp_below, peak_of
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import RequestError


@numba.njit
def widen(n, source, target):
    for i in range(0, n, 16):
        simd.store_f32x16(target + 4 * i, simd.load_f16x16(source + 2 * i))


@numba.njit
def narrow(n, source, target):
    for i in range(0, n, 16):
        simd.store_f16x16(target + 2 * i, simd.load_f32x16(source + 4 * i))


@numba.njit
def dots(nibbles, high, w, x, bias, zero, target):
    """target [3, 16]: dot_nibbles of low and high nibbles, dot_bytes."""
    v, xs = simd.load_i8x64(nibbles), simd.load_i8x64(x)
    start = simd.load_i32x16(zero)
    simd.store_i32x16(target, simd.dot_nibbles(start, simd.low_nibbles(v), xs))
    simd.store_i32x16(target + 64, simd.dot_nibbles(start, simd.load_i8x64(high), xs))
    simd.store_i32x16(target + 128, simd.dot_bytes(simd.load_i32x16(bias), simd.load_i8x64(w), xs))


@numba.njit
def exponentials(n, x, target):
    for i in range(0, n, 16):
        simd.store_f32x16(target + 4 * i, exp16(simd.load_f32x16(x + 4 * i)))


@numba.njit
def numerators(x, n):
    return exp_below(x, n, peak_of(x, n))


def address(x):
    return x.ctypes.data


def check_half():
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(1 << 16, np.float32)
    widen(len(every), address(every), address(wide))
    assert np.array_equal(wide, every.view(np.float16).astype(np.float32), equal_nan=True)
    # Halfway between neighbours, a little above and below, too large, too small, NaN.
    finite = np.sort(wide[np.isfinite(wide)]).astype(np.float64)
    middle = (finite[:-1] + finite[1:]) / 2
    x = np.concatenate([wide, middle, np.nextafter(middle.astype(np.float32), np.float32(9e9))])
    x = np.concatenate([x, [65519, 65520, 1e30, -1e30, 1e-30, np.inf, -np.inf, np.nan]])
    x = np.resize(x.astype(np.float32), -(-len(x) // 16) * 16)
    out = np.empty(len(x), np.uint16)
    narrow(len(x), address(x), address(out))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    assert np.array_equal(out.view(np.float16), expected, equal_nan=True)


def check_dots():
    rng = np.random.default_rng(7)
    for extreme in (False, True):
        for _ in range(20):
            nibbles = rng.integers(0, 256, 64).astype(np.uint8)
            w = rng.choice([-128, -127, 127] if extreme else range(-128, 128), 64).astype(np.int8)
            x = rng.choice([-127, 127] if extreme else range(-127, 128), 64).astype(np.int8)
            sums = x.astype(np.int32).reshape(16, 4).sum(axis=1).astype(np.int32)
            bias, out = -isa.Q8_BIAS * sums, np.empty((3, 16), np.int32)
            zero = np.zeros(16, np.int32)
            high = nibbles >> 4
            dots(*map(address, (nibbles, high, w, x, bias, zero, out)))
            for row, weights in zip(out, (nibbles & 15, high, w), strict=True):
                products = weights.astype(np.int64) * x
                assert row.tolist() == products.reshape(16, 4).sum(axis=1).tolist()


def check_exp():
    x = np.concatenate([np.linspace(-87, 0, 4080), [-1e30, -200, -88, -0.0]]).astype(np.float32)
    x = np.resize(x, -(-len(x) // 16) * 16)
    out = np.empty_like(x)
    exponentials(len(x), address(x), address(out))
    np.testing.assert_allclose(out, np.exp(np.maximum(x, -87.3)), rtol=3e-7)
    x[::16] = np.nan
    exponentials(len(x), address(x), address(out))
    assert np.array_equal(np.isnan(out), np.isnan(x))
    for n in (1, 15, 16, 17, 100):
        y = np.random.default_rng(n).standard_normal(n + 16).astype(np.float32) * 10
        expected = np.exp(y[:n].astype(np.float64) - y[:n].max())
        total = numerators(address(y), n)
        np.testing.assert_allclose(y[:n], expected, rtol=1e-5, atol=1e-37)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_half():
    check_half()


def test_dots():
    check_dots()


def test_exp():
    check_exp()


def written(path, mode):
    """Logits after passes of every kind: one token, 2 to 8, more of them, of one text or several.

    Among them a text that attention takes in parts.
    """
    passes = [[280], range(8), *([1] * n for n in range(1, 9))]  # tokens of each text
    rng, texts, logits = np.random.default_rng(14), [Sequence() for _ in range(8)], []
    options = RunOptions(mode=mode, backend="cpu", context=512, sequences=8, threads=2)
    with Engine(path, options) as llm:
        for new in passes:
            ids = [rng.integers(3, tiny.N_VOCAB, n).tolist() for n in new]
            chunks = [(text, some) for text, some in zip(texts, ids, strict=False) if some]
            logits.append(llm.feed(chunks, range(sum(new))[-32:], llm.no_counts()))
    return np.concatenate(logits)


def check_path(paths, target):
    """All that differs between instruction sets, in this process; saves what models say."""
    check_half()
    check_dots()
    check_exp()
    names = [name.upper() for name in paths]
    test_rows.check_rows([t for t in test_rows.TYPES if t.name in names])
    test_rows.check_sums(test_rows.SUMMED)
    modes = test_operators.MODES
    for path, mode, n_tok in itertools.product(paths.values(), modes, (1, 5)):
        test_operators.compare_operators(path, mode, n_tok)
    said = {f"{name}.{m}": written(path, m) for name, path in paths.items() for m in modes}
    np.savez(target, **said)


@pytest.mark.parametrize("name", [n for n in isa.available() if n != isa.ISA])
def test_lesser_paths(name, wide_gguf, tmp_path):
    """What other machines run, in a process that compiles for such a machine: the same bits.

    Integers are exact, and floats are added up in the same order, whatever the registers hold.
    """
    target = tmp_path / "said.npz"
    paths = {type_: str(wide_gguf(type_)) for type_ in ("f32", "f16", "q8_0", "q4_0", "q6_k")}
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from powerinfer.runtime.cpu import isa
isa.use({name!r})
import test_simd
test_simd.check_path({paths!r}, {str(target)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    said = np.load(target)
    for type_, mode in itertools.product(paths, test_operators.MODES):
        ours = written(paths[type_], mode)
        assert np.isfinite(ours).all()
        assert np.array_equal(said[f"{type_}.{mode}"], ours), (type_, mode)


def test_one_path_in_a_process():
    isa.use("auto")
    isa.use(isa.ISA)
    for name in ("amx", "avx512vnni", "avx2", "generic"):
        if name != isa.ISA:
            message = "made kernels for" if name in isa.available() else "cannot run"
            with pytest.raises(RequestError, match=message):
                isa.use(name)


@pytest.mark.skipif(isa.ISA == "generic", reason="this CPU has only the generic path")
def test_the_best_path_is_chosen():
    from llvmlite.binding import get_host_cpu_features

    has = get_host_cpu_features()
    is_wide = bool(has.get("avx512vnni") and has.get("avx512bw"))
    assert (isa.ISA in ("amx", "avx512vnni")) == is_wide == isa.HAS_VNNI
    assert isa.HAS_AMX == (isa.ISA == "amx") == ("amx" in isa.available())
