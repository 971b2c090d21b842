"""Vectors, atomics and raw memory inside numba functions: one intrinsic per operation.

Addresses are plain integers (intp); the caller keeps the memory alive. Vectors are 512 bits wide
whatever the machine has: LLVM splits them where registers are narrower. Only the integer dot
products differ by instruction set.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from .isa import HAS_HALF, HAS_VNNI, ISA
from .llvm import (
    F32x16,
    I8x64,
    I32x16,
    call,
    constant,
    float32,
    float_,
    half,
    half_to_float,
    i8,
    i16,
    i32,
    i64,
    int32,
    int64,
    intp,
    load,
    load_half,
    offset,
    op,
    shuffle,
    splat_to,
    store_half,
    void,
)

# -- memory -----------------------------------------------------------------------------------


@op(int64, intp)
def load_i64(b, address):
    return load(b, address, i64)


@op(int32, intp)
def load_i32(b, address):
    return load(b, address, i32)


@op(types.uint8, intp)
def load_u8(b, address):
    return load(b, address, i8)


@op(float32, intp)
def load_f32(b, address):
    return load(b, address, float_)


@op(float32, intp)
def load_f16(b, address):
    """Load a half-precision number as float32."""
    return load_half(b, address)


@op(float32, intp)
def load_bf16(b, address):
    wide = b.zext(load(b, address, i16), i32)
    return b.bitcast(b.shl(wide, ir.Constant(i32, 16)), float_)


@op(void, intp, float32)
def store_f32(b, address, x):
    b.store(x, b.inttoptr(address, float_.as_pointer()), align=1)


@op(void, intp, float32)
def store_f16(b, address, x):
    """Store float32 rounded to half precision, half to even."""
    store_half(b, address, x)


@op(void, intp, int32)
def store_i32(b, address, x):
    b.store(x, b.inttoptr(address, i32.as_pointer()), align=1)


@op(void, intp, int64)
def store_i64(b, address, x):
    b.store(x, b.inttoptr(address, i64.as_pointer()), align=1)


@op(void, intp, intp)
def copy_u16(b, to, address):
    b.store(load(b, address, i16), b.inttoptr(to, i16.as_pointer()), align=1)


@op(intp)
def stack_4k(b):
    """Return the address of 4096 bytes that last as long as the function; a multiple of 64."""
    with b.goto_entry_block():
        memory = b.alloca(ir.ArrayType(i8, 4096))
    memory.align = 64
    return b.ptrtoint(memory, i64)


@op(void, intp, types.uint8)
def store_u8(b, address, x):
    b.store(x, b.inttoptr(address, i8.as_pointer()), align=1)


@op(F32x16, intp)
def load_f32x16(b, address):
    return load(b, address, F32x16.llvm)


@op(F32x16, intp)
def load_f16x16(b, address):
    return load_half(b, address, 16)


@op(F32x16, intp)
def load_bf16x16(b, address):
    wide = b.zext(load(b, address, ir.VectorType(i16, 16)), I32x16.llvm)
    return b.bitcast(b.shl(wide, constant(I32x16.llvm, 16)), F32x16.llvm)


@op(I32x16, intp)
def load_i32x16(b, address):
    return load(b, address, I32x16.llvm)


@op(I8x64, intp)
def load_i8x64(b, address):
    return load(b, address, I8x64.llvm)


@op(F32x16, intp)
def load_i8x16(b, address):
    """Load 16 signed bytes as float32."""
    return b.sitofp(load(b, address, ir.VectorType(i8, 16)), F32x16.llvm)


@op(void, intp, F32x16)
def store_f32x16(b, address, x):
    b.store(x, b.inttoptr(address, F32x16.llvm.as_pointer()), align=1)


@op(void, intp, F32x16)
def store_f16x16(b, address, x):
    store_half(b, address, x)


@op(void, intp, I32x16)
def store_i32x16(b, address, x):
    b.store(x, b.inttoptr(address, I32x16.llvm.as_pointer()), align=1)


@op(void, intp, F32x16)
def store_i8x16(b, address, x):
    """Store 16 whole numbers between -128 and 127 as signed bytes."""
    bytes_ = ir.VectorType(i8, 16)
    narrow = b.trunc(b.fptosi(x, I32x16.llvm), bytes_)
    b.store(narrow, b.inttoptr(address, bytes_.as_pointer()), align=1)


def _prefetch(b: Any, address: Any, locality: int) -> None:
    read, keep, data = (ir.Constant(i32, n) for n in (0, locality, 1))
    pointer = b.inttoptr(address, i8.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)


@op(void, intp)
def prefetch(b, address):
    """Ask for the cache line at an address, which may be any."""
    _prefetch(b, address, 3)


@op(void, intp)
def prefetch_far(b, address):
    """The same into the second cache."""
    _prefetch(b, address, 2)


@op(I32x16, intp)
def load_u8x16(b, address):
    """Load 16 unsigned bytes as int32."""
    return b.zext(load(b, address, ir.VectorType(i8, 16)), I32x16.llvm)


# -- integer arithmetic -----------------------------------------------------------------------


@op(I32x16, int32)
def splat_i32(b, x):
    """Return a vector of 16 times `x`."""
    return splat_to(b, x, I32x16.llvm)


@op(I32x16, I32x16, I32x16)
def add_i32(b, x, y):
    return b.add(x, y)


@op(I32x16, I32x16, I32x16)
def sub_i32(b, x, y):
    return b.sub(x, y)


@op(I32x16, I32x16, int32)
def and_i32(b, x, mask):
    return b.and_(x, splat_to(b, mask, I32x16.llvm))


def _four(b: Any, numbers: tuple[Any, ...], mask: int) -> Any:
    total = constant(I32x16.llvm, 0)
    for i, x in enumerate(numbers):
        byte = b.and_(x, constant(x.type, mask))
        total = b.or_(total, b.shl(byte, constant(x.type, 8 * i)))
    return total


@op(I32x16, I32x16, I32x16, I32x16, I32x16)
def four_bytes(b, x0, x1, x2, x3):
    """Put the lowest bytes of four numbers into one, the first lowest."""
    return _four(b, (x0, x1, x2, x3), 255)


@op(I32x16, I32x16, I32x16, I32x16, I32x16)
def four_digits(b, x0, x1, x2, x3):
    """The same with signed bytes that are the lowest 7 bits, less 64."""
    digits = b.bitcast(_four(b, (x0, x1, x2, x3), 127), I8x64.llvm)
    return b.bitcast(b.sub(digits, constant(I8x64.llvm, 64)), I32x16.llvm)


@op(I32x16, I32x16, int32)
def sub_bytes(b, x, n):
    """Subtract n from each of the 64 bytes."""
    every = splat_to(b, b.trunc(n, i8), I8x64.llvm)
    return b.bitcast(b.sub(b.bitcast(x, I8x64.llvm), every), I32x16.llvm)


@op(I32x16, I32x16, I32x16)
def or_i32(b, x, y):
    return b.or_(x, y)


@op(I32x16, I32x16, int32)
def shift_right(b, x, n):
    return b.lshr(x, splat_to(b, n, I32x16.llvm))


@op(I32x16, I32x16, int32)
def shift_right_signed(b, x, n):
    return b.ashr(x, splat_to(b, n, I32x16.llvm))


@op(I32x16, I32x16, int32)
def shift_left(b, x, n):
    return b.shl(x, splat_to(b, n, I32x16.llvm))


@op(I32x16, int32)
def low_bits(b, x):
    """Return bit j of x in lane j, as 0 or 1."""
    lanes = ir.Constant(I32x16.llvm, list(range(16)))
    return b.and_(b.lshr(splat_to(b, x, I32x16.llvm), lanes), constant(I32x16.llvm, 1))


# -- float arithmetic -------------------------------------------------------------------------


@op(F32x16, float32)
def splat(b, x):
    """Return a vector of 16 times `x`."""
    return splat_to(b, x, F32x16.llvm)


@op(F32x16, F32x16, F32x16)
def add(b, x, y):
    return b.fadd(x, y)


@op(F32x16, F32x16, F32x16)
def sub(b, x, y):
    return b.fsub(x, y)


@op(F32x16, F32x16, F32x16)
def mul(b, x, y):
    return b.fmul(x, y)


@op(F32x16, F32x16, F32x16)
def divide(b, x, y):
    return b.fdiv(x, y)


@op(F32x16, F32x16, F32x16, F32x16)
def fma(b, x, y, z):
    """x * y + z, rounded once."""
    return call(b, "llvm.fma.v16f32", F32x16.llvm, x, y, z)


@op(float32, float32, float32, float32)
def fma1(b, x, y, z):
    """x * y + z of single numbers, rounded once."""
    return call(b, "llvm.fma.f32", float_, x, y, z)


@op(F32x16, F32x16, F32x16)
def maximum(b, x, y):
    """The larger of x and y; NaN where x is."""
    return b.select(b.fcmp_ordered(">", y, x), y, x)


@op(F32x16, F32x16, F32x16)
def largest_magnitude(b, x, y):
    """The larger of |x| and y, which is not negative; NaN where either is."""
    # Magnitudes are in the order of their bits, NaN above all.
    bits = b.and_(b.bitcast(x, I32x16.llvm), constant(I32x16.llvm, 0x7FFFFFFF))
    others = b.bitcast(y, I32x16.llvm)
    return b.bitcast(b.select(b.icmp_signed(">", bits, others), bits, others), F32x16.llvm)


@op(F32x16, F32x16)
def absolute(b, x):
    return call(b, "llvm.fabs.v16f32", F32x16.llvm, x)


@op(F32x16, F32x16)
def rint(b, x):
    """Round to whole numbers, half to even."""
    return call(b, "llvm.rint.v16f32", F32x16.llvm, x)


@op(F32x16, F32x16, F32x16)
def times_power_of_2(b, x, n):
    """x * 2^n for whole n in [-126, 127]: n is put into the exponent bits."""
    bits = b.add(b.fptosi(n, I32x16.llvm), constant(I32x16.llvm, 127))
    return b.fmul(x, b.bitcast(b.shl(bits, constant(I32x16.llvm, 23)), F32x16.llvm))


@op(float32, F32x16)
def sum16(b, x):
    """Add the 16 elements, by halves: always in the same order."""
    n = 16
    while n > 1:
        n //= 2
        low = shuffle(b, x, x, list(range(n)))
        high = shuffle(b, x, x, list(range(n, 2 * n)))
        x = b.fadd(low, high)
    return b.extract_element(x, ir.Constant(i32, 0))


def _largest(b: Any, x: Any, is_more: Callable[[Any, Any], Any]) -> Any:
    n = 16
    while n > 1:
        n //= 2
        low = shuffle(b, x, x, list(range(n)))
        high = shuffle(b, x, x, list(range(n, 2 * n)))
        x = b.select(is_more(low, high), low, high)
    return b.extract_element(x, ir.Constant(i32, 0))


@op(float32, F32x16)
def max16(b, x):
    """Return the largest of the 16 elements; NaN among them may be passed over."""
    return _largest(b, x, lambda low, high: b.fcmp_ordered(">", low, high))


@op(float32, F32x16)
def max16_magnitude(b, x):
    """Return the largest of 16 elements that are not negative; NaN if one is."""
    bits = b.bitcast(x, I32x16.llvm)
    largest = _largest(b, bits, lambda low, high: b.icmp_signed(">", low, high))
    return b.bitcast(largest, float_)


# -- flags: one byte for each of 16 lanes ------------------------------------------------------

_BYTES = ir.VectorType(i8, 16)


def _store_flags(b: Any, flags: Any, are_set: Any) -> None:
    b.store(b.zext(are_set, _BYTES), b.inttoptr(flags, _BYTES.as_pointer()), align=1)


@op(void, intp, F32x16, F32x16)
def store_not_below(b, flags, x, y):
    """flags [16] = x >= y, as 0 or 1; 1 where x is NaN."""
    _store_flags(b, flags, b.fcmp_unordered(">=", x, y))


@op(F32x16, F32x16, F32x16)
def where_not_below(b, x, y):
    """x where x >= y or x is NaN, else 0."""
    return b.select(b.fcmp_unordered(">=", x, y), x, constant(F32x16.llvm, 0.0))


@op(void, intp, F32x16)
def store_not_zero(b, flags, x):
    """flags [16] = x != 0, as 0 or 1."""
    _store_flags(b, flags, b.fcmp_unordered("!=", x, constant(F32x16.llvm, 0.0)))


@op(int64, intp, intp, int32)
def append_numbers(b, numbers, flags, first):
    """Append first + lane at `numbers` for the lanes that have a flag [16]; return how many.

    There must be room for 16; behind what is appended anything may be written.
    """
    vector = I32x16.llvm
    is_set = b.icmp_signed("!=", load(b, flags, _BYTES), constant(_BYTES, 0))
    lanes = b.add(splat_to(b, first, vector), ir.Constant(vector, list(range(16))))
    # All 16 lanes are stored: to store just those that are set takes AMD's cores 100 times as long.
    name, rest = "llvm.experimental.vector.compress.v16i32", ir.Constant(vector, ir.Undefined)
    packed = call(b, name, vector, lanes, is_set, rest)
    b.store(packed, b.inttoptr(numbers, vector.as_pointer()), align=1)
    return call(b, "llvm.ctpop.i64", i64, b.zext(b.bitcast(is_set, i16), i64))


@op(int64, int64)
def count_ones(b, x):
    return call(b, "llvm.ctpop.i64", i64, x)


# -- integer dot products ---------------------------------------------------------------------


@op(F32x16, I32x16)
def to_f32(b, x):
    return b.sitofp(x, F32x16.llvm)


@op(I32x16, F32x16)
def to_i32(b, x):
    """Round to int32, half to even; what does not fit, or is no number, becomes any int32."""
    return call(b, "llvm.lrint.v16i32.v16f32", I32x16.llvm, x)


@op(I32x16, I32x16, int32)
def scale_i32(b, x, factor):
    """x * factor."""
    return b.mul(x, splat_to(b, factor, I32x16.llvm))


@op(I8x64, I8x64)
def low_nibbles(b, x):
    return b.and_(x, constant(I8x64.llvm, 15))


def _halves(b: Any, x: Any) -> tuple[Any, Any]:
    n = x.type.count // 2
    return shuffle(b, x, x, list(range(n))), shuffle(b, x, x, list(range(n, 2 * n)))


def join(b: Any, x: Any, y: Any) -> Any:
    return shuffle(b, x, y, list(range(2 * x.type.count)))


def _dot4_generic(b: Any, x: Any, y: Any, extend_x: Any) -> Any:
    """Sums of 4 neighbouring products, in plain LLVM operations."""
    wide = ir.VectorType(i16, 64)
    product = b.mul(extend_x(x, wide), b.sext(y, wide))  # at most 255 * 128: fits when signed
    product = b.sext(product, ir.VectorType(i32, 64))
    even, odd = (shuffle(b, product, product, list(range(k, 64, 2))) for k in (0, 1))
    pairs = b.add(even, odd)
    even, odd = (shuffle(b, pairs, pairs, list(range(k, 32, 2))) for k in (0, 1))
    return b.add(even, odd)


def _dot4_avx2(b: Any, unsigned: Any, signed: Any) -> Any:
    """The same by vpmaddubsw and vpmaddwd; sums of two products must fit int16."""
    ones = constant(ir.VectorType(i16, 16), 1)
    sums = []
    for u, s in zip(_halves(b, unsigned), _halves(b, signed), strict=True):
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(i16, 16), u, s)
        sums.append(call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(i32, 8), pairs, ones))
    return join(b, sums[0], sums[1])


def _vpdpbusd(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    u, s = b.bitcast(unsigned, I32x16.llvm), b.bitcast(signed, I32x16.llvm)
    return call(b, "llvm.x86.avx512.vpdpbusd.512", I32x16.llvm, total, u, s)


def dot_unsigned(b: Any, total: Any, w: Any, x: Any) -> Any:
    if HAS_VNNI:
        return _vpdpbusd(b, total, w, x)
    if ISA == "avx2":
        return b.add(total, _dot4_avx2(b, w, x))
    return b.add(total, _dot4_generic(b, w, x, b.zext))


def dot_signed(b: Any, total: Any, w: Any, x: Any) -> Any:
    if HAS_VNNI:
        return _vpdpbusd(b, total, b.xor(w, constant(I8x64.llvm, -128)), x)
    if ISA == "avx2":
        # |w| * (x with the sign of w): x is within +-127, so that pairs fit int16.
        zero = constant(I8x64.llvm, 0)
        negative = b.icmp_signed("<", w, zero)
        magnitude = b.select(negative, b.sub(zero, w), w)  # -128 becomes 128 as unsigned
        return b.add(total, _dot4_avx2(b, magnitude, b.select(negative, b.sub(zero, x), x)))
    return b.add(total, _dot4_generic(b, w, x, b.sext))


@op(I32x16, I32x16, I8x64, I8x64)
def dot_nibbles(b, total, nibbles, x):
    """total + sums of 4 neighbouring products of unsigned and signed bytes.

    The former are at most 127; or the latter are from -64 to 64: two products must fit int16.
    """
    return dot_unsigned(b, total, nibbles, x)


@op(I32x16, I32x16, I8x64, I8x64)
def dot_bytes(b, total, w, x):
    """total + sums of 4 neighbouring products of signed bytes, plus Q8_BIAS * (sums of x).

    x must not be -128.
    """
    return dot_signed(b, total, w, x)


@op(void, I32x16, intp, intp)
def store_sums(b, x, at, stride):
    """Store the sum of the first 8, and 4 times that of the first 4 and of the next 4.

    And of the others at + stride.
    """
    for n in (8, 4):
        even, odd = (shuffle(b, x, x, list(range(k, 2 * n, 2))) for k in (0, 1))
        x = b.add(even, odd)
    for i in range(2):
        first, last = (b.extract_element(x, ir.Constant(i32, 2 * i + k)) for k in (0, 1))
        four_times = (b.shl(half, ir.Constant(i32, 2)) for half in (first, last))
        for k, value in enumerate((b.add(first, last), *four_times)):
            where = offset(b, at if i == 0 else b.add(at, stride), 4 * k)
            b.store(value, b.inttoptr(where, i32.as_pointer()), align=1)


def halves_to_float(b: Any, bits: Any) -> Any:
    """Return the float32 of int16 that are halves."""
    if HAS_HALF:
        n = bits.type.count
        return b.fpext(b.bitcast(bits, ir.VectorType(half, n)), ir.VectorType(float_, n))
    return half_to_float(b, bits)


def words_to_bits(b: Any, addresses: list[Any]) -> Any:
    """Load 2 bytes from each of some addresses (a multiple of 4, or 2) side by side."""
    # Put together in integer registers: the vector units have enough to do.
    words = []
    for first in range(0, len(addresses), 4):
        word = ir.Constant(i64, 0)
        for i, address in enumerate(addresses[first : first + 4]):
            bits = b.zext(load(b, address, i16), i64)
            word = b.or_(word, b.shl(bits, ir.Constant(i64, 16 * i)))
        words.append(word)
    vector = ir.Constant(ir.VectorType(i64, len(words)), ir.Undefined)
    for i, word in enumerate(words):
        vector = b.insert_element(vector, word, ir.Constant(i32, i))
    bits = b.bitcast(vector, ir.VectorType(i16, 4 * len(words)))
    return shuffle(b, bits, bits, list(range(len(addresses))))


# -- threads ----------------------------------------------------------------------------------


@op(int64, intp)
def atomic_load(b, address):
    return b.load_atomic(b.inttoptr(address, i64.as_pointer()), "acquire", 8)


@op(void, intp, int64)
def atomic_store(b, address, x):
    b.store_atomic(x, b.inttoptr(address, i64.as_pointer()), "release", 8)


@op(int64, intp, int64)
def atomic_add(b, address, x):
    """Add and return what was there before."""
    return b.atomic_rmw("add", b.inttoptr(address, i64.as_pointer()), x, "acq_rel")


@op(types.boolean, intp, int64, int64)
def compare_and_swap(b, address, expected, new):
    """Store `new` if `expected` is there; return whether it was."""
    pointer = b.inttoptr(address, i64.as_pointer())
    return b.extract_value(b.cmpxchg(pointer, expected, new, "acq_rel", "acquire"), 1)


@op(void)
def pause(b):
    """Tell the core that this is a spin loop."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        call(b, "llvm.x86.sse2.pause", ir.VoidType())


@op(void)
def yield_core(b):
    """Let another thread run on this core, if one wants to."""
    call(b, "SwitchToThread" if os.name == "nt" else "sched_yield", i32)


def _call(b: Any, function: Any, args: list[Any]) -> None:
    type_ = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    b.call(b.inttoptr(function, type_.as_pointer()), args)


@op(void, intp, intp, intp, intp, intp)
def call_job(b, function, args, control, epoch, thread):
    """Call the compiled function at address `function` with the other four arguments."""
    _call(b, function, [args, control, epoch, thread])


def _caller(n_args: int) -> Any:
    @op(void, *[intp] * (1 + n_args))
    def call_kernel(b, function, *args):
        """Call the kernel at address `function` with its arguments."""
        _call(b, function, list(args))

    return call_kernel


# One for each table of kernels; what their arguments are, it says there.
call_dots, call_axpys, call_widen = _caller(11), _caller(9), _caller(6)
call_few, call_unpack, call_multiply = _caller(9), _caller(6), _caller(7)
