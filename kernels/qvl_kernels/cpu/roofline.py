"""What the machine can do at best: reading memory, and multiplying bytes out of registers."""

from __future__ import annotations

from qvl_kernels.cpu.registry import kernel, share, unpack
from qvl_kernels.cpu.simd import LANES, SUM_EL, SUM_PER_LANE, dot, loads, store, zeros

line, block, none = loads("i32", 16, 8), loads("i8", 4 * LANES), zeros("i32", 16, 8)
sums = zeros(SUM_EL, LANES * SUM_PER_LANE, 12)


@kernel
def read_memory(args, thread, threads):
    """Add up n bytes (a multiple of 512), each thread one contiguous part."""
    x, n, result = unpack(args, 3)
    first, last = share(n // 512, thread, threads)
    total = none()
    for i in range(first, last):
        total = total + line(x + 512 * i)
    store(result + 512 * thread, total)


@kernel
def multiply_bytes(args, thread, threads):
    """`rounds` times 12 independent products of a register of bytes with a broadcast word of `x`."""
    x, rounds, result = unpack(args, 3)
    total, u = sums(), block(x)
    for _ in range(rounds):
        total = dot(total, u, x + 64, 4)
    store(result + 4096 * thread, total)
