"""Vector operations on tiles: 16 rows of weights, one to a lane, against several tokens.

Written for any number of tokens: how many, the type of the tuple says that holds their addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from .isa import HAS_VNNI
from .llvm import (
    F32x16,
    Four,
    I8x64,
    I32x16,
    UniTuple,
    call,
    constant,
    float_,
    i8,
    i32,
    i64,
    intp,
    load,
    offset,
    op,
    pack,
    shuffle,
    splat_to,
    unpack,
    void,
)
from .simd import dot_signed, dot_unsigned, halves_to_float, words_to_bits

# As many tokens as the vector registers hold sums for.
TILE = 8 if HAS_VNNI else 4

Rows = UniTuple(intp, 16)
Eight = UniTuple(I32x16, 8)


# -- panels: from rows to lanes ---------------------------------------------------------------


def _addresses(n: int) -> Callable[..., Any]:
    @op(UniTuple(intp, n), intp, intp, intp, intp)
    def addresses(b, start, stride, numbers, last):
        """Return start + stride * number, of the int32 listed, or of 0, 1, ... if that is 0.

        Behind the number of index `last` it is that one again.
        """
        listed = b.icmp_signed("!=", numbers, ir.Constant(numbers.type, 0))
        # A list that there is not is not read from: this stands in for it.
        stand_in = b.alloca(numbers.type)
        b.store(ir.Constant(numbers.type, 0), stand_in)
        none = b.ptrtoint(stand_in, numbers.type)
        out = []
        for i in range(n):
            index = ir.Constant(last.type, i)
            index = b.select(b.icmp_signed("<", index, last), index, last)
            at = b.add(numbers, b.shl(index, ir.Constant(index.type, 2)))
            number = b.sext(load(b, b.select(listed, at, none), i32), numbers.type)
            out.append(b.add(start, b.mul(b.select(listed, number, index), stride)))
        return pack(b, out)

    return addresses


row_addresses, token_addresses = _addresses(16), _addresses(TILE)
four_addresses, two_addresses = _addresses(4), _addresses(2)


@op(Four, Rows, intp)
def load_4x16(b, rows, at):
    """Load 16 bytes at `at` of each row; return the first 4 bytes of every row, the second, ..."""
    addresses = unpack(b, rows)
    quarter = ir.VectorType(i32, 4)
    vectors = []
    for first in range(4):  # rows first, first + 4, ... side by side
        parts = [load(b, b.add(addresses[first + 4 * i], at), quarter) for i in range(4)]
        low = shuffle(b, parts[0], parts[1], list(range(8)))
        high = shuffle(b, parts[2], parts[3], list(range(8)))
        vectors.append(shuffle(b, low, high, list(range(16))))
    # A transposition of 4 x 4 inside each 128 bits: its halves are interleaved twice.
    for _ in range(2):
        pairs = []
        for x, y in ((vectors[0], vectors[2]), (vectors[1], vectors[3])):
            for start in (0, 2):
                pairs.append([x, y, start])
        vectors = [
            shuffle(
                b,
                x,
                y,
                [4 * lane + k for lane in range(4) for k in (s, 16 + s, s + 1, 17 + s)],
            )
            for x, y, s in pairs
        ]
    return pack(b, vectors)


@op(Eight, Four)
def split_nibbles(b, quads):
    """Return the low nibbles of the bytes of four vectors, then the high ones."""
    quads, mask = unpack(b, quads), constant(I32x16.llvm, 0x0F0F0F0F)
    low = [b.and_(x, mask) for x in quads]
    return pack(b, low + [b.and_(b.lshr(x, constant(x.type, 4)), mask) for x in quads])


def _six_bits(left: int, right: int) -> Callable[..., Any]:
    @op(Eight, Four, Four)
    def join(b, nibbles, pairs):
        """Split nibbles, and put above each the pair of bits that belongs to it."""
        low_mask, high_mask = (constant(I32x16.llvm, m) for m in (0x0F0F0F0F, 0x30303030))
        low, high = [], []
        for x, two in zip(unpack(b, nibbles), unpack(b, pairs), strict=True):
            above = b.and_(b.shl(two, constant(two.type, left)), high_mask)
            low.append(b.or_(b.and_(x, low_mask), above))
            above = b.and_(b.lshr(two, constant(two.type, right)), high_mask)
            high.append(b.or_(b.and_(b.lshr(x, constant(x.type, 4)), low_mask), above))
        return pack(b, low + high)

    return join


# Of Q6_K: for weights 0-31 and 64-95 of half a block, which share nibbles, and for the others.
six_bits_even, six_bits_odd = _six_bits(4, 0), _six_bits(2, 2)


def _quads(result: Any) -> Callable[..., Any]:
    @op(result, intp)
    def load_quads(b, at):
        """Load neighbouring vectors."""
        at = [offset(b, at, 64 * i) for i in range(result.count)]
        return pack(b, [load(b, address, I32x16.llvm) for address in at])

    return load_quads


load_4_quads, load_8_quads = _quads(Four), _quads(Eight)


@op(F32x16, Rows, intp)
def load_halves(b, rows, at):
    """Load the half-precision number at `at` of each row, as float32."""
    return halves_to_float(b, words_to_bits(b, [b.add(row, at) for row in unpack(b, rows)]))


@op(void, intp)
def transpose(b, at):
    """Transpose 16 vectors of 16 float32, in place."""
    pointers = [b.inttoptr(offset(b, at, 64 * i), F32x16.llvm.as_pointer()) for i in range(16)]
    vectors = [b.load(pointer, align=1) for pointer in pointers]
    low = [lane for k in range(8) for lane in (k, 16 + k)]
    high = [lane for k in range(8, 16) for lane in (k, 16 + k)]
    for _ in range(4):
        vectors = [
            shuffle(b, vectors[k], vectors[k + 8], lanes) for k in range(8) for lanes in (low, high)
        ]
    for pointer, vector in zip(pointers, vectors, strict=True):
        b.store(vector, pointer, align=1)


# -- tiles: several tokens --------------------------------------------------------------------


def _tile_op(result: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic `f(builder, totals, tokens, *addresses)` over tuples of any length.

    `totals`: float32 sums of 16 rows for each token; `tokens`: their addresses. `result(n)`:
    the type that comes back.
    """

    def decorate(build: Callable[..., Any]) -> Any:
        def codegen(_context: Any, b: Any, signature: Any, args: Any) -> Any:
            lists = [
                unpack(b, arg) if isinstance(type_, UniTuple) else arg
                for arg, type_ in zip(args, signature.args, strict=True)
            ]
            value = build(b, *lists)
            return _context.get_dummy_value() if value is None else pack(b, value)

        made: Callable[..., Any]
        match build.__code__.co_argcount - 1:
            case 1:

                def made(typingctx, tokens):
                    return result(tokens.count)(tokens), codegen
            case 2:

                def made(typingctx, totals, a):
                    return result(totals.count)(totals, a), codegen
            case 4:

                def made(typingctx, totals, tokens, a, b):
                    return result(totals.count)(totals, tokens, a, b), codegen
            case 5:

                def made(typingctx, totals, tokens, a, b, c):
                    return result(totals.count)(totals, tokens, a, b, c), codegen
            case _:

                def made(typingctx, totals, tokens, a, b, c, d, e, f):
                    return result(totals.count)(totals, tokens, a, b, c, d, e, f), codegen

        made.__name__ = made.__qualname__ = build.__name__
        made.__doc__ = build.__doc__
        return intrinsic(made)

    return decorate


