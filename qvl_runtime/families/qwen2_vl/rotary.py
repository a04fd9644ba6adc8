"""Rotary positions of a sequence with pictures (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qvl_kernels.ops import Array, Ops
from qvl_runtime.families.qwen2_vl.config import ModelConfig
from qvl_runtime.families.qwen2_vl.positions import position_ids, rotary_rows
from qvl_runtime.inputs.prompt import Slot


class Mrope:
    """`qvl_runtime.engine.sequence.Rotary`: a table with a row for each token of the sequence.

    Parameters
    ----------
    ops : Ops
    config : ModelConfig
    capacity : int
        Initial capacity in tokens.
    """

    def __init__(self, ops: Ops, config: ModelConfig, capacity: int):
        self._ops, self._config = ops, config
        self.alpha = 1
        self.logn: Array | None = None
        self._positions = np.zeros((3, 0), np.int64)
        self._delta = 0
        self.rope: Array = ops.empty((0, config.head_dim))
        self.reserve(capacity)

    def scaling(self, length: int) -> int:
        """Return 1: the base is never scaled."""
        return 1

    def rescale(self, alpha: int) -> None:
        """Do nothing: the base is never scaled."""

    def place(self, length: int, slots: Sequence[Slot]) -> None:
        """Compute the rows of a prompt of `length` tokens, and those after it."""
        positions, self._delta = position_ids(length, [(slot.start, *slot.picture.grid, slot.time) for slot in slots])
        self._set(self._continued(positions, self.rope.shape[0]))

    def reserve(self, capacity: int) -> None:
        """Grow to `capacity` tokens; the rows set by `place` remain."""
        if capacity > self.rope.shape[0]:
            positions, self._positions = self._positions, self._positions[:, :0]
            self.rope = self._ops.empty((capacity, self._config.head_dim))
            self._set(self._continued(positions, capacity))

    def _continued(self, positions: np.ndarray, capacity: int) -> np.ndarray:
        """Extend positions to `capacity` tokens."""
        given = positions.shape[1]
        following = np.arange(given, capacity) + self._delta
        return np.concatenate([positions[:, :capacity], np.broadcast_to(following, (3, len(following)))], axis=1)

    def _set(self, positions: np.ndarray) -> None:
        """Write the rows from the first changed one on."""
        known = self._positions.shape[1]
        changed = np.flatnonzero((positions[:, :known] != self._positions).any(axis=0))
        first = int(changed[0]) if changed.size else known
        self._positions = positions[:, :first]  # after an interrupt, positions must match the rows
        if first < positions.shape[1]:
            self._ops.write(self.rope[first:], rotary_rows(positions[:, first:], self._config))
        self._positions = positions
