"""Synchronized execution of a program by all threads.

The shared state is the pool's `control` block, int64 words on cache lines of 8:

====================  =======================================================================================
words                 contents
====================  =======================================================================================
0, 1, 2               address of the program, number of instructions (`STOP`: workers return), words per instruction
3, 4, 5               addresses of the system's yield, of ``PyThread_acquire_lock`` and of ``PyThread_release_lock``
6, 7, 8               the lock that `execute` holds, the address of the workers' locks, the number of threads
16, 24                the barrier: threads that have arrived, and its generation
32, 40, ...           the counters of `atomics.claim`, one line per thread
====================  =======================================================================================

A caller enters with one foreign call, `execute`, and a worker never leaves `work`: neither returns to Python while a
program runs, so that an exception of a signal handler cannot interrupt a program.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from qvl_kernels.cpu import features
from qvl_kernels.cpu.atomics import fetch_add, read, write
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import get_i64

STOP = -1
"""The number of instructions that stops the workers."""
THREADS, ARRIVED, GENERATION, COUNTERS = 64, 128, 192, 256
"""Byte offsets in `control`."""
SPINS = 4000
"""Number of spins at the barrier (about 40 us) before yielding the core."""


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


@intrinsic
def _acquire(typing, function, lock):
    """Call ``int PyThread_acquire_lock(lock, WAIT_LOCK)`` by its address."""

    def codegen(context, b, sig, values):
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64), ir.IntType(32)])
        b.call(b.inttoptr(values[0], kind.as_pointer()), [values[1], ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.none(function, lock), codegen


@intrinsic
def _release(typing, function, lock):
    """Call ``void PyThread_release_lock(lock)`` by its address."""

    def codegen(context, b, sig, values):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        b.call(b.inttoptr(values[0], kind.as_pointer()), [values[1]])
        return context.get_dummy_value()

    return types.none(function, lock), codegen


@routine
def barrier(arrived, generation, counters, threads, give_way):
    """Wait for all threads, and reset the counters of `atomics.claim`.

    `arrived` and `generation` are addresses on separate cache lines.
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


@routine
def walk(control, thread):
    """Execute one thread's part of the program in `control`."""
    program, count, words, give_way = unpack(control, 4)
    threads = get_i64(control + THREADS)
    for _ in range(count):
        _call(get_i64(program), program + 8, thread, threads)
        barrier(control + ARRIVED, control + GENERATION, control + COUNTERS, threads, give_way)
        program += 8 * words


@kernel
def execute(control, program, count):
    """Run a program with all threads, after programs of other callers."""
    acquire, release, lock, wake, threads = unpack(control + 32, 5)
    _acquire(acquire, lock)
    write(control, program)
    write(control + 8, count)
    for i in range(threads - 1):
        _release(release, get_i64(wake + 8 * i))
    walk(control, 0)
    _release(release, lock)


@kernel
def work(control, thread, lock):
    """Take part in every program until stopped, and sleep on `lock` in between."""
    acquire = get_i64(control + 32)
    while True:
        _acquire(acquire, lock)
        if read(control + 8) == STOP:
            return
        walk(control, thread)
