"""Argument structs read from .cu text, held against a C++ compiler, and how they are filled."""

import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from powerinfer.runtime.cuda import arguments as module
from powerinfer.runtime.cuda.arguments import SourceError, arguments, fill, kernels, parse

COMMON = """
#pragma once
struct Half { unsigned short bits; float value() const { return 0; } };  // not ours to read
struct Matrix { const unsigned char* q; const unsigned char* d; int rows; int cols; };
struct Packed { signed char* q; float* d; int* s; };  // q [n_tok][cols]
struct Tiny { int only; };
"""
SOURCE = """
#include "common.cuh"
// y = w . x.  w [rows][cols], x [cols].  Bytes: w once.
// launch: grid ((rows + 7) / 8, n_tok), block 256
struct gemv_args {
    const float* x;   // [n_tok][cols]; see struct nothing { int a; };
    int rows;
    Matrix w;         /* two planes;
                         int not_a_field; */
    Tiny a, b;
    Packed p; float scale;
    long long stride;
    int last;
};
template <int N> __device__ float helper(const gemv_args p) { return 0; }
#define GEMV(FORMAT, N)                                                     \\
    extern "C" __global__ void __launch_bounds__(256) gemv_##FORMAT(        \\
        const gemv_args p) { helper<N>(p); }
GEMV(q4_0, 1)
GEMV(f16, 2)

// launch: grid (n_tok), block 32
struct norm_args { unsigned short* h; int n, m; };
extern "C" __global__ void
__launch_bounds__(32) norm(const norm_args p) { }
"""

PLAIN = 'extern "C" __global__ void __launch_bounds__(64) k(const k_args p) {}'


