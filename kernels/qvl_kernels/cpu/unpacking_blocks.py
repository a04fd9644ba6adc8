"""Weights unpacked in scratch memory as `simd.blocks` multiplies them, where `MATRIX`: a signed byte a code.

A step of eight columns has pairs of rows, each with the columns of the first row, then of the second. The first 16 rows
come before the other 16.
"""

from __future__ import annotations

from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import BYTE_BIAS, highs, loads, masks, store
from qvl_kernels.cpu.simd.assembly import STEP
from qvl_kernels.cpu.simd.blocks import zip_steps

load, lows, high_nibbles = loads("i8", 16), masks(0x0F), highs(4)


@routine
def unpack_nibbles(source, target, blocks):
    """Write `blocks` adjacent blocks of 32 rows and 128 columns of int4: four spans of 32 columns."""
    other_rows = 32 * STEP * blocks
    for _ in range(blocks):
        for step in range(0, 16, 2):
            for i in range(0, 128, 16):
                first, second = load(source + 128 * step + i), load(source + 128 * step + 128 + i)
                to = target + i // STEP * other_rows + STEP * step + 2 * (i % STEP)
                store(to, zip_steps(lows(first), lows(second)))
                store(to + 16 * STEP, zip_steps(high_nibbles(first), high_nibbles(second)))
        source += 2048
        target += 32 * STEP


@routine
def unpack_bytes(source, target, blocks):
    """Write such blocks of int8, minus `BYTE_BIAS`."""
    other_rows = 32 * STEP * blocks
    for step in range(0, 32 * blocks, 2):
        for i in range(0, 128, 16):
            both = zip_steps(load(source + 128 * step + i), load(source + 128 * step + 128 + i))
            store(target + i // STEP * other_rows + STEP * step + 2 * (i % STEP), both - BYTE_BIAS)
