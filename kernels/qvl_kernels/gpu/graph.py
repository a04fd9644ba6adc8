"""The queue of device work: executed at once, or recorded as a CUDA graph."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.memory import Memory

if TYPE_CHECKING:
    from qvl_kernels.gpu.table import SequenceTable


class Queue:
    """All work on the device passes through this queue.

    While `capture` records, nothing runs. Kernels are loaded and memory is allocated during recording; only the
    finished recording is captured by the driver, which allows neither within a capture.
    """

    def __init__(self, driver: Driver, memory: Memory):
        self.driver, self.memory = driver, memory
        self._tape: list[tuple[Callable, tuple]] | None = None
        self._keep: list[Any] = []

    def __call__(self, action: Callable, *args: Any, keep: Iterable[Any] = ()) -> None:
        """Run ``action(*args)``, a driver call, now or at every replay.

        The memory of arrays in `keep` (or of pairs that begin with one) lives as long as the replay. Arrays allocated
        within the captured step belong to `Memory.scratch` and are reused when the step frees them.
        """
        if self._tape is None:
            action(*args)
        else:
            self._tape.append((action, args))
            self._keep += _owners(keep)

    @property
    def recording(self) -> bool:
        """Whether a step is recorded."""
        return self._tape is not None

    @contextlib.contextmanager
    def branches(self, count: int) -> Iterator[Callable[[], None]]:
        """Record `count` branches, which the device may run at the same time; each begins with a call of what is
        yielded. They use different scratch memory. While nothing is recorded, or if there is one, they are no branches.
        """
        if count == 1 or not self.recording:
            yield lambda: None
            return
        indices = iter(range(count))
        self(self.driver.streams.fork)
        with self.memory.scratch.apart():
            yield lambda: self(self.driver.streams.branch, next(indices))
        self(self.driver.streams.join, count)

    def host_access(self, what: str) -> None:
        """Raise an error during recording: host transfers cannot be captured."""
        if self._tape is not None:
            raise RuntimeError(f"{what} moves data between host and GPU: not possible within a captured step")

    def capture(self, step: Callable[[], None], table: SequenceTable) -> Replay:
        """Record the work of `step`, which finds the arrays of sequences through `table`."""
        if self._tape is not None:
            raise RuntimeError("a captured step cannot capture another")
        with self.memory.scratch.record():
            tape: list[tuple[Callable, tuple]] = []
            keep: list[Any] = []
            self._tape, self._keep = tape, keep
            try:
                step()
            finally:
                self._tape, self._keep = None, []

            def play() -> None:
                for action, args in tape:
                    action(*args)

            replay = Replay(self.driver, self.driver.capture(play), keep, table)
        weakref.finalize(replay, self.memory.scratch.release).atexit = False
        return replay


def _owners(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the owners of arrays that were not allocated within the captured step."""
    for value in values:
        array = value[0] if isinstance(value, tuple) else value
        if isinstance(array, DeviceArray) and not array.owner.scratch:
            yield array.owner


class Replay:
    """A captured step; call it to replay.

    Attributes
    ----------
    table : SequenceTable
        Through which it finds the arrays of sequences.
    """

    def __init__(self, driver: Driver, graph: Any, keep: Any, table: SequenceTable):
        self._driver, self._graph, self._keep, self.table = driver, graph, keep, table

    def __call__(self) -> None:
        self._driver.replay(self._graph)
