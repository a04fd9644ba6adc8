"""Who is served: so many at once, so many in line, in order, and nobody beyond."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator

from qvl_runtime.server.errors import ApiError, unavailable
from qvl_runtime.server.limits import Limits

STOPPING = "the server is stopping"


class Admission:
    """Requests come in, wait for their turn, are computed, and leave when their answer was read.

    All methods are called on the event loop.

    Parameters
    ----------
    limits : Limits
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._line: deque[asyncio.Future[None]] = deque()
        self._held = 0
        self._mean = 1.0
        self.inside = 0
        self.running = 0
        self.stopping = False

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request, from before its body is read until its answer was.

        Raises
        ------
        ApiError
            503 when the server is stopping, 429 when there is no place.
        """
        if self.stopping:
            raise unavailable(STOPPING)
        if self.inside >= self._limits.running + self._limits.waiting:
            raise self._full("too many requests are waiting")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @contextlib.contextmanager
    def holding(self) -> Iterator[Held]:
        """Counts the bytes of a request among those of all."""
        held = Held(self)
        try:
            yield held
        finally:
            self._held -= held.bytes

    def take(self, count: int) -> None:
        """Count bytes that are held; see `holding`."""
        if self._held + count > self._limits.held_bytes:
            raise self._full("the requests that are being served hold too many bytes")
        self._held += count

    async def turn(self) -> float:
        """Wait for the turn to be computed; returns when it came. `done` must be called for it."""
        if self.stopping:
            raise unavailable(STOPPING)
        if self.running < self._limits.running and not self._line:
            self.running += 1
            return time.monotonic()
        called = asyncio.get_running_loop().create_future()
        self._line.append(called)
        try:
            await called
        except asyncio.CancelledError:
            if called.cancelled():
                self._line.remove(called)
            elif called.exception() is None:  # it was called in the very moment in which it left
                self.done(None)
            raise
        return time.monotonic()

    def done(self, began: float | None) -> None:
        """A request was computed, or gave up its turn; the next one's turn comes."""
        if began is not None:
            self._mean += (time.monotonic() - began - self._mean) / 8
        while self._line:
            called = self._line.popleft()
            if not called.done():
                called.set_result(None)
                return
        self.running -= 1

    def stop(self) -> None:
        """Take nobody in any more, and send those away who wait."""
        self.stopping = True
        for called in self._line:
            if not called.done():
                called.set_exception(unavailable(STOPPING))
        self._line.clear()

    def _full(self, reason: str) -> ApiError:
        seconds = self._mean * (1 + self.waiting / self._limits.running)
        return ApiError(429, f"{reason}; try again later", retry_after=max(1, min(60, math.ceil(seconds))))


class Held:
    """The bytes that one request holds."""

    def __init__(self, admission: Admission):
        self._admission, self.bytes = admission, 0

    def add(self, count: int) -> None:
        """Hold more of them.

        Raises
        ------
        ApiError
            429 when all requests together hold too many.
        """
        self._admission.take(count)
        self.bytes += count
