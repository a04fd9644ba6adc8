"""M-RoPE positions of a prompt, and rotary rows of tokens and patches."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qvl_runtime.families.qwen2_vl.config import MERGE, VISION_ROPE_BASE, ModelConfig, VisionConfig
from qvl_runtime.families.rope import cos_sin, inverse_frequencies


def patch_positions(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of every patch, int64 ``[rows * columns]``; the four patches of a token are adjacent."""
    grid = np.mgrid[0:rows, 0:columns].reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
    row, column = grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return row, column


def patch_rotary(rows: int, columns: int, config: VisionConfig) -> np.ndarray:
    """Compute rotary rows of patches, in the order of `patch_positions`. Half of the frequencies encode the row.

    Returns
    -------
    ndarray
        float32 ``[rows * columns, head_dim]``, cos in its first half.
    """
    frequencies = inverse_frequencies(config.head_dim // 2, VISION_ROPE_BASE)
    angles = [axis[:, None].astype(np.float32) * frequencies for axis in patch_positions(rows, columns)]
    return cos_sin(np.concatenate(angles, axis=1))


def position_ids(length: int, slots: Iterable[tuple[int, int, int, int | None]]) -> tuple[np.ndarray, int]:
    """Compute the positions (time, height, width) of a prompt's tokens (M-RoPE, Wang et al. 2024).

    A text token has the next position on all axes. The tokens of a picture extend over height and width from there;
    text continues after the longer side. All frames of a video start at the video's first position, each with its own
    time; text continues after the highest position.

    Parameters
    ----------
    length : int
        Tokens of the prompt.
    slots : iterable of (int, int, int, int or None)
        First token, rows and columns of each picture, and the time of video frames; see `Slot`. In order.

    Returns
    -------
    positions : ndarray
        int64 ``[3, length]``.
    delta : int
        Position minus index of the tokens after the prompt.
    """
    positions = np.empty((3, length), np.int64)
    index = position = first = 0
    for start, rows, columns, time in slots:
        positions[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        if time is None or start > index:
            first = position
        moment = time or 0
        grid = np.mgrid[moment : moment + 1, 0:rows, 0:columns].reshape(3, -1)
        index = start + rows * columns
        positions[:, start:index] = first + grid
        position = max(position, first + max(rows, columns, moment + 1))
    positions[:, index:] = np.arange(position, position + length - index)
    return positions, position - index


def rotary_rows(positions: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Compute rotary rows of tokens.

    Parameters
    ----------
    positions : ndarray
        int64 ``[3, T]``: time, height, width.

    Returns
    -------
    ndarray
        float32 ``[T, head_dim]``, cos in its first half.
    """
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
    chosen = positions[frequency_axes(config)].T
    return cos_sin(chosen.astype(np.float32) * frequencies)


def frequency_axes(config: ModelConfig) -> np.ndarray:
    """Return the axis of each rotary frequency, int64 ``[head_dim / 2]``: 0 time, 1 height, 2 width."""
    if not config.INTERLEAVED:
        return np.repeat(np.arange(3), config.mrope_section)
    axes = np.zeros(config.head_dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * config.mrope_section[axis] : 3] = axis
    return axes
