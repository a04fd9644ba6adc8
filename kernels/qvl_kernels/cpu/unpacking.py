"""Weights unpacked in scratch memory, for products of many rows, which share the work.

int3 becomes int4. Where a processor has no product of four bytes, unpacking in the inner loop would take a fifth of its
instructions: there int4 becomes a byte a code, and int8 words of 16 bits.
"""

from __future__ import annotations

from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import LANES, highs, loads, masks, steps_of_int3, store
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
    """Write such blocks of int4 with a byte for each code: four spans of 32 columns, each 8 steps of 32 rows."""
    for _ in range(blocks):
        for i in range(0, 1024, BYTES):
            first, second = load(source + i), load(source + 1024 + i)
            store(target + i, lows(first))
            store(target + 1024 + i, lows(second))
            store(target + 2048 + i, high_nibbles(first))
            store(target + 3072 + i, high_nibbles(second))
        source += 2048
        target += 4096


@routine
def unpack_bytes(source, target, spans, steps):
    """Write spans of int8 as words: the first and third byte of every four in all steps, then the others."""
    others = 128 * steps
    for _ in range(spans):
        for i in range(0, others, BYTES):
            v = load(source + i)
            store(target + i, bytes_of_pairs(v, 0))
            store(target + others + i, bytes_of_pairs(v, 1))
        source += others
        target += 2 * others
