"""Atomic memory operations, and dynamic work distribution."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from qvl_kernels.cpu.registry import routine, share

I64 = ir.IntType(64)


def _pointer(b, address):
    return b.inttoptr(address, I64.as_pointer())


@intrinsic
def fetch_add(typing, addr, value):
    """Add to the int64 at `addr` and return what it was."""

    def codegen(context, b, sig, args):
        return b.atomic_rmw("add", _pointer(b, args[0]), args[1], "acq_rel")

    return types.int64(addr, value), codegen


@intrinsic
def read(typing, addr):
    def codegen(context, b, sig, args):
        return b.load_atomic(_pointer(b, args[0]), "acquire", 8)

    return types.int64(addr), codegen


@intrinsic
def write(typing, addr, value):
    def codegen(context, b, sig, args):
        b.store_atomic(args[1], _pointer(b, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.none(addr, value), codegen


@routine
def claim(counters, owner, threads, n, step):
    """Take the next `step` items of `owner`'s share of 0..n, as a range; empty if none are left.

    `counters`: one line of 64 bytes per thread, zero at the beginning of every instruction (`runner.Pool.counters`).
    A kernel processes its own share first, sequentially in memory, and then helps the other threads::

        for turn in range(threads):
            owner = (thread + turn) % threads
            first, last = claim(counters, owner, threads, n, step)
            while first < last:
                ...
                first, last = claim(counters, owner, threads, n, step)
    """
    begin, end = share(n, owner, threads)
    first = begin + fetch_add(counters + 64 * owner, step)
    return first, min(first + step, end)
