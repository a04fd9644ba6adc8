"""The stream of all work on a GPU, and those of the branches of captured work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class Streams:
    """Order work: everything runs in the first stream, but for branches, which may run at the same time.

    Parameters
    ----------
    api
        cuda.bindings' driver module.
    device
        The device of cuda-core.
    check : callable
        Raises the error of a result of `api`, or returns its value.

    Attributes
    ----------
    stream, raw
        The stream for the work that follows, of cuda-core and of `api`.
    """

    def __init__(self, api: Any, device: Any, check: Callable[[tuple], Any]):
        self._api, self._device, self._check = api, device, check
        self._known: list[tuple[Any, Any, Any]] = []
        self.use(0)

    def use(self, index: int) -> None:
        """Let the work that follows run in this stream."""
        while len(self._known) <= index:
            stream = self._device.create_stream()
            event = self._check(self._api.cuEventCreate(self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING))
            weakref.finalize(self, self._api.cuEventDestroy, event).atexit = False
            self._known.append((stream, self._api.CUstream(int(stream.handle)), event))
        self.stream, self.raw, _ = self._known[index]

    def fork(self) -> None:
        """Begin branches, within a capture."""
        self._check(self._api.cuEventRecord(self._known[0][2], self._known[0][1]))

    def branch(self, index: int) -> None:
        """Let the work that follows belong to branch 0, 1, ..."""
        self.use(index)
        if index:
            self._check(self._api.cuStreamWaitEvent(self.raw, self._known[0][2], 0))

    def join(self, count: int) -> None:
        """End `count` branches: what follows waits for all of them."""
        self.use(0)
        for _, stream, event in self._known[1:count]:
            self._check(self._api.cuEventRecord(event, stream))
            self._check(self._api.cuStreamWaitEvent(self.raw, event, 0))
