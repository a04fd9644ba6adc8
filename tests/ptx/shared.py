"""Shared memory of a group's blocks: its bytes, and who used them since the last barrier.

Two threads of a block may use the same bytes, one of them writing, only with a barrier in between: of the block, or of
their warp. Bytes are watched in granules, as small as the smallest access of the kernel.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ptx.errors import PtxError

_WARP = 32
_SEVERAL = -1
"""Stands for reading threads of several warps; several of warp w are ``-2 - w``."""


@dataclasses.dataclass
class Copy:
    """An asynchronous copy on its way: rows of bytes to shared memory.

    `group` counts, in every issuing thread, the commits before it.
    """

    lanes: np.ndarray
    group: np.ndarray
    places: np.ndarray
    values: np.ndarray


class SharedMemory:
    """Shared memory of `blocks` blocks of `nbytes` bytes each."""

    def __init__(self, blocks: int, nbytes: int, granule: int, block_of_lane: np.ndarray, thread: np.ndarray):
        self.nbytes, self.granule = nbytes, granule
        self.stride = -(-nbytes // 16) * 16
        self._base = block_of_lane * self.stride
        self._block, self._thread = block_of_lane, thread.astype(np.int32)
        self.data = np.zeros(blocks * self.stride, np.uint8)
        count = len(self.data) // granule
        self._written = np.zeros(count, bool)
        self._write_epoch = np.full(count, -1, np.int32)
        self._writer = np.zeros(count, np.int32)
        self._read_epoch = np.full(count, -1, np.int32)
        self._reader = np.zeros(count, np.int32)
        self._warp_epoch = np.zeros(len(thread), np.int32)
        self._write_warp_epoch = np.zeros(count, np.int32)
        self._read_warp_epoch = np.zeros(count, np.int32)
        self._warps_meet = False
        self._arriving = np.zeros(count, bool)
        self._unfenced = np.zeros(count, bool)
        self._in_use = np.zeros(count, np.int16)
        self._copies: list[Copy] = []
        self._commits = np.zeros(len(thread), np.int32)

    def places(self, addresses: np.ndarray, lanes: np.ndarray | slice, nbytes: int) -> np.ndarray:
        """Index into `data` of accesses by lanes, checked."""
        if np.count_nonzero(addresses & (nbytes - 1)):
            raise PtxError(f"misaligned shared access of {nbytes} bytes")
        if len(addresses) and (addresses.min() < 0 or addresses.max() + nbytes > self.nbytes):
            raise PtxError(f"shared access out of bounds: {addresses.max()} + {nbytes} of {self.nbytes}")
        return addresses + self._base[lanes]

    def granules(self, places: np.ndarray, nbytes: int) -> np.ndarray:
        """The granules of accesses, ``[n, m]``."""
        return (places // self.granule)[:, None] + np.arange(max(nbytes // self.granule, 1))

    def read(self, places: np.ndarray, lanes: np.ndarray | slice, nbytes: int, epoch: np.ndarray) -> np.ndarray:
        """uint8 ``[n, nbytes]``; `epoch` counts the barriers of every block."""
        granules = self.granules(places, nbytes)
        if np.count_nonzero(self._written[granules]) != granules.size:
            arriving = self._arriving[granules].any()
            raise PtxError("a copy is read that has not arrived" if arriving else "uninitialized shared memory is read")
        if np.count_nonzero(self._arriving[granules]):
            raise PtxError("a copy is read that has not arrived")
        now, thread = epoch[self._block[lanes]][:, None], self._thread[lanes][:, None]
        if self._conflicts(granules, self._write_epoch, self._writer, self._write_warp_epoch, now, thread, lanes):
            raise PtxError("race: shared memory is read that another thread wrote since the last barrier")
        self._note_read(granules, now, thread)
        if self._warps_meet:
            self._read_warp_epoch[granules] = self._warp_epoch[lanes][:, None]
        return self._rows(places, nbytes)

    def meet_in_warps(self, lanes: np.ndarray) -> None:
        """These threads passed a barrier of their warps."""
        self._warps_meet = True
        self._warp_epoch[lanes] += 1

    def _conflicts(
        self,
        granules: np.ndarray,
        epoch: np.ndarray,
        who: np.ndarray,
        warp_epoch: np.ndarray,
        now: np.ndarray,
        thread: np.ndarray,
        lanes: np.ndarray | slice,
    ) -> bool:
        """Whether another thread did the same with no barrier since."""
        found = (epoch[granules] == now) & (who[granules] != thread)
        if self._warps_meet and np.count_nonzero(found):
            other = who[granules]
            same_warp = np.where(other >= 0, other // _WARP, -2 - other) == thread // _WARP
            found &= ~(same_warp & (warp_epoch[granules] < self._warp_epoch[lanes][:, None]))
        return np.count_nonzero(found) > 0

    def _rows(self, places: np.ndarray, nbytes: int) -> np.ndarray:
        unit = min(nbytes, 8)
        values = self.data.view(f"u{unit}")
        if nbytes <= 8:
            return values[places // nbytes].reshape(-1, 1).view(np.uint8)
        return values.reshape(-1, nbytes // unit)[places // nbytes].view(np.uint8)

    def _note_read(self, granules: np.ndarray, now: np.ndarray, thread: np.ndarray) -> None:
        warp, before = thread // _WARP, self._read_epoch[granules] == now
        reader = thread
        if np.count_nonzero(before):
            other = self._reader[granules]
            same_warp = np.where(other >= 0, other // _WARP, -2 - other) == warp
            reader = np.where(before & (other != thread), np.where(same_warp, -2 - warp, _SEVERAL), thread)
        self._read_epoch[granules] = now
        self._reader[granules] = reader
        overwritten = self._reader[granules] != reader  # several threads of this instruction
        if np.count_nonzero(overwritten):
            one_warp = warp == np.where(
                self._reader[granules] >= 0, self._reader[granules] // _WARP, -2 - self._reader[granules]
            )
            self._reader[granules[overwritten]] = np.where(one_warp, -2 - warp, _SEVERAL)[overwritten]
            different = overwritten & ~one_warp
            self._reader[granules[different]] = _SEVERAL

    def write(self, places: np.ndarray, lanes: np.ndarray | slice, values: np.ndarray, epoch: np.ndarray) -> None:
        """Store uint8 ``[n, nbytes]``."""
        nbytes = values.shape[1]
        granules = self._begin_write(places, lanes, nbytes, epoch)
        self._put(places, values)
        if not np.array_equal(self._rows(places, nbytes), values):
            raise PtxError("race: threads write different values to one place of shared memory at once")
        self._written[granules] = True
        self._unfenced[granules] = True

    def _begin_write(self, places: np.ndarray, lanes: np.ndarray | slice, nbytes: int, epoch: np.ndarray) -> np.ndarray:
        granules = self.granules(places, nbytes)
        now, thread = epoch[self._block[lanes]][:, None], self._thread[lanes][:, None]
        if np.count_nonzero(self._arriving[granules]):
            raise PtxError("shared memory is overwritten that a copy is on its way to")
        if np.count_nonzero(self._in_use[granules]):
            raise PtxError("shared memory is overwritten that a tensor instruction may still read")
        if self._conflicts(granules, self._read_epoch, self._reader, self._read_warp_epoch, now, thread, lanes):
            raise PtxError("race: shared memory is overwritten that another thread read since the last barrier")
        if self._conflicts(granules, self._write_epoch, self._writer, self._write_warp_epoch, now, thread, lanes):
            raise PtxError("race: shared memory is overwritten that another thread wrote since the last barrier")
        self._write_epoch[granules], self._writer[granules] = now, thread
        if self._warps_meet:
            self._write_warp_epoch[granules] = self._warp_epoch[lanes][:, None]
        return granules

    def _put(self, places: np.ndarray, values: np.ndarray) -> None:
        nbytes = values.shape[1]
        unit = min(nbytes, 8)
        rows = np.ascontiguousarray(values).view(f"u{unit}")
        if nbytes <= 8:
            self.data.view(f"u{unit}")[places // nbytes] = rows[:, 0]
        else:
            self.data.view(f"u{unit}").reshape(-1, nbytes // unit)[places // nbytes] = rows

    # asynchronous copies

    def copy(self, places: np.ndarray, lanes: np.ndarray, values: np.ndarray, epoch: np.ndarray) -> None:
        """Begin a copy; its bytes arrive when the thread waits for the group it is committed with."""
        granules = self._begin_write(places, lanes, values.shape[1], epoch)
        self._arriving[granules] = True
        self._copies.append(Copy(lanes, self._commits[lanes], places, values))

    def commit(self, lanes: np.ndarray | slice) -> None:
        """All copies a thread began since its last commit form a group."""
        self._commits[lanes] += 1

    def wait(self, lanes: np.ndarray, most: int, epoch: np.ndarray) -> None:
        """Let arrive all but the latest `most` groups of these threads."""
        waiting = np.zeros(len(self._commits), bool)
        waiting[lanes] = True
        left = []
        for copy in self._copies:
            done = waiting[copy.lanes] & (copy.group < self._commits[copy.lanes] - most)
            if np.count_nonzero(done):
                self._arrive(copy, done, epoch)
            if not done.all():
                parts = (array[~done] for array in (copy.lanes, copy.group, copy.places, copy.values))
                left.append(Copy(*parts))
        self._copies = left

    def _arrive(self, copy: Copy, done: np.ndarray, epoch: np.ndarray) -> None:
        places, values, lanes = copy.places[done], copy.values[done], copy.lanes[done]
        granules = self.granules(places, values.shape[1])
        self._put(places, values)
        self._arriving[granules] = False
        self._written[granules] = True
        self._unfenced[granules] = False
        self._write_epoch[granules] = epoch[self._block[lanes]][:, None]
        self._writer[granules] = self._thread[lanes][:, None]
        self._write_warp_epoch[granules] = self._warp_epoch[lanes][:, None]

    # tensor instructions that read on their own

    def read_async(self, places: np.ndarray, epoch: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes ``[n, 16]`` for a tensor instruction, and the granules that stay in use until `release`."""
        granules = self.granules(places, 16)
        if not self._written[granules].all() or self._arriving[granules].any():
            raise PtxError("a tensor instruction reads shared memory that nothing was written to yet")
        if self._unfenced[granules].any():
            raise PtxError("a tensor instruction reads shared memory without a fence after it was written")
        if (self._write_epoch[granules] == epoch[block]).any():
            raise PtxError("race: a tensor instruction reads shared memory written since the last barrier")
        self._in_use[granules] += 1
        return self._rows(places, 16), granules

    def release(self, granules: np.ndarray, epoch: int) -> None:
        """The tensor instruction has read them, for threads that have passed `epoch` barriers."""
        self._in_use[granules] -= 1
        self._read_epoch[granules], self._reader[granules] = epoch, _SEVERAL

    def fence(self, blocks: np.ndarray) -> None:
        """What was written before becomes visible to tensor instructions (after a barrier)."""
        per_block = self._unfenced.reshape(-1, self.stride // self.granule)
        per_block[blocks] = False
