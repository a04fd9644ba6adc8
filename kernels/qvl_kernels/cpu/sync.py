"""All threads walk through a program together."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from qvl_kernels.cpu import features
from qvl_kernels.cpu.atomics import fetch_add, read, write
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import get_i64

SPINS = 4000
"""Looks at the barrier (some 40 us) before giving the core to others between looks."""


@intrinsic
def _pause(typing):
    def codegen(context, b, sig, args):
        if features.selected().product in ("vnni", "maddubs"):
            nothing = ir.FunctionType(ir.VoidType(), [])
            b.call(get_or_insert_function(b.module, nothing, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def _call(typing, function, args, thread, threads):
    """Call a kernel by its address."""

    def codegen(context, b, sig, values):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
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
def barrier(arrived, generation, counters, threads, give_way):
    """Wait until all threads are here, and set the counters of `atomics.claim` back.

    `arrived` and `generation` are addresses on cache lines of their own.
    """
    if threads == 1:
        write(counters, 0)
        return
    now = read(generation)
    if fetch_add(arrived, 1) == threads - 1:
        for i in range(threads):
            write(counters + 64 * i, 0)
        write(arrived, 0)
        fetch_add(generation, 1)
        return
    looks = 0
    while read(generation) == now:
        _pause()
        looks += 1
        if looks > SPINS:
            _yield(give_way)


@kernel
def run(control, thread, threads):
    """Execute a program: `control` holds its address, instructions, words of an instruction, yield function, and from
    its second cache line on, a line each, the barrier's two counters and those of `atomics.claim`."""
    program, count, words, give_way = unpack(control, 4)
    for _ in range(count):
        _call(get_i64(program), program + 8, thread, threads)
        barrier(control + 64, control + 128, control + 192, threads, give_way)
        program += 8 * words
