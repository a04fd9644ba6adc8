"""The order of work: carried out at once, or put on a tape that becomes a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qvl_kernels.gpu.driver import Driver


class Queue:
    """Where everything that runs on the device passes through.

    While `capture` records, nothing runs: kernels are loaded and memory is taken as the calls come in, and only the
    finished tape is shown to the driver, which allows neither within a capture.
    """

    def __init__(self, driver: Driver):
        self.driver = driver
        self._tape: list[tuple[Callable, tuple, Any]] | None = None

    def __call__(self, action: Callable, *args: Any, keep: Any = None) -> None:
        """Do ``action(*args)``, a call of the driver, now or at every replay; `keep` lives as long as that may be."""
        if self._tape is None:
            action(*args)
        else:
            self._tape.append((action, args, keep))

    def host_access(self, what: str) -> None:
        """Refuse what only makes sense at once."""
        if self._tape is not None:
            raise RuntimeError(f"{what} moves data between host and GPU: not possible within a captured step")

    def capture(self, step: Callable[[], None]) -> Replay:
        """Record what `step` does."""
        if self._tape is not None:
            raise RuntimeError("a captured step cannot capture another")
        self._tape = tape = []
        try:
            step()
        finally:
            self._tape = None

        def play() -> None:
            for action, args, _ in tape:
                action(*args)

        return Replay(self.driver, self.driver.capture(play), tape)


class Replay:
    """A captured step: call it to repeat the step."""

    def __init__(self, driver: Driver, graph: Any, keep: Any):
        self._driver, self._graph, self._keep = driver, graph, keep

    def __call__(self) -> None:
        self._driver.replay(self._graph)
