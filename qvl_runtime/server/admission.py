"""Admission control: limits on running and waiting requests, and on their bytes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator

from qvl_runtime.openai.errors import ApiError, unavailable
from qvl_runtime.openai.limits import Limits

STOPPING = "the server is stopping"


class Admission:
    """A queue of requests. A request is admitted, waits, runs, and leaves when its answer has been read.

    Call all methods on the event loop.

    Parameters
    ----------
    limits : Limits

    Attributes
    ----------
    entered, inside : int
        Numbers of requests that got a place so far, and that have one now.
    running : int
        Number of admitted requests.
    stopping : bool
        Whether no more are admitted.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._line: deque[asyncio.Future[None]] = deque()
        self._reading: set[asyncio.Timeout] = set()
        self._held = 0
        self._mean = 1.0
        self.entered = 0
        self.inside = 0
        self.running = 0
        self.stopping = False

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._line)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Reserve a place for one request, from before its body is read until its answer has been read.

        Raises
        ------
        ApiError
            503 if the server is stopping, 429 if there is no place.
        """
        if self.stopping:
            raise unavailable(STOPPING)
        if self.inside >= self._limits.running + self._limits.waiting:
            raise self._full("too many requests are waiting")
        self.entered += 1
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Limit the time of reading a request.

        Raises
        ------
        ApiError
            408 if it takes too long, 503 if the server stops meanwhile.
        """
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds) as end:
                self._reading.add(end)
                try:
                    yield
                finally:
                    self._reading.discard(end)
        except TimeoutError:
            if self.stopping:
                raise unavailable(STOPPING) from None
            raise ApiError(408, f"the request did not arrive within {seconds:g} seconds") from None

    @contextlib.contextmanager
    def holding(self) -> Iterator[Held]:
        """Account for the bytes of a request."""
        held = Held(self)
        try:
            yield held
        finally:
            self._held -= held.bytes

    def take(self, count: int) -> None:
        """Add bytes to the total; see `holding`."""
        if self._held + count > self._limits.held_bytes:
            raise self._full("the requests that are being served hold too many bytes")
        self._held += count

    async def turn(self) -> float:
        """Wait until the request may run. `done` must be called afterwards."""
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
                if called in self._line:  # unless a turn ended, or the server stopped, at the same moment
                    self._line.remove(called)
            elif called.exception() is None:  # it was called at the moment it was cancelled
                self.done(None)
            raise
        return time.monotonic()

    def done(self, began: float | None) -> None:
        """End a running request, or give up its turn; the next request runs."""
        if began is not None:
            self._mean += (time.monotonic() - began - self._mean) / 8
        while self._line:
            called = self._line.popleft()
            if not called.done():
                called.set_result(None)
                return
        self.running -= 1

    def stop(self) -> None:
        """Admit no more requests, and refuse those that arrive or wait."""
        self.stopping = True
        for end in self._reading:
            if not end.expired():
                end.reschedule(0)
        for called in self._line:
            if not called.done():
                called.set_exception(unavailable(STOPPING))
        self._line.clear()

    def _full(self, reason: str) -> ApiError:
        seconds = self._mean * (1 + self.waiting / self._limits.running)
        return ApiError(429, f"{reason}; try again later", retry_after=max(1, min(60, math.ceil(seconds))))


class Held:
    """The bytes held by one request."""

    def __init__(self, admission: Admission):
        self._admission, self.bytes = admission, 0

    def add(self, count: int) -> None:
        """Add bytes.

        Raises
        ------
        ApiError
            429 if all requests together hold too many.
        """
        self._admission.take(count)
        self.bytes += count
