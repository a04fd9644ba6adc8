"""A table of the arrays of sequences, through which a captured step can serve other sequences than its first ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.cache import CudaCache
from qvl_kernels.gpu.memory import Memory, Uploader
from qvl_kernels.ops import Attended, Move

_COLUMNS = 8
"""Of an entry: k, v, their scales, start, rope, logn, and the positions that a head of the cache has room for. The
kernels' `common.given_or_listed` reads it."""

_ENTRIES = 256
"""Entries that are allocated at a time."""


class SequenceTable:
    """The entries of one captured step, int64 ``[entries, 8]`` on the device.

    Until `movable` it keeps the arrays alive.
    """

    def __init__(self, memory: Memory, uploader: Uploader):
        self._memory, self._uploader = memory, uploader
        self._used: list[Any] = []  # Attended
        self._rows: list[int] = []
        self._parts: list[DeviceArray] = []

    def add(self, some: Sequence[Attended]) -> DeviceArray:
        """Return the place of new entries, which follow each other and which `upload` fills."""
        end = self._rows[-1] + 1 if self._rows else 0
        part, row = divmod(end, _ENTRIES)
        if part == len(self._parts) or row + len(some) > _ENTRIES:
            part, row = len(self._parts), 0
            self._parts.append(self._memory.constant((_ENTRIES, _COLUMNS), np.int64))
        self._used += some
        self._rows += range(part * _ENTRIES + row, part * _ENTRIES + row + len(some))
        return self._parts[part][row : row + len(some)]

    def upload(self) -> None:
        """Send the entries to the device, in order with the steps."""
        if self._used:
            values = [_of_every_layer(u.cache, u.start, u.rope, u.logn)[u.layer] for u in self._used]
            self._send(np.stack(values))

    def _send(self, entries: np.ndarray) -> None:
        values = np.zeros((len(self._parts) * _ENTRIES, _COLUMNS), np.int64)
        values[self._rows] = entries
        for part, some in zip(self._parts, np.split(values, len(self._parts))):
            self._uploader(some, part)

    def movable(self, inputs: Sequence[Any]) -> Move | None:
        """See `Ops.movable`. None if the step uses other arrays of sequences than `inputs`, or some share one."""
        places = {id(value): place for place, value in enumerate(inputs) if value is not None}
        used = [
            tuple(None if a is None else places.get(id(a), -1) for a in (u.cache, u.start, u.rope, u.logn))
            for u in self._used
        ]
        if not used or len(places) < sum(value is not None for value in inputs) or -1 in {p for u in used for p in u}:
            return None
        sequences = list(dict.fromkeys(used))
        entries_of = [np.array([i for i, one in enumerate(used) if one == sequence]) for sequence in sequences]
        layers = [np.array([self._used[i].layer for i in some]) for some in entries_of]
        kinds, count = [_kind(value) for value in inputs], len(used)
        self._used = []

        def move(others: Sequence[Any]) -> bool:
            if [_kind(value) for value in others] != kinds:
                return False
            entries = np.empty((count, _COLUMNS), np.int64)
            for sequence, some, its_layers in zip(sequences, entries_of, layers):
                cache, *arrays = (None if place is None else others[place] for place in sequence)
                assert cache is not None
                entries[some] = _of_every_layer(cache, *arrays)[its_layers]
            self._send(entries)
            return True

        return move


def _of_every_layer(cache: CudaCache, *arrays: DeviceArray | None) -> np.ndarray:
    """Return the entries of a sequence for all layers, int64 ``[layers, 8]``."""
    found = np.empty((cache.layers, _COLUMNS), np.int64)
    found[:, :4] = cache.addresses
    found[:, 4:] = *(0 if array is None else array.address for array in arrays), cache.stride
    return found


def _kind(value: DeviceArray | CudaCache | None) -> tuple[Any, ...]:
    """Return what must be equal for one input to replace another: lengths may differ."""
    if isinstance(value, CudaCache):
        return value.layers, value.kv_heads, value.head_dim, value.dtype
    return () if value is None else (value.shape[1:], value.dtype)
