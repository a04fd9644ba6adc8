"""Loads and stores of vectors and scalars."""

from __future__ import annotations

import functools

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from qvl_kernels.cpu import features
from qvl_kernels.cpu.simd.emit import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    addresses,
    broadcast,
    call,
    constant,
    gather,
    pointer,
    spread,
    take,
)
from qvl_kernels.cpu.simd.vector import Vec, as_element, operands


@functools.cache
def zeros(el, n, m=1):
    result = Vec(el, n, m)

    @intrinsic
    def f(typing):
        return result(), lambda context, b, sig, args: ir.Constant(result.llvm, None)

    return f


@functools.cache
def splats(el, n):
    result = Vec(el, n)

    @intrinsic
    def f(typing, x):
        return result(x), lambda context, b, sig, args: operands(b, sig, args, result)[0]

    return f


@functools.cache
def loads(el, n, m=1):
    result = Vec(el, n, m)
    size = n * int(el[1:]) // 8

    @intrinsic
    def f(typing, addr):
        def codegen(context, b, sig, args):
            return gather(b, [b.load(pointer(b, args[0], result.vector, i * size), align=1) for i in range(m)])

        return result(addr), codegen

    return f


@functools.cache
def rows(el, n, m):
    """``f(addr, stride)``: vector i is loaded from ``addr + i * stride``; el may be "f16" (as f32)."""
    half = el == "f16"
    result = Vec("f32" if half else el, n, m)

    @intrinsic
    def f(typing, addr, stride):
        def codegen(context, b, sig, args):
            where = addresses(b, *args, m)
            if half:
                return gather(b, [_load_half(b, address, n) for address in where])
            return gather(b, [b.load(pointer(b, address, result.vector), align=1) for address in where])

        return result(addr, stride), codegen

    return f


@functools.cache
def spreads(el, n, m=1):
    result = Vec(el, n, m)

    @intrinsic
    def f(typing, addr, stride):
        def codegen(context, b, sig, args):
            return gather(b, [spread(b, address, result.vector) for address in addresses(b, *args, m)])

        return result(addr, stride), codegen

    return f


def _lane_mask(b, n, count):
    lanes = ir.VectorType(I32, n)
    numbers = ir.Constant(lanes, list(range(n)))
    count = b.trunc(count, I32) if count.type.width > 32 else count
    return b.icmp_signed("<", numbers, broadcast(b, count, lanes))


@functools.cache
def parts(n):
    result = Vec("f32", n)

    @intrinsic
    def f(typing, addr, count):
        def codegen(context, b, sig, args):
            vector = result.vector
            where = pointer(b, args[0], vector)
            mask = _lane_mask(b, n, args[1])
            arguments = [where, ir.Constant(I32, 1), mask, ir.Constant(vector, None)]
            return call(b, f"llvm.masked.load.v{n}f32.p0", vector, arguments)

        return result(addr, count), codegen

    return f


def _half_to_float(b, bits):
    """Convert fp16 as i16 bits to f32 without a conversion instruction; infinities and NaN become finite."""
    n = bits.type.count
    integers, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
    wide = b.zext(bits, integers)
    sign = b.shl(b.and_(wide, constant(integers, 0x8000)), constant(integers, 16))
    rest = b.shl(b.and_(wide, constant(integers, 0x7FFF)), constant(integers, 13))
    value = b.fmul(b.bitcast(rest, floats), constant(floats, 2.0**112))
    return b.bitcast(b.or_(b.bitcast(value, integers), sign), floats)


def _float_to_half(b, value):
    """Convert f32 to fp16 bits, ties to even, overflow to infinity (after Giesen's float_to_half_fast3_rtne)."""
    n = value.type.count
    integers, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
    bits = b.bitcast(value, integers)
    sign = b.and_(bits, constant(integers, -0x80000000))
    bits = b.xor(bits, sign)
    magic = b.fadd(b.bitcast(bits, floats), constant(floats, 0.5))
    small = b.sub(b.bitcast(magic, integers), constant(integers, 126 << 23))
    odd = b.and_(b.lshr(bits, constant(integers, 13)), constant(integers, 1))
    normal = b.add(bits, b.add(odd, constant(integers, ((15 - 127) << 23) + 0xFFF)))
    normal = b.lshr(normal, constant(integers, 13))
    out = b.select(b.icmp_signed("<", bits, constant(integers, 113 << 23)), small, normal)
    out = b.select(b.icmp_signed(">=", bits, constant(integers, 143 << 23)), constant(integers, 0x7C00), out)
    return b.trunc(b.or_(out, b.lshr(sign, constant(integers, 16))), ir.VectorType(I16, n))


def _load_half(b, address, n):
    if features.selected().name == "plain":
        return _half_to_float(b, b.load(pointer(b, address, ir.VectorType(I16, n)), align=1))
    return b.fpext(b.load(pointer(b, address, ir.VectorType(F16, n)), align=1), ir.VectorType(F32, n))


def _store_half(b, address, value):
    n = value.type.count
    if features.selected().name == "plain":
        half = _float_to_half(b, value)
    else:
        half = b.fptrunc(value, ir.VectorType(F16, n))
    b.store(half, pointer(b, address, half.type), align=1)


