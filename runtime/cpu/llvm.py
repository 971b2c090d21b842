"""LLVM inside numba: vector types, intrinsics made from a few lines of IR, half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic

from .isa import HAS_HALF


class Vector(types.Type):
    """numba type of an LLVM vector of `n` elements."""

    def __init__(self, element: ir.Type, n: int) -> None:
        self.llvm = ir.VectorType(element, n)
        super().__init__(name=f"Vector({element}, {n})")


@register_default(Vector)
class _VectorModel(PrimitiveModel):  # type: ignore[misc]  # numba has no type hints
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


i8, i16, i32, i64 = (ir.IntType(n) for n in (8, 16, 32, 64))
half, float_ = ir.HalfType(), ir.FloatType()

F32x16 = Vector(float_, 16)
I32x16 = Vector(i32, 16)
I8x64 = Vector(i8, 64)
UniTuple: Any = types.UniTuple  # type: ignore[attr-defined]  # numba has no type hints
Four = UniTuple(I32x16, 4)
intp, int32, int64, float32, void = types.intp, types.int32, types.int64, types.float32, types.void


def op(result: Any, *params: Any) -> Callable[[Callable[..., Any]], Any]:
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
            case 5:

                def made(typingctx, a, b, c, d, e):
                    return signature, codegen
            case 6:

                def made(typingctx, a, b, c, d, e, f):
                    return signature, codegen
            case 7:

                def made(typingctx, a, b, c, d, e, f, g):
                    return signature, codegen
            case 8:

                def made(typingctx, a, b, c, d, e, f, g, h):
                    return signature, codegen
            case 10:

                def made(typingctx, a, b, c, d, e, f, g, h, i, j):
                    return signature, codegen
            case _:

                def made(typingctx, a, b, c, d, e, f, g, h, i, j, k, m):
                    return signature, codegen

        made.__name__ = made.__qualname__ = build.__name__
        made.__doc__ = build.__doc__
        return intrinsic(made)

    return decorate


def unpack(b: Any, array: Any) -> list[Any]:
    """Return the values of a tuple of one type."""
    return [b.extract_value(array, i) for i in range(array.type.count)]


def pack(b: Any, values: list[Any]) -> Any:
    """Make a tuple of values of one type."""
    array = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        array = b.insert_value(array, value, i)
    return array


def constant(vector: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def call(b: Any, name: str, result: ir.Type, *args: Any) -> Any:
    """Call the LLVM intrinsic or external function `name`."""
    type_ = ir.FunctionType(result, [a.type for a in args])
    function = b.module.globals.get(name) or ir.Function(b.module, type_, name)
    return b.call(function, args)


def shuffle(b: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(i32, len(lanes)), lanes))


def splat_to(b: Any, x: Any, vector: ir.VectorType) -> Any:
    """Return a vector of nothing but x."""
    one = b.insert_element(ir.Constant(vector, ir.Undefined), x, ir.Constant(i32, 0))
    return shuffle(b, one, one, [0] * vector.count)


def load(b: Any, address: Any, type_: ir.Type) -> Any:
    return b.load(b.inttoptr(address, type_.as_pointer()), align=1)


def offset(b: Any, address: Any, n: int) -> Any:
    return b.add(address, ir.Constant(address.type, n))


def same_shape(value: Any, element: ir.Type) -> Any:
    """Return the type of `element`s in the shape (vector or single) of `value`."""
    type_ = value.type
    return ir.VectorType(element, type_.count) if isinstance(type_, ir.VectorType) else element


def filled(type_: Any, value: Any) -> Any:
    """Return a constant of a vector or a single number."""
    return constant(type_, value) if isinstance(type_, ir.VectorType) else ir.Constant(type_, value)


def load_half(b: Any, address: Any, n: int | None = None) -> Any:
    """Load a half, or a vector of n, as float32."""
    if HAS_HALF:
        type_ = half if n is None else ir.VectorType(half, n)
        value = load(b, address, type_)
        return b.fpext(value, same_shape(value, float_))
    return half_to_float(b, load(b, address, i16 if n is None else ir.VectorType(i16, n)))


def store_half(b: Any, address: Any, x: Any) -> None:
    """Store float32, rounded half to even, as halves."""
    value = b.fptrunc(x, same_shape(x, half)) if HAS_HALF else float_to_half(b, x)
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def half_to_float(b: Any, bits: Any) -> Any:
    """Widen the bits of halves (i16) without instructions for it.

    Exponent and mantissa are moved into place and scaled by 2^112, the difference of the biases:
    exact for subnormals too. Infinity and NaN get the exponent that the scaling did not reach.
    """
    ints, floats = same_shape(bits, i32), same_shape(bits, float_)
    wide = b.zext(bits, ints)
    rest = b.shl(b.and_(wide, filled(ints, 0x7FFF)), filled(ints, 13))
    value = b.bitcast(b.fmul(b.bitcast(rest, floats), filled(floats, 2.0**112)), ints)
    is_special = b.icmp_unsigned(">=", rest, filled(ints, 0x7C00 << 13))
    value = b.select(is_special, b.or_(rest, filled(ints, 0xFF << 23)), value)
    sign = b.shl(b.and_(wide, filled(ints, 0x8000)), filled(ints, 16))
    return b.bitcast(b.or_(value, sign), floats)


def float_to_half(b: Any, x: Any) -> Any:
    """Round float32 to the bits of halves (i16), half to even, without instructions for it.

    After Marat Dukhan's FP16 library: a number of the right magnitude is added whose last bit is
    the half's, so that the float adder does the rounding.
    """
    ints, floats = same_shape(x, i32), same_shape(x, float_)
    bits = b.bitcast(x, ints)
    magnitude = b.bitcast(b.and_(bits, filled(ints, 0x7FFFFFFF)), floats)
    base = b.fmul(b.fmul(magnitude, filled(floats, 2.0**112)), filled(floats, 2.0**-110))
    doubled = b.add(bits, bits)  # without the sign
    bias = b.and_(doubled, filled(ints, -0x1000000))
    lowest = filled(ints, 0x71000000)
    bias = b.select(b.icmp_unsigned("<", bias, lowest), lowest, bias)
    shifted = b.add(b.lshr(bias, filled(ints, 1)), filled(ints, 0x07800000))
    rounded = b.bitcast(b.fadd(b.bitcast(shifted, floats), base), ints)
    exponent = b.and_(b.lshr(rounded, filled(ints, 13)), filled(ints, 0x7C00))
    value = b.add(exponent, b.and_(rounded, filled(ints, 0x0FFF)))
    is_nan = b.icmp_unsigned(">", doubled, filled(ints, -0x1000000))
    value = b.select(is_nan, filled(ints, 0x7E00), value)
    sign = b.and_(b.lshr(bits, filled(ints, 16)), filled(ints, 0x8000))
    return b.trunc(b.or_(value, sign), same_shape(x, i16))
