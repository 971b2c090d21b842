"""What kernels take: the argument structs of the .cu files as NumPy dtypes, and their launches.

The text of the .cu files is the one truth. A small parser reads their struct definitions; it
knows only what the conventions allow, and refuses the rest:

    // launch: grid (rows / 8, n_tok), block 256      one line; of the struct that is named next
    struct gemv_args { const float* x; Matrix w; int rows; float scale; long long stride; };
    extern "C" __global__ void __launch_bounds__(256) gemv_f16(const gemv_args p)

A struct X_args belongs to the kernels X, X_format and X_format_format. Kernels may be made by a
macro.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
COMMON = "common.cuh"
FORMATS = ("q4_0", "q8_0", "q6_k", "f16", "f32")
_UP_TO_TWO = rf"(_({'|'.join(FORMATS)})){{0,2}}"

_SCALARS = {"int": "<i4", "float": "<f4", "long long": "<i8"}
_POINTEES = {*_SCALARS, "unsigned char", "signed char", "unsigned short"}
_POINTER = np.dtype("<u8")  # nothing else is unsigned: a field of this type is a pointer

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STRUCT = re.compile(r"\bstruct\s+(\w+)\s*\{([^{}]*)\}\s*;")
_FIELD = re.compile(r"(?:const\s+)?(\w+(?:\s+\w+)*?)(?:\s*(\*)\s*|\s+)(\w+(?:\s*,\s*\w+)*)")
_LAUNCH = re.compile(r"//\s*launch:\s*(.*)")
_LAUNCH_FORM = re.compile(r"grid\b.*,\s*block\s+(\d+)\b.*")
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+__launch_bounds__\s*\([^)]*\)\s*'
    r"(\w+)\s*\(\s*const\s+(\w+)\s+\w+\s*\)"
)
_MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)\(([^)]*)\)((?:[^\n\\]|\\\n|\\.)*)", re.M)


class SourceError(ValueError):
    """A .cu file does not keep to the conventions; the message says where and how."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of a .cu file: `launch` is its comment ("grid (...), block N"), `block` is N."""

    name: str
    source: str  # name of the .cu file
    launch: str
    block: int  # threads
    struct: str  # name of the one struct that it takes by value
    arguments: np.dtype[np.void]  # that struct, laid out as in C


def arguments(kernel_name: str) -> np.dtype[np.void]:
    """Return the dtype of the struct that a kernel takes. KeyError if there is no such kernel."""
    return kernels()[kernel_name].arguments


def fill(kernel_name: str, **values: Any) -> np.ndarray:
    """Return the arguments of one launch, a structured array [1], from a value for every field.

    Pointers are integers, objects with an `address`, or None (null). Nested structs are mappings,
    sequences in the order of the fields, or objects with attributes of the fields' names.
    TypeError names what is missing, unknown, or not what the field holds.
    """
    filled = np.zeros(1, arguments(kernel_name))
    filled[0] = _struct(filled.dtype, values, kernel_name)
    return filled


def _struct(dtype: np.dtype[Any], value: Any, where: str) -> tuple[Any, ...]:
    names = dtype.names or ()
    if isinstance(value, Mapping):
        for kind, wrong in (
            ("takes no", [str(n) for n in value if n not in names]),
            ("lacks", [n for n in names if n not in value]),
        ):
            if wrong:
                raise TypeError(f"{where} {kind} {', '.join(wrong)}")
        parts = [value[name] for name in names]
    elif isinstance(value, list | tuple):
        if len(value) != len(names):
            raise TypeError(f"{where} has the fields {', '.join(names)}, not {len(value)} of them")
        parts = list(value)
    else:
        wrong = [n for n in names if not hasattr(value, n)]
        if wrong:
            raise TypeError(f"{where} lacks {', '.join(wrong)}: {type(value).__name__}")
        parts = [getattr(value, name) for name in names]
    return tuple(
        _field(dtype[name], part, f"{where}.{name}")
        for name, part in zip(names, parts, strict=True)
    )


def _field(dtype: np.dtype[Any], value: Any, where: str) -> Any:
    if dtype.names:
        return _struct(dtype, value, where)
    if dtype == _POINTER:
        value = 0 if value is None else getattr(value, "address", value)
    try:
        if dtype.kind == "f":
            return float(value)
        number = operator.index(value)
    except (TypeError, ValueError):
        kind = {"u": "an address", "i": "an integer", "f": "a number"}[dtype.kind]
        raise TypeError(f"{where} is {kind}, not {type(value).__name__}") from None
    info = np.iinfo(dtype)
    if not info.min <= number <= info.max:
        raise TypeError(f"{where} cannot hold {number}")
    return number


