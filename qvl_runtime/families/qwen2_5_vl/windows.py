"""Attention windows of the ViT."""

from __future__ import annotations

import numpy as np


def windows(rows: int, columns: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Order the tokens of a picture by windows.

    Parameters
    ----------
    rows, columns : int
        Number of rows and columns of tokens.
    side : int
        Side of a window in tokens. Windows at the right and bottom edges may be smaller.

    Returns
    -------
    order : ndarray
        int64 ``[rows * columns]``: token indices (row-major in the picture), by window, row-major in each window.
    lengths : ndarray
        int64: number of tokens of each window.
    """
    cells = np.arange(rows * columns).reshape(rows, columns)
    parts = [
        cells[top : top + side, left : left + side].ravel()
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return np.concatenate(parts), np.array([len(part) for part in parts])
