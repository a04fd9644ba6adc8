"""What a layer's inputs tell about its weights: the Hessian of its output's error, and the factors of it."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from qvl_convert import gptq_kernels as kernels
from qvl_convert import gram
from qvl_runtime.errors import QvlError

log = logging.getLogger(__name__)

MAX_DAMP = 1.0

ROWS = gram.BATCH if gram.FAST else 4096
"""Inputs that are added to a Hessian at once. In float32, the more, the less it costs to mirror the product."""

TRUSTED = 0.9
"""A factor in single precision is used if its least pivot is at least this share of the damping."""

PANEL = 256
"""Columns that `cholesky` factorizes at a time."""


class Hessian:
    """Running ``sum of x x^T`` of a layer's inputs.

    Parameters
    ----------
    k : int
        Number of inputs of the layer.
    """

    def __init__(self, k: int) -> None:
        self._sum = np.zeros((k, k), np.float32)
        self._waiting = np.empty((0, k), np.float32)
        self._rows = 0
        self.count = 0

    def add(self, x: np.ndarray) -> None:
        """Add a batch of activations, ``[..., K]``."""
        x = np.asarray(x, np.float32).reshape(-1, len(self._sum))
        self.count += len(x)
        if len(self._waiting) == 0:
            self._waiting = np.empty((ROWS, len(self._sum)), np.float32)
        while len(x):
            part = x[: ROWS - self._rows]
            self._waiting[self._rows : self._rows + len(part)] = part
            self._rows += len(part)
            x = x[len(part) :]
            if self._rows == ROWS:
                self._flush()

    def _flush(self) -> None:
        rows = self._waiting[: self._rows]
        if gram.FAST:
            gram.add_gram(rows, self._sum)
        else:
            self._sum += rows.T @ rows
        self._rows = 0

    @property
    def sum(self) -> np.ndarray:
        """The sum so far, ``[K, K]``."""
        if self._rows:
            self._flush()
        if gram.FAST:
            gram.mirror(self._sum)
        self._waiting = self._waiting[:0].copy()
        return self._sum

    def mean(self) -> np.ndarray:
        """``H / tokens``, float32 ``[K, K]``."""
        mean = np.empty_like(self._sum)
        kernels.divide(self.sum, np.float32(max(self.count, 1)), mean)
        return mean


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


def factorize(hessian: np.ndarray, *, damp: float = 0.01, name: str = "matrix") -> Factor:
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
    order = np.argsort(-energy, kind="stable")
    asked = damp
    precision: type[np.floating] = np.float32
    while True:
        # the factor of H taken from its last column backwards is upper triangular
        lower = np.empty(hessian.shape, precision)
        kernels.reorder(hessian, order[::-1].copy(), lower)
        lower[np.diag_indices_from(lower)] += precision(damp * unit)
        try:
            cholesky(lower)
            # no pivot is less than the damping, but for rounding
            if precision is np.float64 or np.square(np.diagonal(lower)).min() > TRUSTED * damp * unit:
                break
            precision = np.float64
        except np.linalg.LinAlgError:
            if precision is np.float32:
                precision = np.float64
                continue
            damp = max(damp * 10, 1e-4)
            if damp > MAX_DAMP:
                raise QvlError(
                    f"{name}: its Hessian is singular even at damping {MAX_DAMP}; use more calibration data"
                ) from None
    if damp != asked:
        log.warning("%s: its Hessian is singular at damping %g; used %g", name, asked, damp)
    diagonal = np.diagonal(lower)[::-1].copy()
    upper = np.zeros(hessian.shape, np.float32)
    kernels.normalize(lower, diagonal.astype(np.float32), upper)
    del lower  # a Hessian of 11008 columns takes a gigabyte in double precision
    price = np.empty(len(order), np.float32)
    price[order] = diagonal**2
    damped = hessian.astype(np.float32)
    damped[np.diag_indices_from(damped)] += np.float32(damp * unit)
    return Factor(damped, upper, price, order, damp, int((energy == 0).sum()))


def cholesky(a: np.ndarray) -> None:
    """Replace the lower triangle of `a`, symmetric float ``[K, K]``, by its Cholesky factor.

    `numpy.linalg.cholesky` runs on one thread and in small pieces; here nearly all is products of large matrices. What
    lies above the diagonal blocks stays as it was.

    Raises
    ------
    numpy.linalg.LinAlgError
        If `a` is not positive definite.
    """
    for start in range(0, len(a), PANEL):
        stop = min(start + PANEL, len(a))
        panel = a[start:, start:stop]
        panel -= a[start:, :start] @ a[start:stop, :start].T
        corner = np.linalg.cholesky(panel[: stop - start].astype(np.float64))
        panel[: stop - start] = corner
        if stop < len(a):
            panel[stop - start :] = panel[stop - start :] @ np.linalg.inv(corner).T.astype(a.dtype)
