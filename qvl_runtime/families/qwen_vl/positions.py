"""Positions: rotary tables with dynamic NTK, log-n scales, interpolated position embeddings."""

from __future__ import annotations

import functools
import math

import numpy as np

from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.rope import cos_sin, inverse_frequencies


def ntk_alpha(length: int, config: ModelConfig) -> int:
    """Return the dynamic-NTK factor of a prompt of `length` tokens: 1 up to `seq_length`, then 3, 7, 15, …

    ``max(2^ceil(log2(length / seq_length) + 1) - 1, 1)``, as in the published model's prefill.
    """
    if not config.use_dynamic_ntk or length <= config.seq_length:
        return 1
    return 2 ** math.ceil(math.log2(length / config.seq_length) + 1) - 1


@functools.lru_cache(maxsize=8)
def rotary_table(positions: int, alpha: int, config: ModelConfig) -> np.ndarray:
    """Compute cosines and sines of every position: float32 ``[positions, head_dim]``, cos first; read-only.

    The base is ``rotary_emb_base * alpha^(d / (d - 2))``. Angles are rounded to float32 as in the published model,
    which matters at long context.
    """
    d = config.head_dim
    base = config.rotary_emb_base * alpha ** (d / (d - 2)) if alpha > 1 else config.rotary_emb_base
    table = cos_sin(np.arange(positions, dtype=np.float32)[:, None] * inverse_frequencies(d, base))
    table.flags.writeable = False
    return table


def logn_table(positions: int, config: ModelConfig) -> np.ndarray:
    """Compute the log-n factor of each query: float32 ``[positions]``, ln(p + 1) / ln(L) beyond L."""
    scale = np.ones(positions, np.float32)
    if config.use_logn_attn:
        beyond = np.arange(config.seq_length + 1, positions + 1)
        scale[config.seq_length :] = np.log(beyond) / math.log(config.seq_length)
    return scale


def interpolate_grid(embedding: np.ndarray, grid: int) -> np.ndarray:
    """Resize position embeddings of a square grid to ``grid x grid``.

    Bicubic as in ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``: a = -0.75, clamped
    borders, no antialiasing.

    Parameters
    ----------
    embedding : ndarray
        float32 ``[s * s, width]``.

    Returns
    -------
    ndarray
        float32 ``[grid * grid, width]``.
    """
    side = math.isqrt(len(embedding))
    if side == grid:
        return embedding
    resize = _bicubic_matrix(side, grid)
    square = embedding.reshape(side, side, -1).astype(np.float64)
    out = np.einsum("yi,xj,ijc->yxc", resize, resize, square, optimize=True)
    return out.reshape(grid * grid, -1).astype(np.float32)


def _bicubic_matrix(size: int, target: int) -> np.ndarray:
    """Compute the weights ``[target, size]`` of a one-dimensional bicubic resize (Keys 1981, a = -0.75)."""
    a = -0.75
    centre = (np.arange(target) + 0.5) * size / target - 0.5
    left = np.floor(centre).astype(int)
    matrix = np.zeros((target, size))
    for tap in range(-1, 3):
        x = np.abs(centre - (left + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(matrix, (np.arange(target), np.clip(left + tap, 0, size - 1)), np.where(x <= 1, near, far))
    return matrix
