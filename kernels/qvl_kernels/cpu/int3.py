"""int3 weights as int4 in scratch memory, for products of many rows, which share the work."""

from __future__ import annotations

from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import LANES, masks, steps_of_int3, store

BYTES = 4 * LANES
step, code_bits = steps_of_int3(BYTES), masks(0x77)


@routine
def widen_blocks(source, target, blocks):
    """Write `blocks` adjacent blocks of 32 rows and 128 columns at `source` to `target` as int4 (`packing.widen`)."""
    for _ in range(4 * blocks):
        for i in range(0, 128, BYTES):
            store(target + i, code_bits(step(source + i, 0)))
            store(target + 128 + i, code_bits(step(source + i, 1)))
            store(target + 256 + i, code_bits(step(source + i, 2)))
            store(target + 384 + i, code_bits(step(source + i, 3)))
        source += 384
        target += 512
