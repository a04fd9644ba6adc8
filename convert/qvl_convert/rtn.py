"""Round-to-nearest group quantization to the packed layout.

Symmetric: ``scale = max|w| / qmax`` over a group of columns (qmax 7 or 127), ``q = round(w / scale)``. Asymmetric:
``scale = (max - min) / (2^bits - 1)`` with 0 inside the range, ``zero = round(-min / scale)``. Scales are rounded to
fp16 first and codes chosen for the rounded scale.
"""

from __future__ import annotations

import numba
import numpy as np

from qvl_convert.jit import jit
from qvl_kernels.packing import BLOCK, ROWS, Matrix, pack_groups, packed_shapes, round_up
from qvl_runtime.errors import QvlError

CHUNK_VALUES = 16 << 20
FP16_MAX = 65504.0


def group_scales(
    low: np.ndarray, high: np.ndarray, bits: int, *, asymmetric: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compute scales and zero points for the ranges of groups.

    Parameters
    ----------
    low, high : ndarray
        Smallest and largest value of each group, float32, any shape.
    bits : int
        4 or 8.

    Returns
    -------
    scales : ndarray
        fp16; infinite if a group's range is beyond fp16.
    zeros : ndarray
        uint8, as stored integers.
    """
    levels = 2**bits - 1
    if not asymmetric:
        scales = np.maximum(-low, high) / np.float32(levels // 2)
        return _to_half(scales), np.full(low.shape, levels // 2 + 1, np.uint8)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = _to_half(high / np.float32(levels) - low / np.float32(levels))
    step = scales.astype(np.float32)
    zeros = np.divide(-low, step, out=np.zeros_like(step), where=(step > 0) & np.isfinite(step))
    return scales, np.clip(np.rint(zeros), 0, levels).astype(np.uint8)


def _to_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def quantize(
    weight: np.ndarray,
    bits: int,
    group_size: int,
    *,
    asymmetric: bool = False,
    bias: np.ndarray | None = None,
    name: str = "the matrix",
) -> Matrix:
    """Quantize a matrix by rounding each weight to nearest.

    Parameters
    ----------
    weight : ndarray
        ``[n, k]``, bfloat16, float16 or float32; read in slices of rows.
    bits, group_size : int
        4 or 8; 32, 64 or 128.
    bias : ndarray, optional
        float32 ``[n]``, part of the result.
    name : str
        Name of the matrix for errors.

    Raises
    ------
    QvlError
        If a weight is not finite, or too large for an fp16 scale.
    """
    n, k = weight.shape
    shapes = packed_shapes(n, k, bits, group_size, zeros=asymmetric)
    arrays = {suffix: np.empty(*spec) for suffix, spec in shapes.items()}
    rows = max(ROWS, CHUNK_VALUES // k // ROWS * ROWS)
    groups = -(-k // group_size)
    for start in range(0, n, rows):
        chunk = np.ascontiguousarray(weight[start : start + rows], np.float32)
        low, high = np.empty((2, len(chunk), groups), np.float32)
        _ranges(chunk, group_size, low, high)
        scales, zeros = group_scales(low, high, bits, asymmetric=asymmetric)
        if not np.isfinite(scales).all():
            raise QvlError(
                f"{name} holds a weight that is not finite or too large for an fp16 scale; download the model again"
            )
        blocks = slice(start // ROWS, start // ROWS + round_up(len(chunk), ROWS) // ROWS)
        arrays["scales"][blocks] = pack_groups(scales, k, group_size, np.float16)
        if asymmetric:
            arrays["zeros"][blocks] = pack_groups(zeros, k, group_size, np.uint8)
        _pack(chunk, scales.astype(np.float32), zeros, group_size, bits, arrays["qweight"][blocks])
    return Matrix(
        n=n,
        k=k,
        bits=bits,
        group_size=group_size,
        weight=arrays["qweight"],
        scales=arrays["scales"],
        zeros=arrays.get("zeros"),
        bias=bias,
    )


@jit()
def _ranges(weight, group_size, low, high):
    """Compute smallest and largest value of each group; infinite if a value is not finite."""
    n, k = weight.shape
    for row in numba.prange(n):
        for group in range(low.shape[1]):
            smallest = largest = weight[row, group * group_size]
            finite = True
            for column in range(group * group_size, min(k, (group + 1) * group_size)):
                value = weight[row, column]
                finite &= abs(value) < np.inf
                smallest = min(smallest, value)
                largest = max(largest, value)
            low[row, group] = smallest if finite else -np.inf
            high[row, group] = largest if finite else np.inf


@jit()
def _pack(weight, scales, zeros, group_size, bits, packed):
    """Round to codes and store them in the layout of `qvl_kernels.packing`."""
    n, k = weight.shape
    top = 2**bits - 1
    padding = np.uint8(top // 2 + 1)
    for block in numba.prange(packed.shape[0]):
        codes = np.empty(BLOCK, np.uint8)
        for lane in range(ROWS):
            row = block * ROWS + lane
            for column_block in range(packed.shape[1]):
                first = column_block * BLOCK
                codes[:] = padding
                if row < n:
                    for start in range(first, min(k, first + BLOCK), group_size):
                        scale = scales[row, start // group_size]
                        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
                        zero = np.float32(zeros[row, start // group_size])
                        for column in range(start, min(k, start + group_size)):
                            code = np.rint(weight[row, column] * inverse) + zero
                            codes[column - first] = np.uint8(min(max(code, np.float32(0)), np.float32(top)))
                for step in range(packed.shape[2]):
                    for byte in range(4):
                        code = codes[4 * step + byte]
                        if bits == 4:
                            code |= codes[4 * step + byte + 64] << 4
                        packed[block, column_block, step, lane, byte] = code
