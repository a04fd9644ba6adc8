"""The machine's own limits, measured with the backend's threads (`roofline`), to hold speeds against."""

from __future__ import annotations

import time

import numpy as np

from qvl_kernels.cpu import features
from qvl_kernels.cpu.arrays import address
from qvl_kernels.cpu.ops import CpuOps
from qvl_kernels.cpu.runner import Program, aligned


def _seconds(ops: CpuOps, program: Program) -> float:
    begin = time.perf_counter()
    ops.run(program)
    return time.perf_counter() - begin


def read_seconds(ops: CpuOps, array: np.ndarray) -> float:
    """Seconds to read an array once, every thread its own contiguous part."""
    program, result = Program(), aligned(512 * ops.threads)
    program.keep(array, result)
    program.add("read_memory", address(array), array.nbytes // 512 * 512, address(result))
    return _seconds(ops, program)


def bandwidth(ops: CpuOps, array: np.ndarray) -> float:
    """Bytes a second of reading an array, the best of three, since a short reading is easily disturbed."""
    return array.nbytes / min(read_seconds(ops, array) for _ in range(3))


def byte_products_per_second(ops: CpuOps, rounds: int = 2_000_000) -> float:
    """Multiplications and additions of int8 a second out of registers: the peak of a matrix product."""
    program, operands, result = Program(), aligned(4096), aligned(4096 * ops.threads)
    operands[:] = 1
    program.keep(operands, result)
    program.add("multiply_bytes", address(operands), rounds, address(result))
    lanes = features.selected().lanes
    return rounds * 12 * lanes * 4 * 2 * ops.threads / min(_seconds(ops, program) for _ in range(3))
