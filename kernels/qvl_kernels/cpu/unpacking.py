"""Weights unpacked in scratch memory, for products of many rows, which share the work.

int3 becomes int4. Where `UNPACKS`, unpacking in the inner loop would take a fifth of its instructions or more: there
int4 becomes a byte a code, and int8 signed bytes or, where `WORDS`, words of 16 bits. The first 16 rows come before the
other 16, so that a step of 16 rows is 64 adjacent bytes (`simd.assembly`).
"""

from __future__ import annotations

from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import BYTE_BIAS, LANES, highs, loads, masks, steps_of_int3, store
from qvl_kernels.cpu.simd.assembly import STEP
from qvl_kernels.cpu.simd.pairs import bytes_of_pairs

BYTES = 4 * LANES
step_of_int3, code_bits = steps_of_int3(BYTES), masks(0x77)
load, lows, high_nibbles = loads("i8", BYTES), masks(0x0F), highs(4)


@routine
def widen_blocks(source, target, blocks):
    """Write `blocks` adjacent blocks of 32 rows and 128 columns of int3 as int4 (`packing.widen`)."""
    for _ in range(4 * blocks):
        for i in range(0, 128, BYTES):
            store(target + i, code_bits(step_of_int3(source + i, 0)))
            store(target + 128 + i, code_bits(step_of_int3(source + i, 1)))
            store(target + 256 + i, code_bits(step_of_int3(source + i, 2)))
            store(target + 384 + i, code_bits(step_of_int3(source + i, 3)))
        source += 384
        target += 512


@routine
def unpack_nibbles(source, target, blocks):
    """Write such blocks of int4 with a byte for each code: four spans of 32 columns, each 8 steps of four."""
    other_rows = 32 * STEP * blocks
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
        target += 32 * STEP


@routine
def sign_bytes(source, target, blocks):
    """Write such blocks of int8 minus `BYTE_BIAS`."""
    other_rows = 32 * STEP * blocks
    for step in range(32 * blocks):
        for i in range(0, 128, BYTES):
            v = load(source + 128 * step + i) - BYTE_BIAS
            store(target + i // STEP * other_rows + STEP * step + i % STEP, v)


@routine
def unpack_bytes(source, target, blocks):
    """Write such blocks of int8 as words: steps of two columns, of every four the first and third first."""
    other_rows = 64 * STEP * blocks
    for step in range(32 * blocks):
        for i in range(0, 128, BYTES):
            v, to = load(source + 128 * step + i), target + i // STEP * other_rows + 2 * STEP * step + i % STEP
            store(to, bytes_of_pairs(v, 0))
            store(to + STEP, bytes_of_pairs(v, 1))
