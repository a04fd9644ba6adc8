"""Products of bytes and nibbles, which depend on the processor."""

from __future__ import annotations

import functools

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from qvl_kernels.cpu import features
from qvl_kernels.cpu.simd.emit import (
    I8,
    I16,
    I32,
    addresses,
    call,
    constant,
    cut,
    each,
    gather,
    join,
    pointer,
    spread,
    take,
)
from qvl_kernels.cpu.simd.vector import Vec

LEVEL = features.selected()
LANES = LEVEL.lanes
"""32-bit lanes of one register."""

NARROW_OPERANDS = llvm.llvm_version_info[0] >= 22
"""LLVM 22 changed the operands of the VNNI intrinsics from vectors of i32 to vectors of bytes or shorts."""
# Properties of `dot` on this processor that kernels need.
UNSHIFTED = LEVEL.product == "vnni"
HIGH_SHIFT = 4 if UNSHIFTED else 0
"""`highs` returns the nibble times 2**HIGH_SHIFT."""
BYTE_BIAS = LEVEL.byte_bias
"""`dot_bytes` multiplies ``byte - BYTE_BIAS``."""
WORDS, MATRIX, UNPACKS = LEVEL.words, LEVEL.matrix, LEVEL.unpacks
SUM_EL = "i16" if LEVEL.product == "maddubs" else "i32"
"""Element type of a `dot` accumulator; ``widen`` converts it to i32."""
SUM_PER_LANE = 2 if SUM_EL == "i16" else 1
SUM_STEPS = 8 if SUM_EL == "i16" else 16
"""Number of nibble products per accumulator before it must be widened (8 * 2 * 15 * 127 < 2**15)."""


@intrinsic
def step_end(typing):
    """With 16 registers, keep the loads of the next step behind this one's: LLVM would spill what it loads early."""

    def codegen(context, b, sig, args):
        if SUM_EL == "i16":
            nothing = ir.FunctionType(ir.VoidType(), [])
            b.call(ir.InlineAsm(nothing, "", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.none(), codegen


@functools.cache
def masks(mask):
    """``f(v)``: the bits of `mask` of every byte of i8."""

    @intrinsic
    def f(typing, v):
        return v(v), lambda context, b, sig, args: each(b, v.m, lambda x: b.and_(x, constant(x.type, mask)), args[0])

    return f


@functools.cache
def highs(bits):
    """``f(v)``: the lower `bits`, 3 or 4, of the high nibbles of i8, times ``2**HIGH_SHIFT``."""
    mask = (1 << bits) - 1

    def emit(b, x):
        if UNSHIFTED:
            return b.and_(x, constant(x.type, mask << 4))
        x = b.lshr(x, constant(x.type, 4))
        return x if bits == 4 else b.and_(x, constant(x.type, mask))

    @intrinsic
    def f(typing, v):
        return v(v), lambda context, b, sig, args: each(b, v.m, functools.partial(emit, b), args[0])

    return f


@intrinsic(prefer_literal=True)
def high_byte(typing, v, i):
    """Byte `i`, from the lowest, of each i32, minus 128 and times 2**24."""
    if not isinstance(i, types.IntegerLiteral):
        return None

    def emit(b, x):
        x = b.bitcast(b.xor(x, constant(v.vector, 0x80808080)), ir.VectorType(I8, 4 * v.n))
        lanes = [4 * lane + i.literal_value if at == 3 else 4 * v.n for lane in range(v.n) for at in range(4)]
        order = ir.Constant(ir.VectorType(I32, 4 * v.n), lanes)
        return b.bitcast(b.shuffle_vector(x, ir.Constant(x.type, None), order), v.vector)

    return v(v, i), lambda context, b, sig, args: each(b, v.m, functools.partial(emit, b), args[0])


@functools.cache
def steps_of_int3(n):
    """``f(addr, i)``: n bytes of step i, a literal from 0 to 3, of the packed int3 at `addr` (`packing.widen`).

    The codes are in the lower three bits of the nibbles; the fourth is undefined.
    """
    result, wide = Vec("i8", n), ir.VectorType(I16, n // 2)

    @intrinsic(prefer_literal=True)
    def f(typing, addr, i):
        if not isinstance(i, types.IntegerLiteral):
            return None
        step = i.literal_value

        def codegen(context, b, sig, args):
            v, one = b.load(pointer(b, args[0], wide, step // 2 * 128), align=1), constant(wide, 1)
            if step % 2:
                v = b.lshr(v, one)
            else:
                third = b.load(pointer(b, args[0], wide, 256), align=1)
                v = b.xor(v, b.lshr(third, one) if step else b.shl(third, one))
            return b.bitcast(v, result.vector)

        return result(addr, i), codegen

    return f


def _vnni(b, acc, u, s):
    n = acc.type.count
    operand = ir.VectorType(I8, 4 * n) if NARROW_OPERANDS else acc.type
    args = [acc] + [x if x.type == operand else b.bitcast(x, operand) for x in (u, s)]
    return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * n}", acc.type, args)


def _pairs(b, u, s):
    """i16 sums of two products, u8 by s8 (saturating)."""
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), [u, b.bitcast(s, u.type)])


def _pair_sums(b, v):
    ones = constant(v.type, 1)
    return call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), [v, ones])


