"""Rotary positions that depend on the token's index only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qvl_kernels.ops import Array, Ops
from qvl_runtime.inputs.prompt import Slot


def inverse_frequencies(head_dim: int, base: float) -> np.ndarray:
    """Compute ``base ** (-2 i / head_dim)`` for i < head_dim / 2, float32 (Su et al. 2021, RoFormer)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return 1 / (np.float64(np.float32(base)) ** exponents).astype(np.float32)


def cos_sin(angles: np.ndarray) -> np.ndarray:
    """Compute rows of a rotary table, float32 ``[T, d]`` (cos, then sin), from angles float32 ``[T, d / 2]``."""
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


class TableRotary:
    """`qvl_runtime.engine.sequence.Rotary` from tables.

    Parameters
    ----------
    ops : Ops
    capacity : int
    table : callable
        ``table(positions, alpha)``: float32 ``[positions, head_dim]``, cos in its first half.
    logn : callable, optional
        ``logn(positions)``: float32 ``[positions]``.
    scaling : callable, optional
        Returns the alpha of a prompt's length.
    """

    def __init__(
        self,
        ops: Ops,
        capacity: int,
        table: Callable[[int, int], np.ndarray],
        logn: Callable[[int], np.ndarray] | None = None,
        scaling: Callable[[int], int] = lambda length: 1,
    ):
        self._ops, self._table, self._logn, self.scaling = ops, table, logn, scaling
        self.alpha = 1
        self._fill(capacity)

    def _fill(self, capacity: int) -> None:
        rope = self._table(capacity, self.alpha)
        # Not uploaded: an upload may share memory, and this table is overwritten.
        array = self._ops.empty(rope.shape)
        self._ops.write(array, rope)
        self.logn: Array | None = None if self._logn is None else self._ops.upload(self._logn(capacity))
        self.rope: Array = array  # last: `reserve` goes by its length

    def rescale(self, alpha: int) -> None:
        self.alpha = 0  # after an interrupt, alpha must match the table
        self._ops.write(self.rope, self._table(self.rope.shape[0], alpha))
        self.alpha = alpha

    def place(self, length: int, slots: Sequence[Slot]) -> None:
        """Do nothing: the rows do not depend on the prompt."""

    def reserve(self, capacity: int) -> None:
        if capacity > self.rope.shape[0]:
            self._fill(capacity)
