"""A request in the engine, as seen by the thread that submitted it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, Protocol

from qvl_runtime.engine.session import Session, Slice, SliceLimits
from qvl_runtime.errors import QvlError

log = logging.getLogger(__name__)

Work = Generator[Any, SliceLimits | None, None]
"""A computation. It yields a `Slice` or a `Session` to be scheduled, and anything else as a result."""


WAITS = (Slice, Session)


class Cancelled(Exception):
    """The job was cancelled."""


class Owner(Protocol):
    """The scheduler of a job."""

    def compute_here(self, job: Job, ready: Callable[[], bool]) -> None:
        """Compute a job in the calling thread until `ready`, if there is no other job."""

    def compute_in_thread(self, job: Job) -> None:
        """Compute a job in the engine's thread: no thread waits for its results."""


class Job(Iterator[Any]):
    """A submitted computation, and an iterator over its results. Thread-safe.

    Parameters
    ----------
    work : generator
        See `Work`; one thread at a time runs it, the engine's or one that waits for its results.
    length : int
        Tokens of the prompt.
    nbytes : int
        Memory reserved until it ends.
    owner : Owner
        Kept alive until it ends.

    Attributes
    ----------
    results : list
        The results so far.
    slice : Slice or None
        The slice that it waits for.
    session : Session or None
        The session that waits for a step. While the job runs, one of the two is set.
    cancelled : bool
    """

    def __init__(self, work: Work, length: int, nbytes: int, owner: Owner):
        self.nbytes, self.results, self.cancelled = nbytes, list[Any](), False
        self.slice: Slice | None = Slice(False, length)
        self.session: Session | None = None
        self._work: Work | None = work
        self._owner: Owner | None = owner
        self._error: BaseException | None = None
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._callbacks: list[Callable[[], object]] = []
        self._callbacks_lock, self._end_lock = threading.Lock(), threading.Lock()
        self._end_lock.acquire()  # until the end: `join` waits for it
        self._pid = os.getpid()

    # for the thread that asked
    def __next__(self) -> Any:
        self._check_process()
        if self.cancelled:
            raise StopIteration
        try:
            self._compute_until(self._has_item)
            item = self._ready.get()
        except BaseException:
            self.cancel()
            raise
        if item is not self:
            return item
        self._ready.put(self)  # for the next thread
        if self._error is not None and not self.cancelled:
            raise self._error
        raise StopIteration

    def join(self) -> list[Any]:
        """Wait for the end and return all results.

        Raises
        ------
        QvlError
            If it was cancelled.
        """
        self._check_process()
        try:
            self._compute_until(self._is_over)
            with self._end_lock:
                pass
        except BaseException:
            self.cancel()
            raise
        if self.cancelled:
            raise QvlError("the answer was cancelled before its end")
        if self._error is not None:
            raise self._error
        return self.results

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the job ends, in the thread that computes it; at once if it has ended.

        An exception from it is logged, unless it is called at once.
        """
        with self._callbacks_lock:
            waits = self._work is not None
            if waits:
                self._callbacks.append(callback)
        if not waits:
            callback()
        elif (owner := self._owner) is not None:
            owner.compute_in_thread(self)

    def cancel(self) -> None:
        """End the job at the next slice. Thread-safe."""
        if self._work is not None:
            self.cancelled = True

    def _compute_until(self, ready: Callable[[], bool]) -> None:
        if (owner := self._owner) is not None:
            owner.compute_here(self, ready)

    def _has_item(self) -> bool:
        return not self._ready.empty()

    def _is_over(self) -> bool:
        return not self._end_lock.locked()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise QvlError("this answer belongs to the parent process of this fork; ask again in this process")

    # for the thread that computes it
    @property
    def ended(self) -> bool:
        """Whether the computation is over."""
        return self._work is None

    def advance(self, limits: SliceLimits | None = None) -> bool:
        """Run until the job waits again; return False if it ended. Results and the end are published."""
        work = self._work
        assert work is not None
        try:
            item = work.send(limits)
            while not isinstance(item, WAITS):
                self.results.append(item)
                self._ready.put(item)
                item = next(work)
            self.slice = item if isinstance(item, Slice) else None
            self.session = item if isinstance(item, Session) else None
            return True
        except StopIteration:
            self._end(None)
        except BaseException as error:
            self._end(error)
        return False

    def fail(self, error: BaseException) -> None:
        """End the job with an error. If it has ended, complete what an interrupt left undone."""
        work = self._work
        if work is not None:
            try:
                work.close()
            except BaseException as other:
                error = other
            self._end(error)
        elif not self._is_over():
            self._end(self._error)

    def check(self, *_: Any) -> None:
        """A `Trace` that stops the computation of a cancelled job."""
        if self.cancelled:
            raise Cancelled

    def _end(self, error: BaseException | None) -> None:
        self.slice = self.session = None
        self._error = error
        with self._callbacks_lock:
            self._work = None
        self._ready.put(self)
        if not self._is_over():
            self._end_lock.release()
        for callback in self._callbacks:
            try:
                callback()
            except Exception:  # which would end the engine's thread, and all answers would wait for ever
                log.exception("what is called at the end of an answer failed")
        self._owner = None
