"""All threads walk through a program together."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from qvl_kernels.cpu import features
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import get_i64

I64 = ir.IntType(64)
SPINS = 4000
"""Looks at the barrier (some 40 us) before giving the core to others between looks."""


def _pointer(b, address):
    return b.inttoptr(address, I64.as_pointer())


@intrinsic
def _increment(typing, addr):
    def codegen(context, b, sig, args):
        return b.atomic_rmw("add", _pointer(b, args[0]), ir.Constant(I64, 1), "acq_rel")

    return types.int64(addr), codegen


@intrinsic
def _read(typing, addr):
    def codegen(context, b, sig, args):
        return b.load_atomic(_pointer(b, args[0]), "acquire", 8)

    return types.int64(addr), codegen


@intrinsic
def _write(typing, addr, value):
    def codegen(context, b, sig, args):
        b.store_atomic(args[1], _pointer(b, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.none(addr, value), codegen


@intrinsic
def _pause(typing):
    def codegen(context, b, sig, args):
        if features.selected().name in ("avx512", "avxvnni", "avx2"):
            nothing = ir.FunctionType(ir.VoidType(), [])
            b.call(get_or_insert_function(b.module, nothing, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def _call(typing, function, args, thread, threads):
    """Call a kernel by its address."""

    def codegen(context, b, sig, values):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
        b.call(b.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.none(function, args, thread, threads), codegen


@intrinsic
def _yield(typing, function):
    """Call ``int function(void)`` by its address."""

    def codegen(context, b, sig, values):
        kind = ir.FunctionType(ir.IntType(32), [])
        b.call(b.inttoptr(values[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(function), codegen


@routine
def barrier(arrived, generation, threads, give_way):
    """Wait until all threads are here. `arrived` and `generation` are addresses on cache lines of their own."""
    if threads == 1:
        return
    now = _read(generation)
    if _increment(arrived) == threads - 1:
        _write(arrived, 0)
        _increment(generation)
        return
    looks = 0
    while _read(generation) == now:
        _pause()
        looks += 1
        if looks > SPINS:
            _yield(give_way)


@kernel
def run(control, thread, threads):
    """Execute a program: `control` holds program, instructions, words of an instruction, yield function, and, a cache
    line apart each, the barrier's two counters."""
    program, count, words, give_way = unpack(control, 4)
    for _ in range(count):
        _call(get_i64(program), program + 8, thread, threads)
        barrier(control + 64, control + 128, threads, give_way)
        program += 8 * words
