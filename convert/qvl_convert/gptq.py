"""GPTQ on one matrix: minimizes the error of the layer's output, not that of the weights.

A layer computes ``y = W x``. With ``H = sum of x x^T`` over calibration data, replacing ``W`` by ``Q`` costs
``tr((W - Q) H (W - Q)^T)``, summed over rows that do not interact. Three steps lower it:

1. `search_scales`: per row and group, the scale (and zero point) with the least error weighted by D (below).
2. One pass over the columns that pushes each column's rounding error onto the columns still to come: GPTQ (Frantar
   et al. 2022), in the formulation of QuIP's LDLQ (Chee et al. 2023), which chooses the same integers. With ``H = U D
   U^T`` (U unit upper triangular) column k is rounded at ``w_k + sum_{j<k} (w_j - q_j) U_jk``: one Cholesky factor, no
   inverse, and a product of large matrices for all that lies before a block of columns. The cost becomes
   ``sum of D_k r_k^2``, r the roundings alone. When a block has been rounded, coordinate descent lowers its part of
   this sum before the next block sees its errors.
3. `refine`: block coordinate descent on the same objective. Block by block, each group's scale is refitted to its
   integers and each integer to all the others; the objective never rises.

Columns are visited in order of falling activation energy while groups stay contiguous ("static groups"), so the
result needs no permutation at run time.
"""

from __future__ import annotations

import numpy as np

from qvl_convert import gptq_kernels as kernels
from qvl_convert import gptq_rounding as rounding
from qvl_convert.hessian import Factor
from qvl_convert.rtn import unfit
from qvl_kernels.packing import SYMMETRIC_ZERO

WIDTH = 128
"""Columns of a block."""

SPAN = 4 * WIDTH
"""Columns onto which the errors of all columns before are pushed in one product of large matrices."""

TURNS = 4
"""Rounds over the integers of a block that has just been rounded."""

HALF = float(np.finfo(np.float16).max)

CHUNK = 8192
"""Rows per step; bounds the memory for an output head."""


def gptq(
    weight: np.ndarray,
    factor: Factor,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    sweeps: int | None = None,
    name: str = "the matrix",
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Quantize a matrix.

    Parameters
    ----------
    weight : ndarray
        float ``[N, K]``.
    factor : Factor
        From `factorize` on the layer's inputs.
    bits : {3, 4, 8}
    group_size : int
        Columns per scale; the last group may be shorter.
    sym : bool
        Zero points at the middle of the range (scales may be negative), else one per group in 1 .. 2**bits - 1 (0 is
        ambiguous in AutoGPTQ files).
    sweeps : int
        Sweeps of `refine`; by default `usual_sweeps`.
    name : str
        Name of the matrix for errors.

    Returns
    -------
    codes : ndarray
        uint8 ``[N, K]``, as for `qvl_kernels.packing.pack`.
    scales : ndarray
        float16 ``[N, ceil(K / group_size)]``.
    zeros : ndarray or None
        uint8 of that shape; None if `sym`.

    Raises
    ------
    QvlError
        If a weight is not finite, or too large for an fp16 scale.
    """
    n, k = weight.shape
    groups = -(-k // group_size)
    sweeps = usual_sweeps(group_size) if sweeps is None else sweeps
    limit = HALF * (2 ** (bits - 1) - 1)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, groups), np.float16)
    zeros = np.empty((n, groups), np.uint8)
    for start in range(0, n, CHUNK):
        rows = slice(start, start + CHUNK)
        w = np.ascontiguousarray(weight[rows], np.float32)
        # also for NaN; the search compares losses, which larger weights make infinite
        if not max(w.max(), -w.min()) <= limit:
            raise unfit(name)
        s, z = search_scales(w, factor.price, bits, group_size, sym)
        q = _feedback(w, s, z, factor, bits, group_size)
        refine(w, q, s, z, factor.hessian, bits=bits, group_size=group_size, sweeps=sweeps)
        if not np.abs(s).max() <= HALF:
            raise unfit(name)
        codes[rows], scales[rows], zeros[rows] = q, s, z
    return codes, scales, None if sym else zeros


def usual_sweeps(group_size: int) -> int:
    """One sweep if groups are shorter than a block: with many scales, fitting them pays for twice the products."""
    return int(group_size < WIDTH)


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
    kernels.search(w, price, 2**bits - 1, group_size, SYMMETRIC_ZERO[bits] if sym else -1, scales, zeros)
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
    error, last, moved, slopes = (np.zeros_like(w) for _ in range(4))
    kernels.errors(w, codes, scales, zeros, group_size, error)
    blocks = [slice(start, min(start + WIDTH, k)) for start in range(0, k, WIDTH)]
    for sweep in range(sweeps):
        for block in blocks if sweep % 2 == 0 else reversed(blocks):
            if sweep == 0:
                ahead = error @ hessian[:, block]
            else:
                # only the blocks already visited in this sweep have changed since this one was left
                others = slice(block.stop, k) if sweep % 2 else slice(0, block.start)
                ahead = moved[:, others] @ hessian[others, block]
            inner, integers = np.ascontiguousarray(hessian[block, block]), np.empty_like(ahead)
            kernels.centered(codes, zeros, block.start, group_size, integers)
            groups = [slice(i, i + group_size) for i in range(0, len(inner), group_size)]
            spreads = np.stack([integers[:, group] @ inner[group] for group in groups])
            kernels.descend(
                w, codes, scales, zeros, error, slopes, last, moved, ahead, inner, spreads, integers, block.start,
                2**bits - 1, group_size,
            )  # fmt: skip


def _feedback(
    w: np.ndarray, scales: np.ndarray, zeros: np.ndarray, factor: Factor, bits: int, group_size: int
) -> np.ndarray:
    """Run the pass with error feedback: codes uint8 ``[N, K]``."""
    n, k = w.shape
    visited, error = np.empty((n, k), np.float32), np.empty((n, k), np.float32)
    chosen, codes = np.empty((n, k), np.uint8), np.empty((n, k), np.uint8)
    kernels.visit(w, factor.order, visited)
    span, pushed = 0, error
    for start in range(0, k, WIDTH):
        block = slice(start, min(start + WIDTH, k))
        if start % SPAN == 0:
            span, pushed = start, error[:, :start] @ factor.upper[:start, start : start + SPAN]
        ahead = pushed[:, start - span : block.stop - span] + error[:, span:start] @ factor.upper[span:start, block]
        columns, lost, integers = factor.order[block], error[:, block], chosen[:, block]
        upper = np.ascontiguousarray(factor.upper[block, block])
        unit = upper + np.eye(len(upper), dtype=np.float32)
        back = np.ascontiguousarray((unit * factor.price[columns]).T)
        shared = columns // group_size, scales, zeros, np.float32(2**bits - 1)
        rounding.round_columns(visited[:, block], ahead, upper, *shared, lost, integers)
        rounding.settle(visited[:, block], lost @ back, unit @ back, *shared, TURNS, lost, integers)
    kernels.leave(chosen, factor.order, codes)
    return codes