def _totals(n: int) -> Any:
    return UniTuple(F32x16, n)


@_tile_op(_totals)
def no_totals(b, tokens):
    """Return a sum of 0 for each token."""
    return [constant(F32x16.llvm, 0.0)] * len(tokens)


@_tile_op(lambda _: void)
def store_totals(b, totals, out):
    """Store the sums of 16 rows, token after token."""
    for t, total in enumerate(totals):
        pointer = b.inttoptr(offset(b, out, 64 * t), F32x16.llvm.as_pointer())
        b.store(total, pointer, align=1)


@_tile_op(_totals)
def float_step(b, totals, tokens, weights, x):
    """totals += 16 weights of a column * x, which lies at `x` from each token's address."""
    w = load(b, weights, F32x16.llvm)
    out = []
    for total, token in zip(totals, tokens, strict=True):
        value = splat_to(b, load(b, b.add(token, x), float_), F32x16.llvm)
        out.append(call(b, "llvm.fma.v16f32", F32x16.llvm, w, value, total))
    return out


def _add_scaled(b: Any, total: Any, ints: Any, w_scale: Any, x_scale: Any) -> Any:
    """Return total + ints * w_scale * the float32 at the address x_scale."""
    scale = b.fmul(w_scale, splat_to(b, load(b, x_scale, float_), F32x16.llvm))
    floats = b.sitofp(ints, F32x16.llvm)
    return call(b, "llvm.fma.v16f32", F32x16.llvm, floats, scale, total)


