"""Windows of a picture's tokens, within which most blocks of the ViT attend."""

from __future__ import annotations

import numpy as np


def windows(rows: int, columns: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Order the tokens of a picture by windows.

    Parameters
    ----------
    rows, columns : int
        Of tokens.
    side : int
        Of a window in tokens. Windows at the right and bottom edge may be smaller.

    Returns
    -------
    order : ndarray
        int64 ``[rows * columns]``: the tokens (counted row by row), window after window, row by row in each.
    lengths : ndarray
        int64: tokens of each window.
    """
    cells = np.arange(rows * columns).reshape(rows, columns)
    parts = [
        cells[top : top + side, left : left + side].ravel()
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return np.concatenate(parts), np.array([len(part) for part in parts])
