"""The formulas behind the reference operations."""

from __future__ import annotations

import itertools
import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


QUERIES = 1024
"""Number of queries per block of scores."""


def erf_gelu(x: np.ndarray) -> np.ndarray:
    """Exact GELU, ``x / 2 * (1 + erf(x / sqrt 2))`` (Hendrycks and Gimpel 2016), float32."""
    return (0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))).astype(np.float32)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function in float64: a table of exact values and a third-order Taylor step.

    numpy has no erf, and `math.erf` needs one call per value. With knots 1/512 apart the error is below 1e-11.
    """
    a = np.minimum(np.abs(x.astype(np.float64)), 6.0)
    i = np.rint(a * 512).astype(np.int64)
    h = a - i / 512
    t = i / 512
    slope = 2 / math.sqrt(math.pi) * np.exp(-t * t)
    value = _ERF_KNOTS[i] + slope * h * (1 - t * h + (2 * t * t - 1) / 3 * h * h)
    return np.copysign(value, x)


_ERF_KNOTS = _erf(np.arange(6 * 512 + 1) / 512)


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)``, without overflow for large negative x."""
    e = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1, e) / (1 + e)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``, in float64, as float32."""
    x = x.astype(np.float64)
    return (0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).astype(np.float32)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(1.702 x)``, in float64, as float32."""
    x = x.astype(np.float64)
    return (x * (0.5 + 0.5 * np.tanh(0.851 * x))).astype(np.float32)


ACTIVATIONS = {"gelu": erf_gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}
"""Functions by name of `qvl_kernels.ops.Activation`."""


def rotate(x: np.ndarray, rope: np.ndarray) -> np.ndarray:
    """Half-split rotation of ``[..., T, d]``; rope ``[T, d]`` holds cos in its first half and sin in its second."""
    (a, b), (cos, sin) = np.split(x, 2, axis=-1), np.split(rope, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray | None = None) -> np.ndarray:
    """Softmax attention of each head.

    Parameters
    ----------
    q : ndarray
        float32 ``[heads, T, d]``.
    k, v : ndarray
        float32 ``[heads, S, d]``.
    visible : ndarray, optional
        bool ``[T, S]``: which positions a query may see; all by default.

    Returns
    -------
    ndarray
        float32 ``[T, heads, d]``.
    """
    out = np.empty((q.shape[1], q.shape[0], q.shape[2]), np.float32)
    for head, first in itertools.product(range(len(q)), range(0, q.shape[1], QUERIES)):
        rows = slice(first, first + QUERIES)
        scores = (q[head, rows] @ k[head].T) / np.float32(math.sqrt(q.shape[2]))
        if visible is not None:
            scores = np.where(visible[rows], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[rows, head] = (weights @ v[head]) / weights.sum(-1, keepdims=True)
    return out


def quantize_kv(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a vector: int8 ``[..., d]``, float32 ``[..., 1]``.

    The scale is rounded to fp16, as caches store it.
    """
    scale = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    return np.clip(np.rint(x / np.where(scale == 0, 1, scale)), -127, 127).astype(np.int8), scale


def dequantize_kv(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Inverse of `quantize_kv`, float32."""
    return q * scale
