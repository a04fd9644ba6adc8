"""Who may read what another block of the same launch wrote.

A block's stores before a barrier are released by an atomic operation of one of its threads after it; who reads the
atomic's value afterwards acquires them, and its whole block does with its next barrier (PTX ISA 8.7, "Memory
consistency model": causality order, here for the one pattern that kernels use).
"""

from __future__ import annotations

import numpy as np

from ptx.errors import PtxError
from ptx.memory import DeviceMemory, Region

_GRANULE = 2
"""Bytes watched together: the smallest stores of kernels whose blocks meet."""


class Meeting:
    """What the blocks of one launch wrote, and which of it each has seen.

    A block's epoch counts its barriers. ``seen[b, a]``: block b sees what block a wrote in epochs before this.
    """

    def __init__(self, blocks: int, memory: DeviceMemory):
        self._memory = memory
        self._seen = np.zeros((blocks, blocks), np.int32)
        self._acquired = np.zeros((blocks, blocks), np.int32)
        self._released: dict[int, np.ndarray] = {}
        self._writers: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _of(self, region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Block, thread and epoch that wrote each granule of an allocation in this launch; block -1: none did."""
        found = self._writers.get(region.begin)
        if found is None:
            count = -(-(region.end - region.begin) // _GRANULE)
            found = tuple(np.full(count, -1, np.int32) for _ in range(3))
            self._writers[region.begin] = found
        return found

    def write(
        self, addresses: np.ndarray, nbytes: int, block: np.ndarray, thread: np.ndarray, epoch: np.ndarray
    ) -> None:
        """Note stores of `nbytes` bytes each."""
        for region, which, rows in self._memory.parts(addresses, nbytes):
            granules = (rows * (nbytes // _GRANULE))[:, None] + np.arange(nbytes // _GRANULE)
            for array, values in zip(self._of(region), (block, thread, epoch)):
                array[granules] = values[which][:, None]

    def read(
        self, addresses: np.ndarray, nbytes: int, block: np.ndarray, thread: np.ndarray, epoch: np.ndarray
    ) -> None:
        """Check loads of `nbytes` bytes each."""
        for region, which, rows in self._memory.parts(addresses, nbytes):
            if region.begin not in self._writers:
                continue
            granules = (rows * (nbytes // _GRANULE))[:, None] + np.arange(max(nbytes // _GRANULE, 1))
            writer, by, when = (array[granules] for array in self._of(region))
            mine = writer == block[which][:, None]
            if np.count_nonzero(mine & (by != thread[which][:, None]) & (when == epoch[which][:, None])):
                raise PtxError("race: global memory is read that another thread wrote since the last barrier")
            others = (writer >= 0) & ~mine
            if np.count_nonzero(others & (when >= self._seen[block[which][:, None], np.maximum(writer, 0)])):
                raise PtxError("race: global memory is read that another block wrote and did not release")

    def release(self, address: int, block: int, epoch: int) -> None:
        """An atomic of `block` publishes what its block wrote in earlier epochs, and what it has seen itself."""
        clock = self._released.setdefault(address, np.zeros(len(self._seen), np.int32))
        np.maximum(clock, self._seen[block], out=clock)
        clock[block] = max(clock[block], epoch)

    def acquire(self, address: int, block: int) -> None:
        """An atomic of `block` takes over what was published there."""
        if address in self._released:
            np.maximum(self._acquired[block], self._released[address], out=self._acquired[block])

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks have seen what one of them acquired."""
        self._seen[blocks] = self._acquired[blocks]
