"""Blocks of Q4_0, Q8_0 and Q6_K in vectors: quants and scales out of their bytes (formats.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from .isa import HAS_VNNI, Q8_BIAS
from .llvm import (
    F32x16,
    Four,
    I8x64,
    I32x16,
    call,
    constant,
    float32,
    float_,
    i8,
    i16,
    i32,
    int32,
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
from .simd import dot_signed, dot_unsigned, halves_to_float, join, words_to_bits


def _gather_blocks(b: Any, address: Any, n: int, stride: int, size: int) -> Any:
    """Join the quants (after a 2-byte scale) of `n` blocks, `stride` bytes apart."""
    parts = [load(b, offset(b, address, i * stride + 2), ir.VectorType(i8, size)) for i in range(n)]
    while len(parts) > 1:
        parts = [join(b, parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]
    return parts[0]


def _spread(b: Any, x: Any, first: int, n: int) -> Any:
    """Repeat n elements of x, from `first` on, each over 16 / n lanes."""
    return shuffle(b, x, x, [first + lane * n // 16 for lane in range(16)])


@op(F32x16, intp)
def load_q4_0_scales(b, address):
    """Load the scales of 16 consecutive Q4_0 blocks as float32."""
    # Of 8 blocks they lie in two vectors: every 9th word.
    words, lanes = ir.VectorType(i16, 32), [9 * i for i in range(8)]
    parts = [
        shuffle(
            b,
            load(b, offset(b, address, at), words),
            load(b, offset(b, address, at + 64), words),
            lanes,
        )
        for at in (0, 8 * 18)
    ]
    return halves_to_float(b, join(b, parts[0], parts[1]))


@op(F32x16, intp)
def load_q8_0_scales(b, address):
    """Load the scales of 16 consecutive Q8_0 blocks as float32."""
    return halves_to_float(b, words_to_bits(b, [offset(b, address, 34 * i) for i in range(16)]))


# -- four rows of blocks of 32 -----------------------------------------------------------------
#
# A group is 4 consecutive blocks. What their dot products with the activations come to is summed
# in integers to one number for each block, those of 4 rows side by side, [4 blocks][4 rows], and
# scaled then: 16 blocks at once.


def _q4_0_parts(b: Any, row: Any, bias: Any, q: Any) -> Any:
    """Sums of a group of Q4_0 in parts: [4 blocks][4]. 72 bytes at `row`; q, bias: see rows.py."""
    if HAS_VNNI:  # one vector, which has the scales, too, and the end of another
        first = load(b, row, I8x64.llvm)
        rest = load(b, offset(b, row, 56), ir.VectorType(i8, 16))
        rest = shuffle(b, rest, rest, [i % 16 for i in range(64)])
        bytes_ = [18 * k + 2 + i for k in range(4) for i in range(16)]
        quants = shuffle(b, first, rest, [i if i < 64 else 64 + i - 56 for i in bytes_])
    else:
        quants = _gather_blocks(b, row, 4, 18, 16)
    low = b.and_(quants, constant(I8x64.llvm, 15))
    high = b.lshr(quants, constant(I8x64.llvm, 4))
    total = dot_unsigned(b, load(b, bias, I32x16.llvm), low, load(b, q, I8x64.llvm))
    return dot_unsigned(b, total, high, load(b, offset(b, q, 64), I8x64.llvm))


def _q8_0_parts(b: Any, row: Any, bias: Any, q: Any) -> Any:
    """The same of Q8_0, 136 bytes."""
    factor = constant(I32x16.llvm, Q8_BIAS // 32)
    halves = []
    for k in range(2):  # two blocks at a time, over 8 lanes each
        quants = _gather_blocks(b, offset(b, row, 68 * k), 2, 34, 32)
        total = b.mul(load(b, offset(b, bias, 64 * k), I32x16.llvm), factor)
        x = load(b, offset(b, q, 64 * k), I8x64.llvm)
        halves.append(dot_signed(b, total, quants, x))
    lanes = [8 * block + lane for block in range(4) for lane in range(4)]
    others = [lane + 4 for lane in lanes]
    return b.add(shuffle(b, halves[0], halves[1], lanes), shuffle(b, halves[0], halves[1], others))


def _dots_of(parts: Callable[..., Any]) -> Callable[..., Any]:
    @op(Four, intp, intp, intp, intp, intp, intp)
    def dots(b, r, s, t, u, bias, q):
        """Return the sums of a group of each of four rows, in parts."""
        return pack(b, [parts(b, row, bias, q) for row in (r, s, t, u)])

    return dots


dots_q4_0, dots_q8_0 = _dots_of(_q4_0_parts), _dots_of(_q8_0_parts)


def _scales_of(stride: int) -> Callable[..., Any]:
    at_once = 4 if stride < 20 else 2  # blocks whose scales lie in a vector from the first on

    def pair(b: Any, x: Any, y: Any) -> Any:
        """The scales of two rows, block after block, as 4 pairs of words."""
        words = ir.VectorType(i16, 32)
        lanes = [stride // 2 * k + 32 * i for k in range(at_once) for i in range(2)]
        parts = [
            shuffle(b, load(b, offset(b, x, at), words), load(b, offset(b, y, at), words), lanes)
            for at in range(0, 4 * stride, at_once * stride)
        ]
        whole = parts[0] if len(parts) == 1 else join(b, *parts)
        return b.bitcast(whole, ir.VectorType(i32, 4))

    @op(F32x16, intp, intp, intp, intp, intp)
    def scales(b, r, s, t, u, x_scales):
        """Scales of a group of each of four rows times 4 float32: [4 blocks][4 rows]."""
        if HAS_VNNI:
            lanes = [lane for k in range(4) for lane in (k, 4 + k)]
            bits = shuffle(b, pair(b, r, s), pair(b, t, u), lanes)
            bits = b.bitcast(bits, ir.VectorType(i16, 16))
        else:
            at = [offset(b, row, stride * k) for k in range(4) for row in (r, s, t, u)]
            bits = words_to_bits(b, at)
        return b.fmul(
            halves_to_float(b, bits), _spread(b, load(b, x_scales, ir.VectorType(float_, 4)), 0, 4)
        )

    return scales


scales_q4_0, scales_q8_0 = _scales_of(18), _scales_of(34)


@op(F32x16, F32x16, Four, F32x16)
def add_sums(b, total, parts, scales):
    """total [4 blocks][4 rows] += the parts' sums * scales."""
    vectors = unpack(b, parts)
    for low, high in (([0, 16, 1, 17], [2, 18, 3, 19]), ([0, 1, 16, 17], [2, 3, 18, 19])):
        # Two vectors become one: half as many numbers of each, side by side.
        low, high = ([lane + 4 * k for k in range(4) for lane in some] for some in (low, high))
        vectors = [
            b.add(shuffle(b, x, y, low), shuffle(b, x, y, high))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    floats = b.sitofp(vectors[0], F32x16.llvm)
    return call(b, "llvm.fma.v16f32", F32x16.llvm, floats, scales, total)


@op(void, F32x16, intp)
def store_4_rows(b, total, at):
    """Store the sums over blocks, in their order, of [4 blocks][4 rows]."""
    parts = [shuffle(b, total, total, list(range(4 * k, 4 * k + 4))) for k in range(4)]
    rows = parts[0]
    for part in parts[1:]:
        rows = b.fadd(rows, part)
    b.store(rows, b.inttoptr(at, rows.type.as_pointer()), align=1)


def _q6_k_join(b: Any, nibbles: Any, high_at: Any, shift: Any, amounts: tuple[int, int]) -> Any:
    """Put above 64 nibbles the pairs of bits of 32 bytes at `high_at`, shifted either way."""
    high = load(b, high_at, ir.VectorType(i8, 32))
    words = b.bitcast(join(b, high, high), ir.VectorType(i16, 32))
    # What goes from byte to byte is masked.
    words = shift(words, ir.Constant(words.type, [n for n in amounts for _ in range(16)]))
    return b.or_(nibbles, b.and_(b.bitcast(words, I8x64.llvm), constant(I8x64.llvm, 0x30)))


@op(I8x64, I8x64, intp)
def q6_k_first(b, nibbles, high):
    """Return weights 0 to 63 (0 to 63 each) of half a Q6_K block."""
    return _q6_k_join(b, b.and_(nibbles, constant(I8x64.llvm, 15)), high, b.shl, (4, 2))


@op(I8x64, I8x64, intp)
def q6_k_second(b, nibbles, high):
    """Return weights 64 to 127 of half a Q6_K block."""
    return _q6_k_join(b, b.lshr(nibbles, constant(I8x64.llvm, 4)), high, b.lshr, (0, 2))


@op(F32x16, intp, float32, intp)
def q6_k_scales(b, scales, d, x_scales):
    """d * 16 signed bytes at `scales` * 8 float32 at `x_scales`, one for two."""
    w = b.sitofp(load(b, scales, ir.VectorType(i8, 16)), F32x16.llvm)
    x = load(b, x_scales, ir.VectorType(float_, 8))
    pairs = shuffle(b, x, x, [lane // 2 for lane in range(16)])
    return b.fmul(b.fmul(w, splat_to(b, d, F32x16.llvm)), pairs)


def _quarter(k: int) -> Any:
    @op(F32x16, F32x16)
    def spread(b, x):
        return _spread(b, x, 4 * k, 4)

    spread.__doc__ = f"Repeat numbers {4 * k} to {4 * k + 3} of 16, each over 4 lanes."
    return spread


spread_first, spread_second, spread_third, spread_fourth = (_quarter(k) for k in range(4))


def _nibbles_f32(b: Any, address: Any, shift: int) -> Any:
    nibbles = load(b, address, ir.VectorType(i8, 16))
    if HAS_VNNI:
        # A table of the 16 values, looked up by the lowest 4 bits of each lane.
        lanes = b.lshr(b.zext(nibbles, I32x16.llvm), constant(I32x16.llvm, shift))
        table = ir.Constant(F32x16.llvm, [float(q - 8) for q in range(16)])
        return call(b, "llvm.x86.avx512.permvar.sf.512", F32x16.llvm, table, lanes)
    byte16 = nibbles.type
    nibbles = b.and_(b.lshr(nibbles, constant(byte16, shift)), constant(byte16, 15))
    return b.sitofp(b.sub(nibbles, constant(byte16, 8)), F32x16.llvm)


@op(F32x16, intp)
def q4_0_low(b, address):
    """Return q - 8 of a Q4_0 block's first 16 weights; `address` is that of its nibbles."""
    return _nibbles_f32(b, address, 0)


@op(F32x16, intp)
def q4_0_high(b, address):
    """Return q - 8 of a Q4_0 block's last 16 weights."""
    return _nibbles_f32(b, address, 4)


@op(I8x64, intp, intp, intp, intp)
def load_4_rows(b, r, s, t, u):
    """Load 16 bytes of each of four rows: the first of each, then the second of each, ..."""
    parts = [load(b, address, ir.VectorType(i8, 16)) for address in (r, s, t, u)]
    x, y = join(b, parts[0], parts[1]), join(b, parts[2], parts[3])
    return shuffle(b, x, y, [16 * row + i for i in range(16) for row in range(4)])


@op(I8x64, int32)
def splat_4_bytes(b, x):
    """Return 16 times the 4 bytes of x."""
    return b.bitcast(splat_to(b, x, I32x16.llvm), I8x64.llvm)
