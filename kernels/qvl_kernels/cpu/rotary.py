"""Rotary embedding of one head, and the normalization of a query or key before it."""

from __future__ import annotations

from qvl_kernels.cpu.quantize import row_statistics, take
from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import store, store_part


@routine
def put(target, v, count):
    """Write a vector, or its first `count` values."""
    if count >= 16:
        store(target, v)
    else:
        store_part(target, v, count)


@routine
def rotate(x, angles, half, factor, target):
    """``[a cos - b sin, b cos + a sin] * factor`` of the halves a, b of a head; `angles`: `half` cosines, then sines.

    `target` may be x itself.
    """
    for i in range(0, half, 16):
        count = half - i
        a, b = take(x + 4 * i, count), take(x + 4 * (half + i), count)
        c, s = take(angles + 4 * i, count), take(angles + 4 * (half + i), count)
        put(target + 4 * i, (a * c - b * s) * factor, count)
        put(target + 4 * (half + i), (b * c + a * s) * factor, count)


@routine
def normalize_head(x, weight, d, eps):
    """RMSNorm of a head, in place; `weight` 0: none."""
    if weight == 0:
        return
    _, scale = row_statistics(x, d, False, eps)
    for i in range(0, d, 16):
        put(x + 4 * i, take(x + 4 * i, d - i) * scale * take(weight + 4 * i, d - i), d - i)
