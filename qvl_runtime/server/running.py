"""Runs each request in a thread, and passes its events to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from qvl_kernels.threads import start_thread
from qvl_runtime.openai.errors import unavailable
from qvl_runtime.results import Stream
from qvl_runtime.server.admission import STOPPING, Admission


class Cancelled(Exception):
    """The client no longer waits for the answer."""


class Switch:
    """Cancels the answers of a request from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: list[Stream] = []
        self._off = False

    def watch(self, stream: Stream) -> None:
        """Add an answer to cancel."""
        with self._lock:
            self._streams.append(stream)
        self.check()

    def check(self) -> None:
        """Raise `Cancelled` after `cancel`."""
        if self._off:
            raise Cancelled

    def cancel(self) -> None:
        """Cancel running answers, and prevent further ones."""
        with self._lock:
            self._off = True
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()


Emit = Callable[[Any], None]
Job = Callable[[Emit, Switch], None]
"""Computes the answers of a request in a thread, and emits events. Exceptions are emitted, too."""


class Runner:
    """Runs each job in a thread when it is its turn.

    Parameters
    ----------
    admission : Admission
    """

    def __init__(self, admission: Admission):
        self._admission = admission
        self._threads: set[threading.Thread] = set()
        self._switches: set[Switch] = set()

    @contextlib.asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[asyncio.Queue]:
        """Wait for the turn, run a job, and return the queue of its events. Leaving the context cancels the job.

        The turn ends with the thread, not with the reader, who may be slow.

        Raises
        ------
        ApiError
            If the server is stopping.
        DeviceError
            If no thread can be started.
        """
        loop = asyncio.get_running_loop()
        began = await self._admission.turn()
        events: asyncio.Queue = asyncio.Queue()
        switch = Switch()

        def tell(call: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(call, *arguments)

        def work() -> None:
            try:
                switch.check()
                job(lambda event: tell(events.put_nowait, event), switch)
            except Cancelled:
                tell(events.put_nowait, unavailable(STOPPING))  # not read if the client is gone
            except Exception as error:
                tell(events.put_nowait, error)
            except BaseException as error:  # a panic of a Rust library must not reach the event loop
                tell(events.put_nowait, RuntimeError(f"{type(error).__name__}: {error}"))
            finally:
                tell(self._admission.done, began)

        try:
            thread = start_thread(work, (), "qvl-answer")
        except BaseException:
            self._admission.done(None)
            raise
        self._threads = {thread, *filter(threading.Thread.is_alive, self._threads)}
        self._switches.add(switch)
        try:
            yield events
        finally:
            self._switches.discard(switch)
            switch.cancel()

    def close(self) -> None:
        """End all jobs and their threads."""
        for switch in list(self._switches):
            switch.cancel()
        for thread in self._threads:
            thread.join()
