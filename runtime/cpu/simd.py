"""Vectors, atomics and raw memory inside numba functions.

A thin layer over LLVM: vector types as numba types, and one intrinsic per operation. Addresses
are plain integers (intp); the caller keeps the memory alive. Vectors are 512 bits wide whatever
the machine has: LLVM splits them where registers are narrower. Only the integer dot products
differ by instruction set; ISA says which one this process uses, chosen from the CPU's features
(never its name: a kernel that needs a missing feature aborts the process inside LLVM).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import config, types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic

# -- instruction set --------------------------------------------------------------------------


def _choose_isa() -> str:
    if config.CPU_NAME or config.CPU_FEATURES:  # the user told numba to target something else
        return "generic"
    has = llvmlite.binding.get_host_cpu_features()
    if all(has.get(f) for f in ("avx512f", "avx512bw", "avx512vl", "avx512vnni")):
        return "avx512vnni"
    if all(has.get(f) for f in ("avx2", "fma", "f16c")):
        return "avx2"
    return "generic"


ISA = _choose_isa()
# vpdpbusd multiplies unsigned by signed bytes: signed weights are shifted by 128 there, and the
# accumulator starts at -128 * sum(x). The other paths multiply signed bytes as they are.
Q8_BIAS = 128 if ISA == "avx512vnni" else 0

# Without instructions for it LLVM would call a helper that the process does not have.
_HAS_HALF = ISA != "generic" or platform.machine().lower() in ("arm64", "aarch64")

# -- types ------------------------------------------------------------------------------------


class Vector(types.Type):
    """numba type of an LLVM vector of `n` elements."""

    def __init__(self, element: ir.Type, n: int) -> None:
        self.llvm = ir.VectorType(element, n)
        super().__init__(name=f"Vector({element}, {n})")


@register_default(Vector)
class _VectorModel(PrimitiveModel):  # type: ignore[misc]  # numba has no type hints
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


_i8, _i16, _i32, _i64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_half, _float = ir.HalfType(), ir.FloatType()

F32x16 = Vector(_float, 16)
I32x16 = Vector(_i32, 16)
I8x64 = Vector(_i8, 64)
intp, int32, int64, float32, void = types.intp, types.int32, types.int64, types.float32, types.void


def _op(result: Any, *params: Any) -> Callable[[Callable[..., Any]], Any]:
    """Turn `f(builder, *llvm_values)` into an intrinsic with the given numba types."""

    def decorate(build: Callable[..., Any]) -> Any:
        signature = result(*params)

        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = build(builder, *args)
            return _context.get_dummy_value() if result is void else value

        made: Callable[..., Any]
        # numba reads the number of parameters off the function's own signature.
        match len(params):
            case 0:

                def made(typingctx):
                    return signature, codegen
            case 1:

                def made(typingctx, a):
                    return signature, codegen
            case 2:

                def made(typingctx, a, b):
                    return signature, codegen
            case 3:

                def made(typingctx, a, b, c):
                    return signature, codegen
            case 4:

                def made(typingctx, a, b, c, d):
                    return signature, codegen
            case _:

                def made(typingctx, a, b, c, d, e):
                    return signature, codegen

        made.__name__ = made.__qualname__ = build.__name__
        made.__doc__ = build.__doc__
        return intrinsic(made)

    return decorate


def _constant(vector: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _call(b: Any, name: str, result: ir.Type, *args: Any) -> Any:
    """Call the LLVM intrinsic or external function `name`."""
    type_ = ir.FunctionType(result, [a.type for a in args])
    function = b.module.globals.get(name) or ir.Function(b.module, type_, name)
    return b.call(function, args)


def _shuffle(b: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_i32, len(lanes)), lanes))


def _load(b: Any, address: Any, type_: ir.Type) -> Any:
    return b.load(b.inttoptr(address, type_.as_pointer()), align=1)


def _offset(b: Any, address: Any, n: int) -> Any:
    return b.add(address, ir.Constant(address.type, n))


def _same_shape(value: Any, element: ir.Type) -> Any:
    """Return the type of `element`s in the shape (vector or single) of `value`."""
    type_ = value.type
    return ir.VectorType(element, type_.count) if isinstance(type_, ir.VectorType) else element


def _filled(type_: Any, value: Any) -> Any:
    """Return a constant of a vector or a single number."""
    return (
        _constant(type_, value) if isinstance(type_, ir.VectorType) else ir.Constant(type_, value)
    )


def _load_half(b: Any, address: Any, n: int | None = None) -> Any:
    """Load a half, or a vector of n, as float32."""
    if _HAS_HALF:
        half = _half if n is None else ir.VectorType(_half, n)
        value = _load(b, address, half)
        return b.fpext(value, _same_shape(value, _float))
    return _half_to_float(b, _load(b, address, _i16 if n is None else ir.VectorType(_i16, n)))


def _store_half(b: Any, address: Any, x: Any) -> None:
    """Store float32, rounded half to even, as halves."""
    half = b.fptrunc(x, _same_shape(x, _half)) if _HAS_HALF else _float_to_half(b, x)
    b.store(half, b.inttoptr(address, half.type.as_pointer()), align=1)


def _half_to_float(b: Any, bits: Any) -> Any:
    """Widen the bits of halves (i16) without instructions for it.

    Exponent and mantissa are moved into place and scaled by 2^112, the difference of the biases:
    exact for subnormals too. Infinity and NaN get the exponent that the scaling did not reach.
    """
    int_, float_ = _same_shape(bits, _i32), _same_shape(bits, _float)
    wide = b.zext(bits, int_)
    rest = b.shl(b.and_(wide, _filled(int_, 0x7FFF)), _filled(int_, 13))
    value = b.bitcast(b.fmul(b.bitcast(rest, float_), _filled(float_, 2.0**112)), int_)
    is_special = b.icmp_unsigned(">=", rest, _filled(int_, 0x7C00 << 13))
    value = b.select(is_special, b.or_(rest, _filled(int_, 0xFF << 23)), value)
    sign = b.shl(b.and_(wide, _filled(int_, 0x8000)), _filled(int_, 16))
    return b.bitcast(b.or_(value, sign), float_)


def _float_to_half(b: Any, x: Any) -> Any:
    """Round float32 to the bits of halves (i16), half to even, without instructions for it.

    After Marat Dukhan's FP16 library: a number of the right magnitude is added whose last bit is
    the half's, so that the float adder does the rounding.
    """
    int_, float_ = _same_shape(x, _i32), _same_shape(x, _float)
    bits = b.bitcast(x, int_)
    magnitude = b.bitcast(b.and_(bits, _filled(int_, 0x7FFFFFFF)), float_)
    base = b.fmul(b.fmul(magnitude, _filled(float_, 2.0**112)), _filled(float_, 2.0**-110))
    doubled = b.add(bits, bits)  # without the sign
    bias = b.and_(doubled, _filled(int_, -0x1000000))
    lowest = _filled(int_, 0x71000000)
    bias = b.select(b.icmp_unsigned("<", bias, lowest), lowest, bias)
    shifted = b.add(b.lshr(bias, _filled(int_, 1)), _filled(int_, 0x07800000))
    rounded = b.bitcast(b.fadd(b.bitcast(shifted, float_), base), int_)
    exponent = b.and_(b.lshr(rounded, _filled(int_, 13)), _filled(int_, 0x7C00))
    value = b.add(exponent, b.and_(rounded, _filled(int_, 0x0FFF)))
    is_nan = b.icmp_unsigned(">", doubled, _filled(int_, -0x1000000))
    value = b.select(is_nan, _filled(int_, 0x7E00), value)
    sign = b.and_(b.lshr(bits, _filled(int_, 16)), _filled(int_, 0x8000))
    return b.trunc(b.or_(value, sign), _same_shape(x, _i16))


# -- memory -----------------------------------------------------------------------------------


@_op(int64, intp)
def load_i64(b, address):
    return _load(b, address, _i64)


@_op(int32, intp)
def load_i32(b, address):
    return _load(b, address, _i32)


@_op(types.uint8, intp)
def load_u8(b, address):
    return _load(b, address, _i8)


@_op(float32, intp)
def load_f32(b, address):
    return _load(b, address, _float)


@_op(float32, intp)
def load_f16(b, address):
    """Load a half-precision number as float32."""
    return _load_half(b, address)


@_op(float32, intp)
def load_bf16(b, address):
    wide = b.zext(_load(b, address, _i16), _i32)
    return b.bitcast(b.shl(wide, ir.Constant(_i32, 16)), _float)


@_op(void, intp, float32)
def store_f32(b, address, x):
    b.store(x, b.inttoptr(address, _float.as_pointer()), align=1)


@_op(void, intp, float32)
def store_f16(b, address, x):
    """Store float32 rounded to half precision, half to even."""
    _store_half(b, address, x)


@_op(void, intp, int32)
def store_i32(b, address, x):
    b.store(x, b.inttoptr(address, _i32.as_pointer()), align=1)


@_op(void, intp, types.uint8)
def store_u8(b, address, x):
    b.store(x, b.inttoptr(address, _i8.as_pointer()), align=1)


@_op(F32x16, intp)
def load_f32x16(b, address):
    return _load(b, address, F32x16.llvm)


@_op(F32x16, intp)
def load_f16x16(b, address):
    return _load_half(b, address, 16)


@_op(F32x16, intp)
def load_bf16x16(b, address):
    wide = b.zext(_load(b, address, ir.VectorType(_i16, 16)), I32x16.llvm)
    return b.bitcast(b.shl(wide, _constant(I32x16.llvm, 16)), F32x16.llvm)


@_op(I32x16, intp)
def load_i32x16(b, address):
    return _load(b, address, I32x16.llvm)


@_op(I8x64, intp)
def load_i8x64(b, address):
    return _load(b, address, I8x64.llvm)


@_op(F32x16, intp)
def load_i8x16(b, address):
    """Load 16 signed bytes as float32."""
    return b.sitofp(_load(b, address, ir.VectorType(_i8, 16)), F32x16.llvm)


@_op(void, intp, F32x16)
def store_f32x16(b, address, x):
    b.store(x, b.inttoptr(address, F32x16.llvm.as_pointer()), align=1)


@_op(void, intp, F32x16)
def store_f16x16(b, address, x):
    _store_half(b, address, x)


@_op(void, intp, I32x16)
def store_i32x16(b, address, x):
    b.store(x, b.inttoptr(address, I32x16.llvm.as_pointer()), align=1)


@_op(void, intp, F32x16)
def store_i8x16(b, address, x):
    """Store 16 whole numbers between -128 and 127 as signed bytes."""
    bytes_ = ir.VectorType(_i8, 16)
    narrow = b.trunc(b.fptosi(x, I32x16.llvm), bytes_)
    b.store(narrow, b.inttoptr(address, bytes_.as_pointer()), align=1)


@_op(void, intp)
def prefetch(b, address):
    """Ask for the cache line at `address`; any address is fine."""
    pointer = b.inttoptr(address, _i8.as_pointer())
    read, keep, data = (ir.Constant(_i32, n) for n in (0, 3, 1))
    _call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)


# -- float arithmetic -------------------------------------------------------------------------


@_op(F32x16, float32)
def splat(b, x):
    """Return a vector of 16 times `x`."""
    one = b.insert_element(ir.Constant(F32x16.llvm, ir.Undefined), x, ir.Constant(_i32, 0))
    return _shuffle(b, one, one, [0] * 16)


@_op(F32x16, F32x16, F32x16)
def add(b, x, y):
    return b.fadd(x, y)


@_op(F32x16, F32x16, F32x16)
def sub(b, x, y):
    return b.fsub(x, y)


@_op(F32x16, F32x16, F32x16)
def mul(b, x, y):
    return b.fmul(x, y)


@_op(F32x16, F32x16, F32x16)
def div(b, x, y):
    return b.fdiv(x, y)


@_op(F32x16, F32x16, F32x16, F32x16)
def fma(b, x, y, z):
    """x * y + z, rounded once."""
    return _call(b, "llvm.fma.v16f32", F32x16.llvm, x, y, z)


@_op(float32, float32, float32, float32)
def fma1(b, x, y, z):
    """x * y + z of single numbers, rounded once."""
    return _call(b, "llvm.fma.f32", _float, x, y, z)


@_op(F32x16, F32x16, F32x16)
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_op(F32x16, F32x16)
def absolute(b, x):
    return _call(b, "llvm.fabs.v16f32", F32x16.llvm, x)


@_op(F32x16, F32x16)
def rint(b, x):
    """Round to whole numbers, half to even."""
    return _call(b, "llvm.rint.v16f32", F32x16.llvm, x)


@_op(F32x16, F32x16, F32x16)
def times_power_of_2(b, x, n):
    """x * 2^n for whole n in [-126, 127]: n is put into the exponent bits."""
    bits = b.add(b.fptosi(n, I32x16.llvm), _constant(I32x16.llvm, 127))
    return b.fmul(x, b.bitcast(b.shl(bits, _constant(I32x16.llvm, 23)), F32x16.llvm))


@_op(float32, F32x16)
def sum16(b, x):
    """Add the 16 elements, by halves: always in the same order."""
    n = 16
    while n > 1:
        n //= 2
        low = _shuffle(b, x, x, list(range(n)))
        high = _shuffle(b, x, x, list(range(n, 2 * n)))
        x = b.fadd(low, high)
    return b.extract_element(x, ir.Constant(_i32, 0))


@_op(float32, F32x16)
def max16(b, x):
    """Return the largest of the 16 elements."""
    n = 16
    while n > 1:
        n //= 2
        low = _shuffle(b, x, x, list(range(n)))
        high = _shuffle(b, x, x, list(range(n, 2 * n)))
        x = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(x, ir.Constant(_i32, 0))


# -- integer dot products ---------------------------------------------------------------------


@_op(F32x16, I32x16)
def to_f32(b, x):
    return b.sitofp(x, F32x16.llvm)


@_op(I32x16, I32x16, int32)
def scale_i32(b, x, factor):
    """x * factor."""
    one = b.insert_element(ir.Constant(I32x16.llvm, ir.Undefined), factor, ir.Constant(_i32, 0))
    return b.mul(x, _shuffle(b, one, one, [0] * 16))


@_op(I32x16, I32x16, I32x16)
def add_i32(b, x, y):
    return b.add(x, y)


@_op(I8x64, I8x64)
def low_nibbles(b, x):
    return b.and_(x, _constant(I8x64.llvm, 15))


@_op(I8x64, I8x64)
def high_nibbles(b, x):
    return b.lshr(x, _constant(I8x64.llvm, 4))


def _halves(b: Any, x: Any) -> tuple[Any, Any]:
    n = x.type.count // 2
    return _shuffle(b, x, x, list(range(n))), _shuffle(b, x, x, list(range(n, 2 * n)))


def _join(b: Any, x: Any, y: Any) -> Any:
    return _shuffle(b, x, y, list(range(2 * x.type.count)))


def _dot4_generic(b: Any, x: Any, y: Any, extend_x: Any) -> Any:
    """Sums of 4 neighbouring products, in plain LLVM operations."""
    wide = ir.VectorType(_i16, 64)
    product = b.mul(extend_x(x, wide), b.sext(y, wide))  # at most 255 * 128: fits when signed
    product = b.sext(product, ir.VectorType(_i32, 64))
    even, odd = (_shuffle(b, product, product, list(range(k, 64, 2))) for k in (0, 1))
    pairs = b.add(even, odd)
    even, odd = (_shuffle(b, pairs, pairs, list(range(k, 32, 2))) for k in (0, 1))
    return b.add(even, odd)


def _dot4_avx2(b: Any, unsigned: Any, signed: Any) -> Any:
    """The same by vpmaddubsw and vpmaddwd; sums of two products must fit int16."""
    ones = _constant(ir.VectorType(_i16, 16), 1)
    sums = []
    for u, s in zip(_halves(b, unsigned), _halves(b, signed), strict=True):
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_i16, 16), u, s)
        sums.append(_call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(_i32, 8), pairs, ones))
    return _join(b, sums[0], sums[1])


def _vpdpbusd(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    u, s = b.bitcast(unsigned, I32x16.llvm), b.bitcast(signed, I32x16.llvm)
    return _call(b, "llvm.x86.avx512.vpdpbusd.512", I32x16.llvm, total, u, s)


@_op(I32x16, I32x16, I8x64, I8x64)
def dot_nibbles(b, total, nibbles, x):
    """total + sums of 4 neighbouring products of nibbles (0 to 15) and signed bytes."""
    if ISA == "avx512vnni":
        return _vpdpbusd(b, total, nibbles, x)
    if ISA == "avx2":
        return b.add(total, _dot4_avx2(b, nibbles, x))
    return b.add(total, _dot4_generic(b, nibbles, x, b.zext))


@_op(I32x16, I32x16, I8x64, I8x64)
def dot_bytes(b, total, w, x):
    """total + sums of 4 neighbouring products of signed bytes, plus Q8_BIAS * (sums of x)."""
    if ISA == "avx512vnni":
        return _vpdpbusd(b, total, b.xor(w, _constant(I8x64.llvm, -128)), x)
    if ISA == "avx2":
        # |w| * (x with the sign of w): x is within +-127, so that pairs fit int16.
        zero = _constant(I8x64.llvm, 0)
        negative = b.icmp_signed("<", w, zero)
        magnitude = b.select(negative, b.sub(zero, w), w)  # -128 becomes 128 as unsigned
        return b.add(total, _dot4_avx2(b, magnitude, b.select(negative, b.sub(zero, x), x)))
    return b.add(total, _dot4_generic(b, w, x, b.sext))


def _gather_blocks(b: Any, address: Any, n: int, stride: int, size: int) -> Any:
    """Join the quants (after a 2-byte scale) of `n` blocks, `stride` bytes apart."""
    parts = [
        _load(b, _offset(b, address, i * stride + 2), ir.VectorType(_i8, size)) for i in range(n)
    ]
    while len(parts) > 1:
        parts = [_join(b, parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]
    return parts[0]


def _spread_scales(b: Any, address: Any, x_scales: Any, n: int, stride: int) -> Any:
    """Return w scale * x scale of `n` blocks, each repeated over its 16 / n lanes."""
    # Gathered as bits, then widened all at once.
    bits = ir.Constant(ir.VectorType(_i16, n), ir.Undefined)
    for i in range(n):
        scale = _load(b, _offset(b, address, i * stride), _i16)
        bits = b.insert_element(bits, scale, ir.Constant(_i32, i))
    if _HAS_HALF:
        floats = b.fpext(b.bitcast(bits, ir.VectorType(_half, n)), ir.VectorType(_float, n))
    else:
        floats = _half_to_float(b, bits)
    floats = b.fmul(floats, _load(b, x_scales, ir.VectorType(_float, n)))
    return _shuffle(b, floats, floats, [lane * n // 16 for lane in range(16)])


@_op(I8x64, intp)
def load_q4_0_quants(b, address):
    """Load the 64 bytes of nibbles of 4 consecutive Q4_0 blocks."""
    return _gather_blocks(b, address, 4, 18, 16)


@_op(F32x16, intp, intp)
def q4_0_scales(b, address, x_scales):
    """Scales of 4 Q4_0 blocks times 4 float32 at `x_scales`, each over 4 lanes."""
    return _spread_scales(b, address, x_scales, 4, 18)


@_op(I8x64, intp)
def load_q8_0_quants(b, address):
    """Load the 64 bytes of 2 consecutive Q8_0 blocks."""
    return _gather_blocks(b, address, 2, 34, 32)


@_op(F32x16, intp, intp)
def q8_0_scales(b, address, x_scales):
    """Scales of 2 Q8_0 blocks times 2 float32 at `x_scales`, each over 8 lanes."""
    return _spread_scales(b, address, x_scales, 2, 34)


def _nibbles_f32(b: Any, address: Any, shift: int) -> Any:
    nibbles = _load(b, address, ir.VectorType(_i8, 16))
    byte16 = nibbles.type
    nibbles = b.and_(b.lshr(nibbles, _constant(byte16, shift)), _constant(byte16, 15))
    return b.sitofp(b.sub(nibbles, _constant(byte16, 8)), F32x16.llvm)


@_op(F32x16, intp)
def q4_0_low(b, address):
    """Return q - 8 of a Q4_0 block's first 16 weights; `address` is that of its nibbles."""
    return _nibbles_f32(b, address, 0)


