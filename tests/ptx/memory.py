"""Global memory: what is allocated, what of it was written, and nothing else."""

from __future__ import annotations

import bisect
import ctypes
import functools
from collections.abc import Iterator

import numpy as np

from ptx.errors import PtxError


class Region:
    """One allocation, in the host's memory at the address a kernel knows it by.

    Attributes
    ----------
    begin, end : int
        Addresses.
    data : np.ndarray
        Its bytes.
    written : np.ndarray
        uint8, 1 for every byte that holds something.
    """

    def __init__(self, begin: int, nbytes: int, written: np.ndarray):
        self.begin, self.end = begin, begin + nbytes
        self.data = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(begin), np.uint8)
        self.written = written

    def items(self, what: str, nbytes: int) -> np.ndarray:
        """`data` or `written` as rows of `nbytes` bytes: a view, uint8 to uint64, or two or more uint64 a row."""
        views = self.__dict__.setdefault("_views", {})
        found = views.get((what, nbytes))
        if found is None:
            array = getattr(self, what)
            unit = min(nbytes, 8)
            whole = array[: len(array) // nbytes * nbytes].view(f"u{unit}")
            found = views[what, nbytes] = whole if nbytes <= 8 else whole.reshape(-1, nbytes // 8)
        return found


@functools.cache
def _all_written(nbytes: int) -> np.generic:
    unit = min(nbytes, 8)
    return np.full(unit, 1, np.uint8).view(f"u{unit}")[0]


class DeviceMemory:
    """All allocations of a device."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._regions: list[Region] = []

    def add(self, begin: int, nbytes: int, written: np.ndarray | None = None) -> Region:
        """Allow accesses to `nbytes` bytes from `begin` on, a multiple of 16 bytes; nothing there is written yet.

        `written` is kept up to date if given: uint8, a byte for every byte.
        """
        if begin % 16:
            raise PtxError("an allocation is aligned to 16 bytes")
        region = Region(begin, nbytes, np.zeros(nbytes, np.uint8) if written is None else written)
        at = bisect.bisect(self._begins, begin)
        self._begins.insert(at, begin)
        self._regions.insert(at, region)
        return region

    def remove(self, begin: int) -> None:
        """The allocation is gone."""
        at = self._begins.index(begin)
        del self._begins[at], self._regions[at]

    def region(self, address: int, nbytes: int) -> Region:
        """The allocation that holds a range of addresses.

        Raises
        ------
        PtxError
            There is none.
        """
        at = bisect.bisect(self._begins, address) - 1
        if at < 0 or address + nbytes > self._regions[at].end:
            raise PtxError(f"access out of bounds: {nbytes} bytes at {address:#x}{self._near(at, address)}")
        return self._regions[at]

    def _near(self, at: int, address: int) -> str:
        if at < 0:
            return ""
        region = self._regions[at]
        return f", {address - region.begin} bytes into an allocation of {region.end - region.begin}"

    def parts(self, addresses: np.ndarray, nbytes: int) -> Iterator[tuple[Region, np.ndarray | slice, np.ndarray]]:
        """Accesses of `nbytes` bytes each by the allocation they are in: it, which they are, and their row in it."""
        if np.count_nonzero(addresses & (nbytes - 1)):
            raise PtxError(f"misaligned access of {nbytes} bytes")
        first, last = int(addresses.min()), int(addresses.max())
        region = self.region(first, nbytes)
        if last + nbytes <= region.end:
            yield region, slice(None), (addresses - region.begin) // nbytes
            return
        owner = np.searchsorted(self._begins, addresses, "right") - 1
        for at in np.unique(owner):
            chosen = np.flatnonzero(owner == at)
            region = self.region(int(addresses[chosen].max()), nbytes)
            self.region(int(addresses[chosen].min()), nbytes)
            yield region, chosen, (addresses[chosen] - region.begin) // nbytes

    def read(self, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        """uint8 ``[n, nbytes]``.

        Raises
        ------
        PtxError
            For what is out of bounds, misaligned, or was never written.
        """
        result = np.empty((len(addresses), nbytes), np.uint8)
        for region, which, rows in self.parts(addresses, nbytes):
            if np.count_nonzero(region.items("written", nbytes)[rows] != _all_written(nbytes)):
                raise PtxError("uninitialized global memory is read")
            values = region.items("data", nbytes)[rows]
            result[which] = values.reshape(len(values), -1).view(np.uint8)
        return result

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store uint8 ``[n, nbytes]``."""
        nbytes = values.shape[1]
        for region, which, rows in self.parts(addresses, nbytes):
            part = np.ascontiguousarray(values[which]).view(f"u{min(nbytes, 8)}")
            region.items("data", nbytes)[rows] = part[:, 0] if nbytes <= 8 else part
            region.items("written", nbytes)[rows] = _all_written(nbytes)