def _sdot(b, acc, u, s):
    return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, u, b.bitcast(s, u.type)])


def _plain_dot(b, acc, u, s):
    u = b.bitcast(u, acc.type)
    for k in range(4):
        x = b.lshr(u, constant(u.type, 8 * k)) if k else u
        x = b.and_(x, constant(u.type, 255))
        y = b.ashr(b.shl(s, constant(u.type, 24 - 8 * k)) if k < 3 else s, constant(u.type, 24))
        acc = b.add(acc, b.mul(x, y))
    return acc


PRODUCTS = {"vnni": _vnni, "sdot": _sdot, "shifts": _plain_dot}


def _dot_nibbles(b, acc, u, s):
    if LEVEL.product == "maddubs":
        return b.add(acc, _pairs(b, u, s))
    return PRODUCTS[LEVEL.product](b, acc, u, s)


def _dot_any(b, acc, u, s):
    if LEVEL.product == "maddubs":
        # 255 * 127 * 2 overflows i16; 127 * 127 * 2 and 128 * 127 * 2 do not.
        for mask in (0x7F, 0x80):
            acc = b.add(acc, _pair_sums(b, _pairs(b, b.and_(u, constant(u.type, mask)), s)))
        return acc
    if LEVEL.product == "sdot":
        u = b.xor(u, constant(u.type, 0x80))
    return PRODUCTS[LEVEL.product](b, acc, u, s)


def _dot(emit):
    """Create an intrinsic ``f(acc, u, addr, stride)``, split into registers of `LANES` lanes."""

    @intrinsic
    def f(typing, acc, u, addr, stride):
        per_lane = acc.n * 4 // u.n
        step = LANES * (2 if acc.el == "i16" else 1)

        def codegen(context, b, sig, args):
            sums = []
            for i, address in enumerate(addresses(b, args[2], args[3], acc.m)):
                block, bytes_ = take(b, args[0], i), take(b, args[1], i)
                four = spread(b, address, ir.VectorType(I32, LANES))
                cuts = range(acc.n // step)
                sums.append(
                    join(
                        b,
                        [
                            emit(b, cut(b, block, c * step, step), cut(b, bytes_, c * 4 * LANES, 4 * LANES), four)
                            for c in cuts
                        ],
                    )
                )
            return gather(b, sums)

        fits = isinstance(u, Vec) and u.el == "i8" and u.m in (1, acc.m) and acc.n % step == 0 and per_lane in (1, 2)
        return (acc(acc, u, addr, stride), codegen) if fits else None

    return f


dot = _dot(_dot_nibbles)
"""``acc[i] += u . s_i``: bytes u (at most 127, or a nibble of `masks` or `highs`) times the four int8 at
``addr + i * stride``; the four products of a lane are added to that lane of `acc` (`SUM_EL`)."""

dot_bytes = _dot(_dot_any)
"""As `dot`, with arbitrary bytes minus `BYTE_BIAS`, and an i32 accumulator."""


@intrinsic
def widen(typing, acc):
    """Convert a `dot` accumulator to i32."""
    if acc.el == "i32":
        return acc(acc), lambda context, b, sig, args: args[0]
    result = acc.of("i32", acc.n // 2)

    def emit(b, v):
        return join(b, [_pair_sums(b, cut(b, v, i, 16)) for i in range(0, acc.n, 16)])

    return result(acc), lambda context, b, sig, args: each(b, acc.m, functools.partial(emit, b), args[0])
