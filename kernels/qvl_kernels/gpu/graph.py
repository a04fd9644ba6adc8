"""The order of work: carried out at once, or put on a tape that becomes a CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.memory import Memory


class Queue:
    """Where everything that runs on the device passes through.

    While `capture` records, nothing runs: kernels are loaded and memory is taken as the calls come in, and only the
    finished tape is shown to the driver, which allows neither within a capture.
    """

    def __init__(self, driver: Driver, memory: Memory):
        self.driver, self.memory = driver, memory
        self._tape: list[tuple[Callable, tuple]] | None = None
        self._keep: list[Any] = []

    def __call__(self, action: Callable, *args: Any, keep: Iterable[Any] = ()) -> None:
        """Do ``action(*args)``, a call of the driver, now or at every replay.

        The memory of the arrays in `keep` (or of pairs that begin with one) lives as long as that may be. What was
        made within the captured step is `Memory.scratch`'s: it is used again as soon as the step lets go of it.
        """
        if self._tape is None:
            action(*args)
        else:
            self._tape.append((action, args))
            self._keep += _owners(keep)

    def host_access(self, what: str) -> None:
        """Refuse what only makes sense at once."""
        if self._tape is not None:
            raise RuntimeError(f"{what} moves data between host and GPU: not possible within a captured step")

    def capture(self, step: Callable[[], None]) -> Replay:
        """Record what `step` does."""
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

            replay = Replay(self.driver, self.driver.capture(play), keep)
        weakref.finalize(replay, self.memory.scratch.release).atexit = False
        return replay


def _owners(values: Iterable[Any]) -> Iterator[Any]:
    """What keeps the memory of arrays that were not made within the captured step."""
    for value in values:
        array = value[0] if isinstance(value, tuple) else value
        if isinstance(array, DeviceArray) and not array.owner.scratch:
            yield array.owner


class Replay:
    """A captured step: call it to repeat the step."""

    def __init__(self, driver: Driver, graph: Any, keep: Any):
        self._driver, self._graph, self._keep = driver, graph, keep

    def __call__(self) -> None:
        self._driver.replay(self._graph)