@functools.cache
def halves(n):
    result = Vec("f32", n)

    @intrinsic
    def f(typing, addr):
        return result(addr), lambda context, b, sig, args: _load_half(b, args[0], n)

    return f


@functools.cache
def bytes_(n, signed, m=1):
    result = Vec("i32", n, m)

    @intrinsic
    def f(typing, addr):
        def codegen(context, b, sig, args):
            extend = b.sext if signed else b.zext
            loaded = [b.load(pointer(b, args[0], ir.VectorType(I8, n), i * n), align=1) for i in range(m)]
            return gather(b, [extend(v, result.vector) for v in loaded])

        return result(addr), codegen

    return f


def _nothing(context):
    return context.get_dummy_value()


@intrinsic
def store(typing, addr, v):
    """Write the vectors to adjacent memory."""
    size = v.n * int(v.el[1:]) // 8

    def codegen(context, b, sig, args):
        for i in range(v.m):
            b.store(take(b, args[1], i), pointer(b, args[0], v.vector, i * size), align=1)
        return _nothing(context)

    return types.none(addr, v), codegen


@intrinsic
def store_streaming(typing, addr, v, stride):
    """Write vector i, of 64 bytes, to the line at ``addr + i * stride`` with a non-temporal store.

    It is visible to other threads after the barrier at the end of an instruction.
    """

    def codegen(context, b, sig, args):
        for i, address in enumerate(addresses(b, args[0], args[2], v.m)):
            instruction = b.store(take(b, args[1], i), pointer(b, address, v.vector), align=64)
            instruction.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
        return _nothing(context)

    return types.none(addr, v, stride), codegen


@intrinsic
def store_rows(typing, addr, v, stride):
    """Write vector i at ``addr + i * stride``."""

    def codegen(context, b, sig, args):
        for i, address in enumerate(addresses(b, args[0], args[2], v.m)):
            b.store(take(b, args[1], i), pointer(b, address, v.vector), align=1)
        return _nothing(context)

    return types.none(addr, v, stride), codegen


@intrinsic
def store_part(typing, addr, v, count):
    """Write the first `count` elements of one f32 vector."""

    def codegen(context, b, sig, args):
        mask = _lane_mask(b, v.n, args[2])
        arguments = [args[1], pointer(b, args[0], v.vector), ir.Constant(I32, 1), mask]
        call(b, f"llvm.masked.store.v{v.n}f32.p0", ir.VoidType(), arguments)
        return _nothing(context)

    return types.none(addr, v, count), codegen


@intrinsic
def store_half(typing, addr, v):
    """Write one f32 vector as fp16, ties to even."""

    def codegen(context, b, sig, args):
        _store_half(b, args[0], args[1])
        return _nothing(context)

    return types.none(addr, v), codegen


@intrinsic
def store_bytes(typing, addr, v):
    """Write one i32 vector as its low bytes."""

    def codegen(context, b, sig, args):
        value = b.trunc(args[1], ir.VectorType(I8, v.n))
        b.store(value, pointer(b, args[0], value.type), align=1)
        return _nothing(context)

    return types.none(addr, v), codegen


def _getter(numba_type, load):
    @intrinsic
    def f(typing, addr):
        return numba_type(addr), lambda context, b, sig, args: load(b, args[0])

    return f


get_f32 = _getter(types.float32, lambda b, a: b.load(pointer(b, a, F32), align=1))
get_f16 = _getter(types.float32, lambda b, a: b.extract_element(_load_half(b, a, 1), ir.Constant(I32, 0)))
get_i32 = _getter(types.int32, lambda b, a: b.load(pointer(b, a, I32), align=1))
get_i64 = _getter(types.int64, lambda b, a: b.load(pointer(b, a, I64), align=1))
get_u8 = _getter(types.int32, lambda b, a: b.zext(b.load(pointer(b, a, I8)), I32))
get_u16 = _getter(types.int32, lambda b, a: b.zext(b.load(pointer(b, a, I16), align=1), I32))


def _putter(element, write=None):
    @intrinsic
    def f(typing, addr, x):
        def codegen(context, b, sig, args):
            value = as_element(b, args[1], x, element)
            if write:
                write(b, args[0], value)
            else:
                b.store(value, pointer(b, args[0], element), align=1)
            return _nothing(context)

        return types.none(addr, x), codegen

    return f


put_f32, put_i32 = _putter(F32), _putter(I32)
put_f16 = _putter(F32, lambda b, a, x: _store_half(b, a, broadcast(b, x, ir.VectorType(F32, 1))))


def _prefetch(write: int, locality: int):
    @intrinsic
    def f(typing, addr):
        def codegen(context, b, sig, args):
            where = b.inttoptr(args[0], I8.as_pointer())
            call(b, "llvm.prefetch.p0", ir.VoidType(), [where, *(ir.Constant(I32, x) for x in (write, locality, 1))])
            return _nothing(context)

        return types.none(addr), codegen

    return f


prefetch_read, prefetch_write = _prefetch(0, 2), _prefetch(1, 3)
"""Prefetch a line to the L2 cache; prefetch a line for writing to the L1 cache."""
