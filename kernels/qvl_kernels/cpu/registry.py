"""Registration of kernels and routines for compilation."""

from __future__ import annotations

from collections.abc import Callable

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

KERNELS: dict[str, Callable] = {}
"""Every `kernel`, by name."""

OPTIONS = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
ENTRY = types.void(types.int64, types.int64, types.int64)


def routine(function: Callable) -> Callable:
    """Decorate a function that kernels call: it is compiled into them, without wrappers and Python exceptions."""
    return numba.njit(function, **OPTIONS)


def inlined(function: Callable) -> Callable:
    """As `routine`, always inlined, so that its vectors stay in registers. So are the routines that only it calls."""
    return numba.njit(function, forceinline=True, **OPTIONS)


def kernel(function: Callable) -> Callable:
    """Register ``function(args, thread, threads)`` under its name as an instruction (see `qvl_kernels.cpu`)."""
    if function.__name__ in KERNELS:
        raise ValueError(f"two kernels are called {function.__name__}")
    KERNELS[function.__name__] = function
    return function


@intrinsic(prefer_literal=True)
def unpack(typing, args, count):
    """Return the first `count` (a literal) arguments of an instruction as a tuple of int64."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    result = types.UniTuple(types.int64, count.literal_value)

    def codegen(context, b, sig, values):
        words = b.inttoptr(values[0], ir.IntType(64).as_pointer())
        loaded = [b.load(b.gep(words, [ir.Constant(ir.IntType(64), i)])) for i in range(count.literal_value)]
        return context.make_tuple(b, result, loaded)

    return result(args, count), codegen


def variable(name: str):
    """Create routines that read and write an int64 which the routines of a kernel share, so that few pass it on."""

    def global_(module):
        if f"qvl_{name}" in module.globals:
            return module.globals[f"qvl_{name}"]
        found = ir.GlobalVariable(module, ir.IntType(64), f"qvl_{name}")
        found.linkage, found.initializer = "linkonce_odr", ir.Constant(ir.IntType(64), 0)
        return found

    @intrinsic
    def read(typing):
        def codegen(context, b, sig, values):
            return b.load_atomic(global_(b.module), "unordered", 8)

        return types.int64(), codegen

    @intrinsic
    def write(typing, value):
        def codegen(context, b, sig, values):
            b.store_atomic(values[0], global_(b.module), "unordered", 8)
            return context.get_dummy_value()

        return types.none(value), codegen

    return read, write


@intrinsic
def as_f32(typing, word):
    """Decode a float32 argument (`qvl_kernels.cpu.runner.float_word`)."""

    def codegen(context, b, sig, values):
        return b.bitcast(b.trunc(values[0], ir.IntType(32)), ir.FloatType())

    return types.float32(word), codegen


@routine
def share(n, thread, threads):
    """Return this thread's contiguous range of 0..n; sizes differ by at most one."""
    return n * thread // threads, n * (thread + 1) // threads
