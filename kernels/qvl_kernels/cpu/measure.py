"""Measures the machine's limits with the backend's threads (`roofline`)."""

from __future__ import annotations

import time

import numpy as np

from qvl_kernels.cpu import features, tiles
from qvl_kernels.cpu.arrays import address
from qvl_kernels.cpu.ops import CpuOps
from qvl_kernels.cpu.runner import Program, aligned


def _seconds(ops: CpuOps, program: Program) -> float:
    begin = time.perf_counter()
    ops.run(program)
    return time.perf_counter() - begin


def read_seconds(ops: CpuOps, array: np.ndarray) -> float:
    """Return the seconds to read an array once, each thread a contiguous part."""
    program, result = Program(), aligned(512 * ops.threads)
    program.keep(array, result)
    program.add("read_memory", address(array), array.nbytes // 512 * 512, address(result))
    return _seconds(ops, program)


def bandwidth(ops: CpuOps, array: np.ndarray) -> float:
    """Return the read bandwidth in bytes a second: the best of three, because short measurements are noisy."""
    return array.nbytes / min(read_seconds(ops, array) for _ in range(3))


def products_per_second(ops: CpuOps, bits: int, rounds: int = 2_000_000) -> float:
    """Multiplications and additions a second out of registers, of nibbles or bytes: the peak of their products."""
    program, operands, result = Program(), aligned(4096), aligned(4096 * ops.threads)
    operands[:] = 1
    program.keep(operands, result)
    program.add("multiply_nibbles" if bits < 8 else "multiply_bytes", address(operands), rounds, address(result))
    level = features.selected()
    a_lane = 8 if level.matrix else 4 // tiles.value_bytes(bits)
    products = rounds * 12 * level.lanes * a_lane * ops.threads
    return 2 * products / min(_seconds(ops, program) for _ in range(3))
