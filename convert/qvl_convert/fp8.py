"""Qwen's FP8 releases: dequantization of e4m3 weights with a scale for each block of 128 x 128.

``w = weight * weight_scale_inv`` of its block. Such a model is quantized again, because FP8 codes are not integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qvl_runtime.errors import QvlError

SCALE = "_scale_inv"
REMEDY = "take the unquantized model"


def block_size(config: Mapping[str, Any], path: str) -> tuple[int, int] | None:
    """Return the rows and columns per scale of a `config.json`; None without FP8 weights.

    Raises
    ------
    QvlError
        For another FP8 format.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return None
    if settings.get("fmt", "e4m3") != "e4m3":
        raise QvlError(f"{path}: 'fmt' is {str(settings['fmt'])[:60]!r}, only 'e4m3' is read; {REMEDY}")
    size = settings.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise QvlError(f"{path}: 'weight_block_size' is {str(size)[:60]!r}, expected two numbers; {REMEDY}")
    return size[0], size[1]


def dequantize(weight: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Dequantize FP8 weights.

    Parameters
    ----------
    weight : ndarray
        float8_e4m3fn ``[n, k]``.
    scales : ndarray
        ``[ceil(n / rows), ceil(k / columns)]`` for blocks of ``rows, columns``.

    Returns
    -------
    ndarray
        float32 ``[n, k]``.
    """
    values = weight.astype(np.float32)
    rows, columns = (min(side, size) for side, size in zip(block, weight.shape))  # a block may be larger than all
    scales = np.repeat(scales.astype(np.float32), columns, axis=1)[:, : values.shape[1]]
    for i, row in enumerate(scales):
        values[i * rows : (i + 1) * rows] *= row
    return values
