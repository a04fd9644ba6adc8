"""Products of signed bytes on ARM, for products of many rows.

`dot_lanes` multiplies four columns of rows of weights by those of vectors. Where `MATRIX`, `dot_blocks` multiplies
eight columns of two rows by those of two vectors; its sums are vectors of four i32: the first row times both vectors,
then the second row.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from qvl_kernels.cpu.simd.bytes import PRODUCTS
from qvl_kernels.cpu.simd.emit import F32, I32, call, cut, gather, join, pointer, take


def _multiply(b, total, u, s):
    return call(b, "llvm.aarch64.neon.smmla.v4i32.v16i8", total.type, [total, u, s])


def _pick(b, x, y, lanes):
    """Return these lanes of two vectors, which are counted on from the first to the second."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@intrinsic
def dot_lanes(typing, sums, u, s):
    """Add the products of the rows of u with each i32 of s, four columns of a vector, to `sums`."""

    def codegen(context, b, sig, args):
        found = []
        for m in range(sums.m):
            four, lane = take(b, args[2], m // 4), m % 4
            # the same lane of whole registers: the instruction takes it from there
            four = _pick(b, four, four, [4 * lane + i % 4 for i in range(16)])
            parts = [(cut(b, take(b, args[0], m), i, 4), cut(b, args[1], 4 * i, 16)) for i in range(0, sums.n, 4)]
            found.append(join(b, [PRODUCTS["sdot"](b, total, rows, four) for total, rows in parts]))
        return gather(b, found)

    return (sums(sums, u, s), codegen) if sums.m == 4 * s.m else None


@intrinsic
def dot_blocks(typing, sums, u, s):
    """Add the products of each vector of u with each of s to `sums`, those of a vector of u next to each other."""

    def codegen(context, b, sig, args):
        operands = [(take(b, args[1], i // s.m), take(b, args[2], i % s.m)) for i in range(sums.m)]
        return gather(b, [_multiply(b, take(b, args[0], i), *pair) for i, pair in enumerate(operands)])

    return (sums(sums, u, s), codegen) if sums.m == u.m * s.m else None


@intrinsic
def zip_steps(typing, u, v):
    """Put four bytes of u and four of v in turns: eight columns of every row, from two steps of four columns."""
    result, lanes = u.of(n=2 * u.n), u.n // 4

    def codegen(context, b, sig, args):
        x, y = (b.bitcast(v, ir.VectorType(I32, lanes)) for v in args)
        order = [lane + side for lane in range(lanes) for side in (0, lanes)]
        return b.bitcast(_pick(b, x, y, order), result.vector)

    return result(u, v), codegen


@intrinsic
def scales_of_sums(typing, sums, addr):
    """Return, as f32 of the shape of `sums`, the scale of every sum; those of the vectors are adjacent at `addr`."""
    result = sums.of("f32")

    def codegen(context, b, sig, args):
        two, found = ir.VectorType(F32, 2), []
        for i in range(2):
            pair = b.load(pointer(b, args[1], two, 8 * i), align=1)
            found.append(_pick(b, pair, pair, [0, 1, 0, 1]))
        return gather(b, [found[i % 2] for i in range(sums.m)])

    return result(sums, addr), codegen


@intrinsic(prefer_literal=True)
def add_rows(typing, p, sums, first):
    """Add the sums of the rows from `first` on, a literal, to p: a vector of rows for each of four vectors."""
    if not isinstance(first, types.IntegerLiteral):
        return None

    def codegen(context, b, sig, args):
        def rows(m):
            lanes = [m % 2 + at for at in (0, 2, 4, 6)]
            where = [first.literal_value + 4 * i + m // 2 for i in range(p.n // 4)]
            pairs = [(take(b, args[1], at), take(b, args[1], at + 2)) for at in where]
            return join(b, [_pick(b, x, y, lanes) for x, y in pairs])

        return gather(b, [b.fadd(take(b, args[0], m), rows(m)) for m in range(p.m)])

    return p(p, sums, first), codegen
