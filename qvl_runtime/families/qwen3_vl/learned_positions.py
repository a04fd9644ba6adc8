"""Learned positions of patches, interpolated from a square table for a picture of any size."""

from __future__ import annotations

import math

import numpy as np

from qvl_runtime.families.qwen2_vl.positions import patch_positions


def interpolate(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Interpolate a table of positions bilinearly; its corners are the corners of the picture.

    Parameters
    ----------
    table : ndarray
        float32 ``[side * side, width]``.
    rows, columns : int
        Number of rows and columns of patches.

    Returns
    -------
    ndarray
        float32 ``[rows * columns, width]``, in the order of `patch_positions`.
    """
    side = math.isqrt(len(table))
    row, column = patch_positions(rows, columns)
    out = np.zeros((rows * columns, table.shape[1]), np.float32)
    for y, weight_y in _taps(rows, side):
        for x, weight_x in _taps(columns, side):
            weights = (weight_y[row] * weight_x[column])[:, None]
            out += table[y[row] * side + x[column]] * weights
    return out


def _taps(count: int, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the two neighbours, in a table of `side` entries, of each of `count` rows, and their weights."""
    source = np.arange(count, dtype=np.float32) * (side - 1) / np.float32(max(count - 1, 1))
    low = np.floor(source).astype(int)
    share = (source - low).astype(np.float32)
    return [(low, 1 - share), (np.minimum(low + 1, side - 1), share)]