@functools.cache
def kernels(folder: Path = FOLDER) -> dict[str, Kernel]:
    """Return all kernels of the .cu files of a folder by name. SourceError, OSError."""
    common = (folder / COMMON).read_text("utf-8") if (folder / COMMON).exists() else ""
    found: dict[str, Kernel] = {}
    for path in sorted(folder.glob("*.cu")):
        for kernel in parse(path.read_text("utf-8"), path.name, common):
            if kernel.name in found:
                raise SourceError(
                    f"{kernel.name} is in {found[kernel.name].source} and {path.name}"
                )
            found[kernel.name] = kernel
    return found


def parse(text: str, source: str = "source", common: str = "") -> list[Kernel]:
    """Return the kernels of one .cu text; `common` holds structs nested in theirs. SourceError."""
    structs = {**_bodies(common), **_bodies(text)}
    launches = _launches(text, source)
    found = []
    for name, struct in _kernels(text):
        stem, is_args, rest = struct.partition("_args")
        if not is_args or rest or not re.fullmatch(stem + _UP_TO_TWO, name):
            raise SourceError(f"{source}: {name} takes {struct}, which is not named after it")
        if struct not in launches:
            raise SourceError(f"{source}: {name} lacks a comment '// launch: grid (...), block N'")
        launch, block = launches[struct]
        found.append(Kernel(name, source, launch, block, struct, _dtype(struct, structs, source)))
    return found


def _launches(text: str, source: str) -> dict[str, tuple[str, int]]:
    """Return {struct: (launch, block)}; a comment is about the struct that is named next."""
    found: dict[str, tuple[str, int]] = {}
    for comment in _COMMENT.finditer(text):
        m = _LAUNCH.fullmatch(comment[0])
        if m is None:
            continue
        launch, form = m[1].strip(), _LAUNCH_FORM.fullmatch(m[1].strip())
        struct = re.search(r"\w+_args\b", _COMMENT.sub(" ", text[comment.end() :]))
        if form is None or struct is None or struct[0] in found:
            raise SourceError(f"{source}: not 'grid (...), block N' of one kernel: '{launch}'")
        found[struct[0]] = launch, int(form[1])
    return found


def _kernels(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name of every kernel, and that of its struct."""
    text = _COMMENT.sub(" ", text)
    macros = {m[1]: (m[2], m[3].replace("\\\n", " ")) for m in _MACRO.finditer(text)}
    uses = "|".join(name for name, (_, body) in macros.items() if "__global__" in body) or "(?!)"
    text = _MACRO.sub("", text)
    for m in re.finditer(rf"{_KERNEL.pattern}|\b({uses})\s*\(([^()]*)\)", text):
        if m[3]:
            yield from _KERNEL.findall(_expanded(*macros[m[3]], m[4]))
        else:
            yield m[1], m[2]


def _expanded(parameters: str, body: str, given: str) -> str:
    """Return what a macro stands for, as the preprocessor has it: parameters, then ##."""
    names, values = ([part.strip() for part in s.split(",")] for s in (parameters, given))
    values_of = dict(zip(names, values, strict=False))
    body = re.sub(r"\w+", lambda word: values_of.get(word[0], word[0]), body)
    return re.sub(r"\s*##\s*", "", body)


def _bodies(text: str) -> dict[str, str]:
    """Return the fields of every plain struct of a text, unread."""
    return {m[1]: m[2] for m in _STRUCT.finditer(_COMMENT.sub(" ", text))}


def _dtype(struct: str, bodies: Mapping[str, str], source: str) -> np.dtype[np.void]:
    if struct not in bodies:
        raise SourceError(f"{source}: no plain struct {struct} {{ fields; }} is defined")
    fields: list[tuple[str, np.dtype[Any]]] = []
    for line in bodies[struct].split(";"):
        declaration = " ".join(line.split())
        if not declaration:
            continue
        m = _FIELD.fullmatch(declaration)
        if m is None or (m[2] and "," in m[3]):
            raise SourceError(f"{source}: cannot read '{declaration}' in {struct}")
        dtype: np.dtype[Any] | None
        if m[2]:
            dtype = _POINTER if m[1] in _POINTEES else None
        elif m[1] in bodies and m[1] != struct:
            dtype = _dtype(m[1], bodies, source)
        else:
            dtype = np.dtype(_SCALARS[m[1]]) if m[1] in _SCALARS else None
        if dtype is None:
            raise SourceError(f"{source}: '{declaration}' in {struct} is of no type known here")
        fields += [(name.strip(), dtype) for name in m[3].split(",")]
    try:
        return np.dtype(fields, align=True)
    except ValueError as error:  # a name twice
        raise SourceError(f"{source}: {struct}: {error}") from None