def _int_step(dot: Callable[..., Any]) -> Callable[..., Any]:
    def step(b, totals, tokens, quads, w_scale, x, x_scale, x_sum, factor):
        """totals += w scale * x scale * (dot of 4 columns for each quad + factor * sum).

        `quads` [..][16][4] and `w_scale` [16] are the rows'; x, x_scale, x_sum are offsets from the
        tokens' addresses.
        """
        factors = splat_to(b, b.trunc(factor, i32), I32x16.llvm)
        sums = []
        for token in tokens:
            x_sums = splat_to(b, load(b, b.add(token, x_sum), i32), I32x16.llvm)
            sums.append(b.mul(x_sums, factors))
        for k, quad in enumerate(quads):
            w = b.bitcast(quad, I8x64.llvm)
            for t, token in enumerate(tokens):
                four = splat_to(b, load(b, offset(b, b.add(token, x), 4 * k), i32), I32x16.llvm)
                sums[t] = dot(b, sums[t], w, b.bitcast(four, I8x64.llvm))
        out = []
        for total, token, ints in zip(totals, tokens, sums, strict=True):
            out.append(_add_scaled(b, total, ints, w_scale, b.add(token, x_scale)))
        return out

    return step


def _products_step(b, totals, tokens, sums, scales, x_scale):
    """totals += w scale * x scale * sums [tokens][16], int32; x_scale as in the other steps."""
    w_scale, out = load(b, scales, F32x16.llvm), []
    for t, (total, token) in enumerate(zip(totals, tokens, strict=True)):
        ints = load(b, offset(b, sums, 64 * t), I32x16.llvm)
        out.append(_add_scaled(b, total, ints, w_scale, b.add(token, x_scale)))
    return out


products_step = _tile_op(_totals)(_products_step)
unsigned_step = _tile_op(_totals)(_int_step(dot_unsigned))
signed_step = _tile_op(_totals)(_int_step(dot_signed))


# -- AMX: 16 tokens at once -------------------------------------------------------------------
#
# Tile registers hold 16 rows of 64 bytes: the activations of up to 16 tokens, 4 int8 of each of
# 16 rows of weights, and their int32 sums. Numbers of registers are constants in the
# instructions; sums, activations and weights of neighbouring blocks use different ones.


def _tile(n: int) -> ir.Constant:
    return ir.Constant(i8, n)


def _tile_call(b: Any, name: str, *args: Any) -> None:
    call(b, f"llvm.x86.{name}", ir.VoidType(), *args)


@op(void, intp)
def configure_tiles(b, config):
    """Take this thread's tile registers into use; `config`: 64 bytes, see tile_config."""
    _tile_call(b, "ldtilecfg", b.inttoptr(config, i8.as_pointer()))


@op(void)
def release_tiles(b):
    _tile_call(b, "tilerelease")


def _tile_products(n_quads: int) -> Callable[..., Any]:
    @op(void, intp, intp, intp, intp)
    def products(b, x, stride, quads, out):
        """out int32 [2][16 tokens][16] = two blocks of x, `stride` bytes a token, . panel quads."""
        for k in range(2):
            at, w = offset(b, x, 4 * n_quads * k), offset(b, quads, 64 * n_quads * k)
            if n_quads == 8 and k:  # blocks of the pack are 48 bytes apart
                at = offset(b, x, 48)
            line = ir.Constant(i64, 64)
            to = b.inttoptr(offset(b, out, 1024 * k), i8.as_pointer())
            _tile_call(b, "tilezero", _tile(k))
            pointer = b.inttoptr(at, i8.as_pointer())
            _tile_call(b, "tileloadd64", _tile(2 + k), pointer, stride)
            _tile_call(b, "tileloadd64", _tile(4 + k), b.inttoptr(w, i8.as_pointer()), line)
            _tile_call(b, "tdpbssd", _tile(k), _tile(2 + k), _tile(4 + k))
            _tile_call(b, "tilestored64", _tile(k), to, line)

    return products


tile_products_8, tile_products_4 = _tile_products(8), _tile_products(4)


TILE_ROWS = 6


def tile_config(n_quads: int) -> list[int]:
    """Return the 8 words for configure_tiles: palette, bytes of a row and rows of 8 registers.

    To word TILE_ROWS the number of tokens is to be added, in each of its 4 low bytes.

    Source: Intel Architecture Instruction Set Extensions reference, LDTILECFG.
    """
    config = bytearray(64)
    config[0] = 1
    kinds = [(64, 0)] * 2 + [(4 * n_quads, 0)] * 2 + [(64, n_quads)] * 2  # sums, x, weights
    for register, (row_bytes, rows) in enumerate(kinds):
        config[16 + 2 * register] = row_bytes
        config[48 + register] = rows
    return [int.from_bytes(config[i : i + 8], "little") for i in range(0, 64, 8)]