def one(fields, launch="// launch: grid (1), block 64", kernel=PLAIN):
    return parse(f"{launch}\nstruct k_args {{ {fields} }};\n{kernel}", "k.cu", COMMON)


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The module works on SOURCE in a folder of its own."""
    (tmp_path / "common.cuh").write_text(COMMON)
    (tmp_path / "gemv.cu").write_text(SOURCE)
    found = kernels(tmp_path)
    monkeypatch.setattr(module, "kernels", lambda: found)
    return found


def test_kernels_and_launches(made):
    assert {k.name: (k.source, k.launch, k.block) for k in made.values()} == {
        "gemv_q4_0": ("gemv.cu", "grid ((rows + 7) / 8, n_tok), block 256", 256),
        "gemv_f16": ("gemv.cu", "grid ((rows + 7) / 8, n_tok), block 256", 256),
        "norm": ("gemv.cu", "grid (n_tok), block 32", 32),
    }
    with pytest.raises(KeyError, match="gemv_q8_0"):
        arguments("gemv_q8_0")


def members(dtype, prefix=""):
    """Yield the C names of all members, nested ones too, with offset and size."""
    for name, (field, offset, *_) in (dtype.fields or {}).items():
        yield prefix + name, offset, field.itemsize
        for inner, at, size in members(field, f"{prefix}{name}."):
            yield inner, offset + at, size


def compiled_layout(definitions, found, folder):
    """Return the lines "kernel member offset size" as a C++ compiler lays out their structs."""
    lines = []
    for k in found:
        lines.append(f'printf("{k.name} . 0 %zu\\n", sizeof({k.struct}));')
        lines += [
            f'printf("{k.name} {m} %zu %zu\\n",'
            f" offsetof({k.struct}, {m}), sizeof((({k.struct}*)nullptr)->{m}));"
            for m, _, _ in members(k.arguments)
        ]
    program = f"#include <cstddef>\n#include <cstdio>\n{definitions}\n"
    (folder / "layout.cpp").write_text(program + "int main() {\n" + "\n".join(lines) + "\n}")
    command = ["g++", "-std=c++17", "-w", "-I", folder, "-o", folder / "a", folder / "layout.cpp"]
    subprocess.run(command, check=True)
    out = subprocess.run([folder / "a"], capture_output=True, text=True, check=True).stdout
    return out.splitlines()


def read_layout(found):
    """Return the same lines from the dtypes."""
    lines = []
    for k in found:
        lines.append(f"{k.name} . 0 {k.arguments.itemsize}")
        lines += [f"{k.name} {m} {offset} {size}" for m, offset, size in members(k.arguments)]
    return lines


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@needs_compiler
def test_layout_is_that_of_a_compiler(made, tmp_path):
    words = "#define __global__\n#define __device__\n#define __launch_bounds__(n)\n"
    found = list(made.values())
    assert len(read_layout(found)) > 40
    text = words + '#include "gemv.cu"'
    assert read_layout(found) == compiled_layout(text, found, tmp_path)


@needs_compiler
def test_layout_of_our_kernels(tmp_path):
    found = list(kernels().values())
    assert found
    bodies = dict(module._bodies((module.FOLDER / "common.cuh").read_text("utf-8")))
    for source in module.FOLDER.glob("*.cu"):
        bodies |= module._bodies(source.read_text("utf-8"))
    used = {*(k.struct for k in found), "Matrix", "Packed", "Rope"}
    text = "".join(f"struct {n} {{{body}}};\n" for n, body in bodies.items() if n in used)
    assert read_layout(found) == compiled_layout(text, found, tmp_path)


def test_every_kernel_of_ours_is_found():
    for source in module.FOLDER.glob("*.cu"):
        text = source.read_text("utf-8")
        mentioned = set(re.findall(r"struct (\w+_args)\b", text))
        assert mentioned == {k.struct for k in kernels().values() if k.source == source.name}


def test_fill(made):
    w = SimpleNamespace(q=1 << 40, d=None, rows=3, cols=np.int64(32), more="ignored")
    p = (SimpleNamespace(address=7), 8, 9)
    a, b = {"only": 1}, [2]
    args = fill(
        "gemv_q4_0", x=2**64 - 1, rows=-5, w=w, a=a, b=b, p=p, scale=0.1, stride=-(2**40), last=11
    )
    assert args.shape == (1,) and args.dtype == made["gemv_f16"].arguments
    a = args[0]
    assert a["x"] == 2**64 - 1 and a["rows"] == -5 and a["w"].tolist() == (1 << 40, 0, 3, 32)
    assert (a["a"]["only"], a["b"]["only"], a["p"].tolist()) == (1, 2, (7, 8, 9))
    assert a["scale"] == np.float32(0.1) and a["stride"] == -(2**40) and a["last"] == 11


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"h": 1, "n": 2}, "norm lacks m"),
        ({"h": 1, "n": 2, "m": 3, "o": 4, "q": 5}, "norm takes no o, q"),
        ({"h": 1, "n": 2.0, "m": 3}, "norm.n is an integer, not float"),
        ({"h": 1, "n": 2, "m": None}, "norm.m is an integer, not NoneType"),
        ({"h": 1, "n": 2**31, "m": 3}, "norm.n cannot hold 2147483648"),
        ({"h": -1, "n": 2, "m": 3}, "norm.h cannot hold -1"),
        ({"h": np.zeros(3), "n": 2, "m": 3}, "norm.h is an address, not ndarray"),
    ],
)
def test_wrong_values(made, values, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fill("norm", **values)


def test_wrong_nested_values(made):
    good = {"x": 1, "rows": 1, "w": (1, 2, 3, 4), "a": (1,), "b": (1,), "p": (1, 2, 3)}
    good |= {"scale": 1, "stride": 1, "last": 1}
    fill("gemv_f16", **good)
    for wrong, message in [
        ({"w": (1, 2, 3)}, "gemv_f16.w has the fields q, d, rows, cols, not 3 of them"),
        ({"w": {"q": 1, "d": 2, "rows": 3}}, "gemv_f16.w lacks cols"),
        ({"p": SimpleNamespace(q=1, d=2)}, "gemv_f16.p lacks s: SimpleNamespace"),
        ({"a": ("one",)}, "gemv_f16.a.only is an integer, not str"),
        ({"scale": "one"}, "gemv_f16.scale is a number, not str"),
    ]:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            fill("gemv_f16", **(good | wrong))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("double d;", "k.cu: 'double d' in k_args is of no type known here"),
        ("void* d;", "k.cu: 'void* d' in k_args is of no type known here"),
        ("unsigned d;", "k.cu: 'unsigned d' in k_args is of no type known here"),
        ("Other d;", "k.cu: 'Other d' in k_args is of no type known here"),
        ("k_args d;", "k.cu: 'k_args d' in k_args is of no type known here"),
        ("const Matrix* d;", "k.cu: 'const Matrix* d' in k_args is of no type known here"),
        ("float* a, b;", "k.cu: cannot read 'float* a, b' in k_args"),
        ("float** a;", "k.cu: cannot read 'float** a' in k_args"),
        ("int a[4];", "k.cu: cannot read 'int a[4]' in k_args"),
        ("int a : 4;", "k.cu: cannot read 'int a : 4' in k_args"),
        ("int a = 4;", "k.cu: cannot read 'int a = 4' in k_args"),
        ("int a; float a;", "k.cu: k_args: "),
        ("Half a;", "k.cu: 'Half a' in k_args is of no type known here"),
        ("int f() { return 1; }", "k.cu: no plain struct k_args { fields; } is defined"),
    ],
)
def test_unknown_fields_are_refused(fields, message):
    with pytest.raises(SourceError) as caught:
        one(fields)
    assert str(caught.value).startswith(message)


def test_launches_and_names_are_checked():
    (kernel,) = one("const unsigned char * a; int b ;", "//launch:  grid (3), block 64, shared 1")
    assert (kernel.launch, kernel.block) == ("grid (3), block 64, shared 1", 64)
    assert kernel.arguments.names == ("a", "b") and kernel.arguments.itemsize == 16
    for launch, message in [
        ("", "k.cu: k lacks a comment '// launch: grid (...), block N'"),
        ("// launch: block 64", "k.cu: not 'grid (...), block N' of one kernel: 'block 64'"),
        (
            "// launch: grid (1), block N",
            "k.cu: not 'grid (...), block N' of one kernel: 'grid (1)",
        ),
        ("/* // launch: grid (1), block 64 */", "k.cu: k lacks a comment"),
        ("// launch: grid (1), block 64\n" * 2, "k.cu: not 'grid (...), block N' of one kernel"),
    ]:
        with pytest.raises(SourceError, match=re.escape(message)):
            one("int a;", launch)
    assert one("int a;", kernel=PLAIN.replace(" k(", " k_q4_0_f16("))[0].struct == "k_args"
    for name, struct in (
        ("k2", "k_args"),
        ("k_q4_0_f16_f16", "k_args"),
        ("k", "k"),
        ("k", "k_argsk"),
    ):
        with pytest.raises(
            SourceError, match=f"{name} takes {struct}, which is not named after it"
        ):
            one("int a;", kernel=PLAIN.replace(" k(const k_args", f" {name}(const {struct}"))
    with pytest.raises(SourceError, match="of one kernel"):
        one("int a;", kernel=PLAIN + "// launch: grid (1), block 64")
    # The comment above another kernel is not this one's.
    other = "// launch: grid (1), block 64\nstruct j_args { int a; };"
    other += PLAIN.replace("k(const k_args", "j_f32(const j_args")
    with pytest.raises(SourceError, match=r"k\.cu: k lacks a comment"):
        one("int a;", "", kernel=other + PLAIN)


def test_one_macro_may_make_several_kernels():
    """Launch comments stand above the templates that such kernels call."""
    text = """
    struct a_args { int n; };
    // launch: grid (1), block 32
    template <class F> __device__ void a(const a_args& p) {}
    struct b_args { float x; };   // what
    // launch: grid (2), block 64
    // (not a_args)
    template <class F> __device__ void b(const b_args& p) {}
    #define BOTH(suffix, F)  \\
        extern "C" __global__ void __launch_bounds__(32) a_##suffix(const a_args p) { a<F>(p); } \\
        extern "C" __global__ void __launch_bounds__(64)  \\
            b_##suffix(const b_args p) { b<F>(p); }
    BOTH(f16, F16)
    BOTH(f32, F32)
    """
    found = [(k.name, k.struct, k.block) for k in parse(text)]
    assert found == [
        (f"{x}_{f}", f"{x}_args", block)
        for f in ("f16", "f32")
        for x, block in (("a", 32), ("b", 64))
    ]


def test_a_name_in_two_files(tmp_path):
    text = f"// launch: grid (1), block 64\nstruct k_args {{ int a; }};\n{PLAIN}"
    (tmp_path / "a.cu").write_text(text)
    (tmp_path / "b.cu").write_text(text)
    with pytest.raises(SourceError, match=r"k is in a\.cu and b\.cu"):
        kernels(tmp_path)
