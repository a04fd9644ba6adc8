"""A table of the arrays of sequences, through which a captured step can serve other sequences than its first ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.cache import CudaCache
from qvl_kernels.gpu.memory import Memory, Uploader
from qvl_kernels.ops import Move

_COLUMNS = 8
"""Of an entry: k, v, their scales, start, rope, logn, and the positions that a head of the cache has room for. The
kernels' `common.given_or_listed` reads it."""

_ENTRIES = 256
"""Entries that are allocated at a time."""


class Used(NamedTuple):
    """What the attention of a sequence in one layer uses."""

    cache: CudaCache
    layer: int
    start: DeviceArray
    rope: DeviceArray | None
    logn: DeviceArray | None


class SequenceTable:
    """The entries of one captured step, int64 ``[entries, 8]`` on the device.

    Until `movable` it keeps the arrays alive.
    """

    def __init__(self, memory: Memory, uploader: Uploader):
        self._memory, self._uploader = memory, uploader
        self._used: list[Used] = []
        self._parts: list[DeviceArray] = []

    def add(self, used: Used) -> DeviceArray:
        """Return the place of a new entry, which `upload` fills."""
        part, row = divmod(len(self._used), _ENTRIES)
        if not row:
            self._parts.append(self._memory.constant((_ENTRIES, _COLUMNS), np.int64))
        self._used.append(used)
        return self._parts[part][row : row + 1]

    def upload(self) -> None:
        """Send the entries to the device, in order with the steps."""
        if self._used:
            self._send(_entries(self._used))

    def _send(self, entries: np.ndarray) -> None:
        values = np.zeros((len(self._parts) * _ENTRIES, _COLUMNS), np.int64)
        values[: len(entries)] = entries
        for part, some in zip(self._parts, np.split(values, len(self._parts))):
            self._uploader(some, part)

    def movable(self, inputs: Sequence[Any]) -> Move | None:
        """See `Ops.movable`. None if the step uses other arrays of sequences than `inputs`, or some share one."""
        places = {id(value): place for place, value in enumerate(inputs) if value is not None}
        used = [tuple(None if a is None else places.get(id(a), -1) for a in (u.cache, *u[2:])) for u in self._used]
        if not used or len(places) < sum(value is not None for value in inputs) or -1 in {p for u in used for p in u}:
            return None
        sequences = list(dict.fromkeys(used))
        rows = [np.array([i for i, one in enumerate(used) if one == sequence]) for sequence in sequences]
        layers = [np.array([self._used[i].layer for i in some]) for some in rows]
        kinds, count = [_kind(value) for value in inputs], len(used)
        self._used = []

        def move(others: Sequence[Any]) -> bool:
            if [_kind(value) for value in others] != kinds:
                return False
            entries = np.empty((count, _COLUMNS), np.int64)
            for sequence, some, its_layers in zip(sequences, rows, layers):
                cache, *arrays = (None if place is None else others[place] for place in sequence)
                assert cache is not None
                entries[some] = _entry(cache, *arrays)[its_layers]
            self._send(entries)
            return True

        return move


def _entries(used: Sequence[Used]) -> np.ndarray:
    return np.stack([_entry(one.cache, one.start, one.rope, one.logn)[one.layer] for one in used])


def _entry(cache: CudaCache, *arrays: DeviceArray | None) -> np.ndarray:
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
