"""One request on its way through the engine, as the thread that asked sees it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any

from qvl_runtime.engine.session import Leave, Session, Slice
from qvl_runtime.errors import QvlError

Work = Generator[Any, Leave | None, None]
"""A computation. It yields a `Slice` or a `Session` where it waits for its turn, and anything else as a result."""


WAITS = (Slice, Session)


class Cancelled(Exception):
    """Nobody wants the answer any more."""


class Job(Iterator[Any]):
    """A computation that the engine was given, and its results as they come.

    Several threads may use one.

    Parameters
    ----------
    work : generator
        See `Work`; only the engine's thread runs it.
    length : int
        Tokens of its prompt.
    nbytes : int
        Memory that it takes until it ends.
    owner : object
        What must live until then.

    Attributes
    ----------
    results : list
        All results so far.
    slice : Slice or None
        What it waits to compute.
    session : Session or None
        What it waits to be fed. Of the two there is one while it runs.
    begun, cancelled : bool
    """

    def __init__(self, work: Work, length: int, nbytes: int, owner: object):
        self.nbytes, self.results, self.cancelled = nbytes, list[Any](), False
        self.begun = False
        self.slice: Slice | None = Slice(False, length)
        self.session: Session | None = None
        self._work: Work | None = work
        self._owner: object = owner
        self._error: BaseException | None = None
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._tell: list[Callable[[], object]] = []
        self._telling, self._ended = threading.Lock(), threading.Lock()
        self._ended.acquire()
        self._pid = os.getpid()

    # for the thread that asked
    def __next__(self) -> Any:
        self._check_process()
        if self.cancelled:
            raise StopIteration
        try:
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
        """Wait for the end; all results.

        Raises
        ------
        QvlError
            When it was cancelled.
        """
        self._check_process()
        try:
            with self._ended:
                pass
        except BaseException:
            self.cancel()
            raise
        if self.cancelled:
            raise QvlError("the answer was cancelled before its end")
        if self._error is not None:
            raise self._error
        return self.results

    def when_ended(self, tell: Callable[[], object]) -> None:
        """Call `tell` at the end, in the engine's thread, or at once if that was before."""
        with self._telling:
            if self._work is not None:
                self._tell.append(tell)
                return
        tell()

    def cancel(self) -> None:
        """End it at the next slice. Any thread may call this at any time."""
        if self._work is not None:
            self.cancelled = True

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise QvlError("this answer is computed in another process, which has forked this one; ask here again")

    # for the engine's thread
    def advance(self, leave: Leave | None = None) -> bool:
        """Go on until it waits again; whether it did. Its results and its end are told."""
        work = self._work
        assert work is not None
        self.begun = True
        try:
            item = work.send(leave)
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
        """End it with an error."""
        work = self._work
        if work is not None:
            try:
                work.close()
            except BaseException as other:
                error = other
            self._end(error)

    def check(self, *_: Any) -> None:
        """The `Trace` that ends a computation nobody wants."""
        if self.cancelled:
            raise Cancelled

    def _end(self, error: BaseException | None) -> None:
        self.slice = self.session = self._owner = None
        with self._telling:
            self._work = None
        self._error = error
        self._ready.put(self)
        self._ended.release()
        for tell in self._tell:
            tell()
