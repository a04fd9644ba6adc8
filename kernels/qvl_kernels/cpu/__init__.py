"""The CPU backend: `CpuOps`; how its kernels are written, compiled and run.

Every operation is one or a few *instructions*. An instruction is a row of int64: the address of a compiled kernel and
its arguments (addresses of arrays, sizes, float32 bits). A `runner.Program` is a list of them; all threads of the
`runner.Pool` walk through it together, with a barrier after each instruction, outside the GIL. An eager operation runs
a separate program; `CpuOps.capture` records a whole token and replays it with one call.

A kernel is a Python function in one of the modules `kernels.MODULES` names::

    from qvl_kernels.cpu.registry import kernel, routine, share, unpack
    from qvl_kernels.cpu.simd import loads, store

    load = loads("f32", 16)

    @routine                                  # helpers: compiled into the kernels that call them
    def add_range(x, y, out, i, j): ...

    @kernel                                   # an instruction; returns nothing
    def add(args, thread, threads):
        x, y, out, n = unpack(args, 4)        # what `program.add("add", x, y, out, n)` was given, all int64
        i, j = share(n, thread, threads)      # this thread's part; every thread is called, barrier afterwards
        add_range(x, y, out, i, j)

A float argument is passed as ``runner.float_word(value)`` and read by ``registry.as_f32(word)``. Kernels use `simd` on
raw addresses, allocate nothing and raise nothing. Scratch memory comes from the caller as an address. Long kernels take
their work in steps with `atomics.claim`, so that a thread that is held up does not hold up the others.

Numba only generates machine code: `build` compiles them on first use, in three parts and in a process of its own, and
`cache` stores it in the user's cache folder under a name with a hash of these sources, the versions of Numba and
llvmlite, and the processor. Later llvmlite loads it in milliseconds, and Numba is not imported. Choose a variant (per
head size, per type) by making several kernels from one factory."""

from qvl_kernels.cpu.ops import CpuOps
from qvl_kernels.cpu.sizes import SIZES

__all__ = ["SIZES", "CpuOps"]
