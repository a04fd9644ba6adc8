"""Measures what this machine does best, once: the prefetch distance of products of a few rows (`choices`).

Block sizes follow from the caches and need no measurement. No choice changes a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from qvl_kernels.cpu import cache_sizes, choices
from qvl_kernels.cpu.choices import AHEAD, Choices
from qvl_kernels.cpu.ops import CpuOps
from qvl_kernels.cpu.runner import aligned
from qvl_kernels.packing import Matrix, packed_shapes

SIZE, GROUP = 4096, 128
"""Rows and columns of the int4 matrices."""
ROWS = 4
"""Rows of the product that is timed after that of one row: it uses another kernel on some processors."""
SECONDS, FEWEST, MOST = 1.0, 5, 25
"""After so long no round begins; the fewest rounds that are worth anything, and enough of them."""
MARGIN = 0.97
"""Another choice than the built-in one must take less than this share of its time in half of the rounds, and less time
in three quarters: other programs must not decide."""


def tune_once(ops: CpuOps) -> None:
    """Measure for this and later runs, within two seconds, unless one has, ``QVL_TUNE`` is 0, or no file can be kept.

    Nothing else should run meanwhile. Programs that were recorded before keep their values.
    """
    if choices.wanted() and choices.can_keep() and choices.kept() is None:
        found = choose(measure(ops))
        if found is not None:
            ops.choices = found
            choices.keep(found)


def measure(ops: CpuOps) -> dict[int, np.ndarray]:
    """Return the seconds of products by each of `AHEAD`, float64 ``[rounds]``, which took turns."""
    end, matrices = time.perf_counter() + SECONDS, _matrices(ops)
    steps = {ahead: _step(ops, ahead, matrices) for ahead in AHEAD}
    seconds: dict[int, list[float]] = {ahead: [] for ahead in AHEAD}
    for step in steps.values():
        step()
    while len(seconds[0]) < MOST and time.perf_counter() < end:
        for ahead, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[ahead].append(time.perf_counter() - begin)
    return {ahead: np.array(found) for ahead, found in seconds.items()}


def choose(seconds: dict[int, np.ndarray]) -> Choices | None:
    """Return the fastest by the median of its times, relative to the built-in choice's in the same round.

    None if there were too few rounds: the machine was busy, and a later run may measure.
    """
    usual = choices.built_in().ahead
    if len(seconds[usual]) < FEWEST:
        return None
    shares = {ahead: found / seconds[usual] for ahead, found in seconds.items()}
    times = {ahead: round(float(np.median(share)), 3) for ahead, share in shares.items()}
    clear = [ahead for ahead in AHEAD if times[ahead] < MARGIN and np.quantile(shares[ahead], 0.75) < 1]
    return Choices(min(clear, key=lambda ahead: times[ahead], default=usual), times)


def _matrices(ops: CpuOps) -> list:
    """Return matrices that together are larger than the caches; the codes are zero, which takes as long as others."""
    shapes = packed_shapes(SIZE, SIZE, 4, GROUP, zeros=False)
    made = []
    for _ in range(-(-2 * cache_sizes.level3() // (SIZE * SIZE // 2))):
        arrays = {}
        for name, (shape, dtype) in shapes.items():
            arrays[name] = aligned(int(np.prod(shape)), dtype).reshape(shape)
            arrays[name][...] = 0
        made.append(ops.weight(Matrix(SIZE, SIZE, 4, GROUP, arrays["qweight"], arrays["scales"])))
    return made


def _step(ops: CpuOps, ahead: int, matrices: list) -> Callable[[], None]:
    """Record products with all matrices, of one row and then of `ROWS`."""
    pairs = [(np.ones((rows, SIZE), np.float32), ops.empty((rows, SIZE))) for rows in (1, ROWS)]

    def products() -> None:
        for x, out in pairs:
            for w in matrices:
                ops.linear(x, w, out=out)

    before, ops.choices = ops.choices, Choices(ahead)
    try:
        return ops.capture(products)
    finally:
        ops.choices = before
