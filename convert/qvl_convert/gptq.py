"""GPTQ on one matrix: minimizes the error of the layer's output, not that of the weights.

A layer computes ``y = W x``. With ``H = sum of x x^T`` over calibration data, replacing ``W`` by ``Q`` costs
``tr((W - Q) H (W - Q)^T)``, summed over rows that do not interact. Three steps lower it:

1. `search_scales`: per row and group, the scale (and zero point) with the least error weighted by D (below).
2. One pass over the columns that pushes each column's rounding error onto the columns still to come: GPTQ (Frantar
   et al. 2022), in the formulation of QuIP's LDLQ (Chee et al. 2023), which chooses the same integers. With ``H = U D
   U^T`` (U unit upper triangular) column k is rounded at ``w_k + sum_{j<k} (w_j - q_j) U_jk``: one Cholesky factor, no
   inverse, and a product of large matrices for all that lies before a block of columns. The cost becomes
   ``sum of D_k r_k^2``, r the roundings alone.
3. `refine`: block coordinate descent on the same objective. Block by block, each group's scale is refitted to its
   integers and each integer to all the others; the objective never rises.

Columns are visited in order of falling activation energy while groups stay contiguous ("static groups"), so the
result needs no permutation at run time.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import numba
import numpy as np

from qvl_convert.jit import jit
from qvl_kernels.packing import SYMMETRIC_ZERO
from qvl_runtime.errors import QvlError

log = logging.getLogger(__name__)

WIDTH = 128
"""Columns of a block; each block is one product of large matrices."""

CHUNK = 8192
"""Rows per step; bounds the memory for an output head."""

MAX_DAMP = 1.0

PASSES = 3
"""Rounds of `refine` over a group's integers, with one scale."""


