"""Round-to-nearest group quantization to the packed layout.

``scale = max|w| / qmax`` over a group of columns (qmax 3, 7 or 127), ``q = round(w / scale)``. Scales are rounded to
fp16 first and codes chosen for the rounded scale.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qvl_kernels.cpu.runner import default_threads
from qvl_kernels.packing import ROWS, SYMMETRIC_ZERO, Matrix, pack_codes, pack_groups, packed_shapes, round_up
from qvl_kernels.threads import no_thread
from qvl_runtime.errors import QvlError

CHUNK_VALUES = 1 << 20
"""Weights that a thread rounds at a time: they stay in the cache."""


def quantize(
    weight: np.ndarray,
    bits: int,
    group_size: int,
    *,
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
    DeviceError
        If the system grants no thread.
    """
    n, k = weight.shape
    shapes, middle = packed_shapes(n, k, bits, group_size), SYMMETRIC_ZERO[bits]
    arrays = {suffix: np.empty(*spec) for suffix, spec in shapes.items()}
    rows = max(ROWS, CHUNK_VALUES // k // ROWS * ROWS)

    def round_rows(start: int) -> bool:
        chunk = _in_groups(weight[start : start + rows], group_size)
        with np.errstate(over="ignore"):
            scales = (np.maximum(-chunk.min(axis=2), chunk.max(axis=2)) / np.float32(middle - 1)).astype(np.float16)
        if not np.isfinite(scales).all():
            return False
        blocks = slice(start // ROWS, start // ROWS + round_up(len(chunk), ROWS) // ROWS)
        arrays["scales"][blocks] = pack_groups(scales, k, group_size, np.float16)
        codes = _round(chunk, scales.astype(np.float32), middle)
        arrays["qweight"][blocks] = pack_codes(codes[:, :k], bits)
        return True

    with ThreadPoolExecutor(default_threads()) as pool:
        try:
            rounded = pool.map(round_rows, range(0, n, rows))  # this starts the threads
        except RuntimeError as error:
            raise no_thread(error) from None
        if not all(rounded):
            raise unfit(name)
    return Matrix(
        n=n,
        k=k,
        bits=bits,
        group_size=group_size,
        weight=arrays["qweight"],
        scales=arrays["scales"],
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


def _round(values: np.ndarray, scales: np.ndarray, middle: int) -> np.ndarray:
    """Round groups to codes, uint8 ``[n, k]``, in place of `values`."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    with np.errstate(over="ignore"):
        values *= inverse[:, :, None]
    np.rint(values, out=values)
    values += np.float32(middle)
    np.clip(values, 0, 2 * middle - 1, out=values)
    return values.astype(np.uint8).reshape(len(values), -1)
