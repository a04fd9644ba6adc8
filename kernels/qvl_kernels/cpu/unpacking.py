"""Weights unpacked in scratch memory, for products of many rows, which share the work.

int3 becomes int4. Where a processor has no product of four bytes, unpacking in the inner loop would take a fifth of its
instructions: there int4 becomes a byte a code, and int8 words of 16 bits, the first 16 rows of a piece before the other
16. A step of 16 rows is then 64 adjacent bytes (`simd.assembly`).
"""

from __future__ import annotations

from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import LANES, highs, loads, masks, steps_of_int3, store
from qvl_kernels.cpu.simd.assembly import STEP
from qvl_kernels.cpu.simd.pairs import bytes_of_pairs

BYTES = 4 * LANES
step, code_bits = steps_of_int3(BYTES), masks(0x77)
load, lows, high_nibbles = loads("i8", BYTES), masks(0x0F), highs(4)


@routine
def widen_blocks(source, target, blocks):
    """Write `blocks` adjacent blocks of 32 rows and 128 columns of int3 as int4 (`packing.widen`)."""
    for _ in range(4 * blocks):
        for i in range(0, 128, BYTES):
            store(target + i, code_bits(step(source + i, 0)))
            store(target + 128 + i, code_bits(step(source + i, 1)))
            store(target + 256 + i, code_bits(step(source + i, 2)))
            store(target + 384 + i, code_bits(step(source + i, 3)))
        source += 384
        target += 512


@routine
def unpack_nibbles(source, target, blocks):
    """Write such blocks of int4 with a byte for each code: four spans of 32 columns, each 8 steps of four."""
    other_rows = 2048 * blocks
    for _ in range(blocks):
        for step in range(8):
            for i in range(0, 128, BYTES):
                first, second = load(source + 128 * step + i), load(source + 1024 + 128 * step + i)
                to = target + i // STEP * other_rows + STEP * step + i % STEP
                store(to, lows(first))
                store(to + 8 * STEP, lows(second))
                store(to + 16 * STEP, high_nibbles(first))
                store(to + 24 * STEP, high_nibbles(second))
        source += 2048
        target += 2048


@routine
def unpack_bytes(source, target, spans, steps):
    """Write spans of int8 as words: the first and third byte of every four in all steps, then the others."""
    other_bytes = STEP * steps
    other_rows = 2 * other_bytes * spans
    for _ in range(spans):
        for step in range(steps):
            for i in range(0, 128, BYTES):
                v = load(source + 128 * step + i)
                to = target + i // STEP * other_rows + STEP * step + i % STEP
                store(to, bytes_of_pairs(v, 0))
                store(to + other_bytes, bytes_of_pairs(v, 1))
        source += 128 * steps
        target += 2 * other_bytes
