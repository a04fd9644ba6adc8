"""Round-to-nearest group quantization to the packed layout.

Symmetric: ``scale = max|w| / qmax`` over a group of columns (qmax 3, 7 or 127), ``q = round(w / scale)``. Asymmetric:
``scale = (max - min) / (2^bits - 1)`` with 0 inside the range, ``zero = round(-min / scale)``. Scales are rounded to
fp16 first and codes chosen for the rounded scale.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qvl_kernels.cpu.runner import default_threads
from qvl_kernels.packing import ROWS, Matrix, pack_codes, pack_groups, packed_shapes, round_up
from qvl_runtime.errors import QvlError

CHUNK_VALUES = 1 << 20
"""Weights that a thread rounds at a time: they stay in the cache."""


def group_scales(
    low: np.ndarray, high: np.ndarray, bits: int, *, asymmetric: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compute scales and zero points for the ranges of groups.

    Parameters
    ----------
    low, high : ndarray
        Smallest and largest value of each group, float32, any shape.
    bits : int
        3, 4 or 8.

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
        3, 4 or 8; 32 (not with 3 bits), 64 or 128.
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

    def round_rows(start: int) -> bool:
        chunk = _in_groups(weight[start : start + rows], group_size)
        scales, zeros = group_scales(chunk.min(axis=2), chunk.max(axis=2), bits, asymmetric=asymmetric)
        if not np.isfinite(scales).all():
            return False
        blocks = slice(start // ROWS, start // ROWS + round_up(len(chunk), ROWS) // ROWS)
        arrays["scales"][blocks] = pack_groups(scales, k, group_size, np.float16)
        if asymmetric:
            arrays["zeros"][blocks] = pack_groups(zeros, k, group_size, np.uint8)
        codes = _round(chunk, scales.astype(np.float32), zeros, 2**bits - 1)
        arrays["qweight"][blocks] = pack_codes(codes[:, :k], bits)
        return True

    with ThreadPoolExecutor(default_threads()) as pool:
        if not all(pool.map(round_rows, range(0, n, rows))):
            raise unfit(name)
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


def unfit(name: str) -> QvlError:
    """Return the error for a matrix that cannot be quantized."""
    return QvlError(
        f"{name} holds a weight that is not finite or too large for an fp16 scale; download the model again"
    )


def _in_groups(weight: np.ndarray, group_size: int) -> np.ndarray:
    """Copy rows to float32 ``[n, groups, group_size]``; columns are added as 0, which moves no range."""
    n, k = weight.shape
    padded = np.zeros((n, round_up(k, group_size)), np.float32)
    padded[:, :k] = weight
    return padded.reshape(n, -1, group_size)


def _round(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, top: int) -> np.ndarray:
    """Round groups to codes, uint8 ``[n, k]``, in place of `values`."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    with np.errstate(over="ignore"):
        values *= inverse[:, :, None]
    np.rint(values, out=values)
    values += zeros[:, :, None].astype(np.float32)
    np.clip(values, 0, top, out=values)
    return values.astype(np.uint8).reshape(len(values), -1)
