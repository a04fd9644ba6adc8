"""The state of a server, and its shutdown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from qvl_runtime.model import Model
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.requests import check_model
from qvl_runtime.server.admission import Admission
from qvl_runtime.server.answers import Answerer
from qvl_runtime.server.body import parsed
from qvl_runtime.server.metrics import Metrics
from qvl_runtime.server.running import Runner

R = TypeVar("R")


class Service:
    """A served model.

    Parameters
    ----------
    model : Model
    name : str
        Name of the model for clients.
    limits : Limits
    allow_urls : bool
        Allow pictures from http(s) URLs.
    log_content : bool
        Log requests and answers.

    Attributes
    ----------
    hurried : bool
        Whether `stop` waits no longer; set it from any thread.
    """

    def __init__(self, model: Model, name: str, limits: Limits, *, allow_urls: bool, log_content: bool):
        self.model, self.name, self.limits = model, name, limits
        self.allow_urls, self.log_content = allow_urls, log_content
        self.admission = Admission(limits)
        self.metrics = Metrics(self.admission)
        self.runner = Runner(self.admission)
        self.answerer = Answerer(model, limits, self.metrics, threading.Semaphore(limits.preparing))
        self.hurried = False
        self._parsing = asyncio.Semaphore(limits.preparing)

    async def checked(self, body: bytearray, read: Callable[[dict[str, Any]], R]) -> R:
        """Parse a request and validate it with `read`, in a thread: large bodies take a second."""

        def work() -> R:
            data = parsed(body, self.limits)
            check_model(data, self.name)
            return read(data)

        async with self._parsing:
            return await asyncio.to_thread(work)

    async def stop(self) -> None:
        """Refuse new requests, and wait for running ones within the limits, or until `hurried`; then end them."""
        self.admission.stop()
        try:
            async with asyncio.timeout(self.limits.stop_seconds):
                while self.admission.inside and not self.hurried:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        await asyncio.to_thread(self.runner.close)
