"""Kernels that measure the machine's limits: memory bandwidth, and byte products from registers."""

from __future__ import annotations

from qvl_kernels.cpu.registry import inlined, kernel, share, unpack
from qvl_kernels.cpu.simd import (
    LANES,
    MATRIX,
    SUM_EL,
    SUM_PER_LANE,
    UNPACKS,
    WORDS,
    dot,
    dot_bytes,
    loads,
    store,
    zeros,
)
from qvl_kernels.cpu.simd.blocks import dot_blocks, dot_lanes
from qvl_kernels.cpu.simd.pairs import dot_pairs_narrow

line, block, none = loads("i32", 16, 8), loads("i8", 4 * LANES), zeros("i32", 16, 8)
words = loads("i32", LANES)
three, four = loads("i8", 16, 3), loads("i8", 16, 4)
sums, any_sums = zeros(SUM_EL, LANES * SUM_PER_LANE, 12), zeros("i32", LANES, 12)
SIGNED = UNPACKS and not WORDS


@inlined
def multiply_signed(total, u, s):
    if MATRIX:
        return dot_blocks(total, three(u), four(s))
    return dot_lanes(total, block(u), three(s))


@kernel
def read_memory(args, thread, threads):
    """Sum n bytes (a multiple of 512), each thread a contiguous part."""
    x, n, result = unpack(args, 3)
    first, last = share(n // 512, thread, threads)
    total = none()
    for i in range(first, last):
        total = total + line(x + 512 * i)
    store(result + 512 * thread, total)


@kernel
def multiply_nibbles(args, thread, threads):
    """`rounds` times 12 independent products of a register of nibbles with a broadcast word of `x`, or as tiles do."""
    x, rounds, result = unpack(args, 3)
    total = sums()
    for i in range(rounds):
        # Other operands every time: the same ones would be multiplied, or spread, before the loop.
        if SIGNED:
            total = multiply_signed(total, x + 64 * (i & 7), x + 512 + 64 * (i & 7))
        else:
            total = dot(total, block(x + 64 * (i & 7)), x + 512 + 64 * (i & 7), 4)
    store(result + 4096 * thread, total)


@kernel
def multiply_bytes(args, thread, threads):
    """As `multiply_nibbles`, of bytes: with `WORDS`, of half as many as pairs of 16 bits."""
    x, rounds, result = unpack(args, 3)
    total = any_sums()
    for i in range(rounds):
        if SIGNED:
            total = multiply_signed(total, x + 64 * (i & 7), x + 512 + 64 * (i & 7))
        elif WORDS:
            total = dot_pairs_narrow(total, words(x + 64 * (i & 7)), x + 512 + 64 * (i & 7), 4)
        else:
            total = dot_bytes(total, block(x + 64 * (i & 7)), x + 512 + 64 * (i & 7), 4)
    store(result + 4096 * thread, total)