class Hessian:
    """Running ``sum of x x^T`` of a layer's inputs.

    Parameters
    ----------
    k : int
        Number of inputs of the layer.
    dtype : numpy dtype
        Type of the sum; products of one batch are always float32.
    """

    def __init__(self, k: int, dtype: np.typing.DTypeLike = np.float32) -> None:
        self.sum = np.zeros((k, k), dtype)
        self.count = 0

    def add(self, x: np.ndarray) -> None:
        """Add a batch of activations, ``[..., K]``."""
        x = np.ascontiguousarray(x, np.float32).reshape(-1, len(self.sum))
        self.sum += x.T @ x
        self.count += len(x)

    def mean(self) -> np.ndarray:
        """``H / tokens``, of the sum's dtype ``[K, K]``."""
        return self.sum / max(self.count, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """The factorized Hessian, shared by matrices with the same input.

    Attributes
    ----------
    hessian : ndarray
        float32 ``[K, K]``, damped.
    upper : ndarray
        float32 ``[K, K]``, the strictly upper part of U in visiting order.
    price : ndarray
        float32 ``[K]``, D: cost of a squared rounding error in a column after compensation by later columns.
    order : ndarray
        int ``[K]``: visiting order of the columns.
    damp : float
        Damping used, as a share of the mean diagonal.
    dead : int
        Number of columns with zero calibration inputs; they are rounded to nearest.
    """

    hessian: np.ndarray
    upper: np.ndarray
    price: np.ndarray
    order: np.ndarray
    damp: float
    dead: int


def factorize(hessian: np.ndarray, *, damp: float = 0.01, act_order: bool = True, name: str = "matrix") -> Factor:
    """Damp and factorize a Hessian ``[K, K]``.

    While the factorization fails, `damp` (a share of the mean diagonal) is multiplied by ten and a warning is logged.

    Raises
    ------
    QvlError
        If the Hessian is not finite, or stays singular up to a damping of 1.
    """
    energy = np.diagonal(hessian).astype(np.float64)
    if not np.isfinite(hessian).all():
        raise QvlError(f"{name}: the calibration activations are not finite; check the checkpoint's weights")
    unit = energy.mean() if energy.any() else 1.0
    order = np.argsort(-energy, kind="stable") if act_order else np.arange(len(energy))
    asked = damp
    while True:
        # the factor of H taken from its last column backwards is upper triangular
        backwards = hessian[np.ix_(order[::-1], order[::-1])].astype(np.float64)
        backwards[np.diag_indices_from(backwards)] += damp * unit
        try:
            lower = np.linalg.cholesky(backwards)
            break
        except np.linalg.LinAlgError:
            damp = max(damp * 10, 1e-4)
            if damp > MAX_DAMP:
                raise QvlError(
                    f"{name}: its Hessian is singular even at damping {MAX_DAMP}; use more calibration data"
                ) from None
    if damp != asked:
        log.warning("%s: its Hessian is singular at damping %g; used %g", name, asked, damp)
    del backwards
    diagonal = np.diagonal(lower)[::-1].copy()
    # a Hessian of 11008 columns takes a gigabyte in double precision: limit the number of copies
    upper = np.ascontiguousarray(lower[::-1, ::-1], np.float32)
    del lower
    upper /= diagonal.astype(np.float32)
    upper = np.triu(upper, 1)
    price = np.empty(len(order), np.float32)
    price[order] = diagonal**2
    damped = hessian.astype(np.float32)
    damped[np.diag_indices_from(damped)] += np.float32(damp * unit)
    return Factor(damped, upper, price, order, damp, int((energy == 0).sum()))


def gptq(
    weight: np.ndarray,
    factor: Factor,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    sweeps: int = 2,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Quantize a matrix.

    Parameters
    ----------
    weight : ndarray
        float ``[N, K]``.
    factor : Factor
        From `factorize` on the layer's inputs.
    bits : {4, 8}
    group_size : int
        Columns per scale; the last group may be shorter.
    sym : bool
        Zero points at the middle of the range (scales may be negative), else one per group in 1 .. 2**bits - 1 (0 is
        ambiguous in AutoGPTQ files).
    sweeps : int
        Sweeps of `refine`; 0 is plain GPTQ.

    Returns
    -------
    codes : ndarray
        uint8 ``[N, K]``, as for `qvl_kernels.packing.pack`.
    scales : ndarray
        float16 ``[N, ceil(K / group_size)]``.
    zeros : ndarray or None
        uint8 of that shape; None if `sym`.
    """
    n, k = weight.shape
    groups = -(-k // group_size)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, groups), np.float16)
    zeros = np.empty((n, groups), np.uint8)
    for start in range(0, n, CHUNK):
        rows = slice(start, start + CHUNK)
        w = np.ascontiguousarray(weight[rows], np.float32)
        s, z = search_scales(w, factor.price, bits, group_size, sym)
        q = _feedback(w, s, z, factor, bits, group_size)
        refine(w, q, s, z, factor.hessian, bits=bits, group_size=group_size, sweeps=sweeps)
        codes[rows], scales[rows], zeros[rows] = q, s, z
    return codes, scales, None if sym else zeros


def search_scales(
    w: np.ndarray, price: np.ndarray, bits: int, group_size: int, sym: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Find the scale and zero point of each row and group with the least ``sum of price * (w - q)^2``.

    Returns
    -------
    tuple of ndarray
        float32 ``[N, groups]`` (values that float16 holds) and int32 ``[N, groups]``.
    """
    shape = (len(w), -(-w.shape[1] // group_size))
    scales, zeros = np.empty(shape, np.float32), np.empty(shape, np.int32)
    _search(w, price, 2**bits - 1, group_size, SYMMETRIC_ZERO[bits] if sym else -1, scales, zeros)
    return scales, zeros


def refine(
    w: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    hessian: np.ndarray,
    *,
    bits: int,
    group_size: int,
    sweeps: int,
) -> None:
    """Lower ``tr((W - Q) H (W - Q)^T)`` by coordinate descent; `codes` and `scales` change in place.

    Parameters
    ----------
    w : ndarray
        float32 ``[N, K]``.
    codes, scales, zeros : ndarray
        uint8 ``[N, K]``, float32 and int32 ``[N, groups]``.
    hessian : ndarray
        float32 ``[K, K]``.
    """
    if sweeps == 0:
        return
    k = w.shape[1]
    error = w - dequantize(codes, scales, zeros, group_size)
    for _ in range(sweeps):
        for start in range(0, k, WIDTH):
            block = slice(start, min(start + WIDTH, k))
            gradient = error @ hessian[:, block]
            inner = np.ascontiguousarray(hessian[block, block])
            _descend(w, error, gradient, inner, codes, scales, zeros, start, 2**bits - 1, group_size)


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | int, group_size: int) -> np.ndarray:
    """Compute ``scale * (code - zero)``: float32 ``[N, K]``."""
    group = np.arange(codes.shape[1]) // group_size
    offset = zeros.astype(np.float32)[:, group] if isinstance(zeros, np.ndarray) and zeros.ndim else zeros
    return (codes.astype(np.float32) - offset) * scales.astype(np.float32)[:, group]


def output_error(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """Compute ``|X (W - Q)^T|^2 / |X W^T|^2`` for inputs with this Hessian."""
    change = weight - quantized
    return float(np.vdot(change @ hessian, change) / np.vdot(weight @ hessian, weight))


def _feedback(
    w: np.ndarray, scales: np.ndarray, zeros: np.ndarray, factor: Factor, bits: int, group_size: int
) -> np.ndarray:
    """Run the pass with error feedback: codes uint8 ``[N, K]``."""
    n, k = w.shape
    codes = np.empty((n, k), np.uint8)
    error = np.empty((n, k), np.float32)
    for start in range(0, k, WIDTH):
        stop = min(start + WIDTH, k)
        columns = factor.order[start:stop]
        target = w[:, columns] + error[:, :start] @ factor.upper[:start, start:stop]
        inner = np.ascontiguousarray(factor.upper[start:stop, start:stop])
        _round_block(w, target, inner, columns, scales, zeros, 2**bits - 1, group_size, start, error, codes)
    return codes


@numba.njit(inline="always")
def _half(x):
    """Round `x` to a nonzero float16 value."""
    exponent = max(math.frexp(x)[1], -13)
    steps = np.rint(math.ldexp(x, 11 - exponent))
    return np.float32(math.ldexp(steps if steps != 0 else 1.0, exponent - 11))


@numba.njit(inline="always")
def _nearest(x, low, high):
    return min(max(np.rint(x), low), high)


@jit(fastmath=True)
def _search(w, price, top, group_size, middle, scales, zeros):
    n, k = w.shape
    top = np.float32(top)
    for row in numba.prange(n):
        for group in range(scales.shape[1]):
            begin, end = group * group_size, min((group + 1) * group_size, k)
            low, high = np.float32(0), np.float32(0)
            for i in range(begin, end):
                low, high = min(low, w[row, i]), max(high, w[row, i])
            span = 2 * max(high, -low) if middle >= 0 else high - low
            best, best_scale, best_zero = np.float32(np.inf), _half(0.0), np.float32(max(middle, 1))
            for attempt in range(60 if span > 0 else 0):
                size = span * np.float32(1.05 - 0.0125 * attempt)
                for option in range(2 if middle >= 0 else 3):
                    if middle >= 0:
                        scale = _half(size / (top + 1) if option == 0 else -size / (top + 1))
                        zero = np.float32(middle)
                    else:
                        scale = _half(size / top)
                        zero = np.rint(-low * (size / span) / scale) + (option - 1)
                        zero = min(max(zero, np.float32(1)), top)
                    inverse, loss = np.float32(1) / scale, np.float32(0)
                    for i in range(begin, end):
                        d = w[row, i] - scale * _nearest(w[row, i] * inverse, -zero, top - zero)
                        loss += price[i] * d * d
                    if loss < best:
                        best, best_scale, best_zero = loss, scale, zero
            scales[row, group], zeros[row, group] = best_scale, np.int32(best_zero)


@jit(fastmath={"contract"})
def _round_block(w, target, inner, columns, scales, zeros, top, group_size, start, error, codes):
    n, width = target.shape
    top = np.float32(top)
    for row in numba.prange(n):
        for i in range(width):
            column = columns[i]
            group = column // group_size
            scale, zero = scales[row, group], np.float32(zeros[row, group])
            code = _nearest(target[row, i] / scale, -zero, top - zero)
            e = w[row, column] - scale * code
            codes[row, column] = np.uint8(code + zero)
            error[row, start + i] = e
            for j in range(i + 1, width):
                target[row, j] += e * inner[i, j]


@jit(fastmath={"contract"})
def _descend(w, error, gradient, inner, codes, scales, zeros, start, top, group_size):
    """Run coordinate descent within a block of columns; `gradient` is ``error @ H`` of the block.

    A change ``d`` of the block's errors costs ``2 d . gradient + d . inner . d``.
    """
    n, width = gradient.shape
    top = np.float32(top)
    diagonal = np.diag(inner)
    relax = np.float32(1) / diagonal
    for row in numba.prange(n):
        slope = gradient[row].copy()
        buffers = np.empty((7, width), np.float32)
        trial, spread, wish, now = buffers[0], buffers[1], buffers[2], buffers[3]
        code, best_code, best_slope = buffers[4], buffers[5], buffers[6]
        for begin in range(0, width, group_size):
            end = min(begin + group_size, width)
            group = (start + begin) // group_size
            scale, low = scales[row, group], -np.float32(zeros[row, group])
            high = top + low
            # with the integers fixed the objective is a parabola in the scale, its minimum at scale + up / bend
            spread[:] = 0
            up, bend = np.float32(0), np.float32(0)
            for i in range(begin, end):
                now[i] = np.float32(codes[row, start + i]) + low
                up += now[i] * slope[i]
                for j in range(width):
                    spread[j] += now[i] * inner[i, j]
            for i in range(begin, end):
                bend += now[i] * spread[i]
            fitted = scale + up / bend if bend > 0 else scale
            best, best_scale = np.float32(np.inf), scale
            for candidate in (_half(fitted), scale):
                step, inverse = scale - candidate, np.float32(1) / candidate
                gain = 2 * step * up + step * step * bend
                for j in range(width):
                    trial[j] = slope[j] + step * spread[j]
                code[begin:end] = now[begin:end]
                for _ in range(PASSES):
                    for i in range(begin, end):
                        wish[i] = _nearest(code[i] + trial[i] * relax[i] * inverse, low, high)
                    for i in range(begin, end):
                        if wish[i] == code[i]:
                            continue
                        wanted = _nearest(code[i] + trial[i] * relax[i] * inverse, low, high)
                        d = candidate * (code[i] - wanted)
                        change = d * (2 * trial[i] + d * diagonal[i])
                        if change < 0:
                            gain += change
                            code[i] = wanted
                            for j in range(width):
                                trial[j] += d * inner[i, j]
                if gain < best:
                    best, best_scale = gain, candidate
                    best_code[begin:end] = code[begin:end]
                    best_slope[:] = trial
            slope[:] = best_slope
            scales[row, group] = best_scale
            for i in range(begin, end):
                codes[row, start + i] = np.uint8(best_code[i] - low)
                error[row, start + i] = w[row, start + i] - best_scale * best_code[i]