@_op(F32x16, intp)
def q4_0_high(b, address):
    """Return q - 8 of a Q4_0 block's last 16 weights."""
    return _nibbles_f32(b, address, 4)


# -- threads ----------------------------------------------------------------------------------


@_op(int64, intp)
def atomic_load(b, address):
    return b.load_atomic(b.inttoptr(address, _i64.as_pointer()), "acquire", 8)


@_op(void, intp, int64)
def atomic_store(b, address, x):
    b.store_atomic(x, b.inttoptr(address, _i64.as_pointer()), "release", 8)


@_op(int64, intp, int64)
def atomic_add(b, address, x):
    """Add and return what was there before."""
    return b.atomic_rmw("add", b.inttoptr(address, _i64.as_pointer()), x, "acq_rel")


@_op(types.boolean, intp, int64, int64)
def compare_and_swap(b, address, expected, new):
    """Store `new` if `expected` is there; return whether it was."""
    pointer = b.inttoptr(address, _i64.as_pointer())
    return b.extract_value(b.cmpxchg(pointer, expected, new, "acq_rel", "acquire"), 1)


@_op(void)
def pause(b):
    """Tell the core that this is a spin loop."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        _call(b, "llvm.x86.sse2.pause", ir.VoidType())


@_op(void)
def yield_core(b):
    """Let another thread run on this core, if one wants to."""
    _call(b, "SwitchToThread" if os.name == "nt" else "sched_yield", _i32)


@_op(void, intp, intp, intp, intp, intp)
def call_job(b, function, args, control, epoch, thread):
    """Call the compiled function at address `function` with the other four arguments."""
    word = args.type
    type_ = ir.FunctionType(ir.VoidType(), [word] * 4)
    b.call(b.inttoptr(function, type_.as_pointer()), [args, control, epoch, thread])
