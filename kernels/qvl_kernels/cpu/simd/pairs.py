"""Pairs of int16 in the lanes of i32 vectors, and their products."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from qvl_kernels.cpu.simd.bytes import LEVEL, NARROW_OPERANDS
from qvl_kernels.cpu.simd.emit import (
    I16,
    I32,
    addresses,
    broadcast,
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


def _multiply(b, total, x, y):
    """Emit ``total + x . y``."""
    wide = total.type
    if LEVEL.product == "vnni":
        operand = ir.VectorType(I16, 2 * wide.count) if NARROW_OPERANDS else wide
        name = f"llvm.x86.avx512.vpdpwssd.{32 * wide.count}"
        return call(b, name, wide, [total, b.bitcast(x, operand), b.bitcast(y, operand)])
    if LEVEL.product == "maddubs":
        x, y = (b.bitcast(v, ir.VectorType(I16, 2 * wide.count)) for v in (x, y))
        one = ir.VectorType(I32, 8)
        cuts = [[cut(b, v, i, 16) for v in (x, y)] for i in range(0, 2 * wide.count, 16)]
        return b.add(total, join(b, [call(b, "llvm.x86.avx2.pmadd.wd", one, operands) for operands in cuts]))
    sixteen = constant(wide, 16)
    low = b.mul(b.ashr(b.shl(x, sixteen), sixteen), b.ashr(b.shl(y, sixteen), sixteen))
    return b.add(total, b.add(low, b.mul(b.ashr(x, sixteen), b.ashr(y, sixteen))))


@intrinsic
def dot_pairs(typing, p, q, u, v, addr, stride):
    """``p[i] + u . x, q[i] + v . x`` with x the pair at ``addr + i * stride``."""
    result = types.UniTuple(p, 2)

    def codegen(context, b, sig, args):
        p_, q_, u_, v_, address, step = args
        for i, where in enumerate(addresses(b, address, step, p.m)):
            x = spread(b, where, p.vector)
            p_ = b.insert_value(p_, _multiply(b, b.extract_value(p_, i), u_, x), i)
            q_ = b.insert_value(q_, _multiply(b, b.extract_value(q_, i), v_, x), i)
        return context.make_tuple(b, result, [p_, q_])

    return result(p, q, u, v, addr, stride), codegen


@intrinsic
def dot_pairs_narrow(typing, p, u, addr, stride):
    """``p[i] + u . x``."""

    def codegen(context, b, sig, args):
        p_, u_, address, step = args
        sums = []
        for i, where in enumerate(addresses(b, address, step, p.m)):
            sums.append(_multiply(b, take(b, p_, i), u_, spread(b, where, p.vector)))
        return gather(b, sums)

    return p(p, u, addr, stride), codegen


@intrinsic
def bytes_of_pairs(typing, v, second):
    """The first or, if `second` is not 0, the second byte of each pair of i8, as int16 in i32 vectors."""
    result = v.of("i32", v.n // 4)

    def codegen(context, b, sig, args):
        wide = ir.VectorType(I16, v.n // 2)
        taken = b.icmp_signed("!=", args[1], ir.Constant(args[1].type, 0))
        amount = broadcast(b, b.select(taken, ir.Constant(I16, 8), ir.Constant(I16, 0)), wide)

        def choose(x):
            return b.bitcast(b.and_(b.lshr(b.bitcast(x, wide), amount), constant(wide, 255)), result.vector)

        return each(b, v.m, choose, args[0])

    return result(v, second), codegen


@intrinsic
def store_fours(typing, addr, v):
    """Write the low halves of an i32 vector, the first and third of every four before the second and fourth."""

    def codegen(context, b, sig, args):
        order = [4 * (i // 4) + (0, 2, 1, 3)[i % 4] for i in range(v.n)]
        lanes = ir.Constant(ir.VectorType(I32, v.n), order)
        half = b.trunc(args[1], ir.VectorType(I16, v.n))
        half = b.shuffle_vector(half, ir.Constant(half.type, ir.Undefined), lanes)
        b.store(half, pointer(b, args[0], half.type), align=1)
        return context.get_dummy_value()

    return types.none(addr, v), codegen


@intrinsic
def store_shorts(typing, addr, v):
    """Write the low halves of i32 vectors to adjacent memory."""

    def codegen(context, b, sig, args):
        half = ir.VectorType(I16, v.n)
        for i in range(v.m):
            b.store(b.trunc(take(b, args[1], i), half), pointer(b, args[0], half, 2 * v.n * i), align=1)
        return context.get_dummy_value()

    return types.none(addr, v), codegen


@intrinsic
def pair(typing, low, high):
    """Combine the low halves of two i32 vectors."""

    def codegen(context, b, sig, args):
        low_half = b.and_(args[0], constant(low.vector, 0xFFFF))
        return b.or_(low_half, b.shl(args[1], constant(low.vector, 16)))

    return low(low, high), codegen
