"""What a server is made of, and its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from qvl_runtime.model import Model
from qvl_runtime.server.admission import Admission
from qvl_runtime.server.answers import Answerer
from qvl_runtime.server.body import parsed
from qvl_runtime.server.limits import Limits
from qvl_runtime.server.metrics import Metrics
from qvl_runtime.server.requests import check_model
from qvl_runtime.server.running import Runner

R = TypeVar("R")


class Service:
    """A model that is served.

    Parameters
    ----------
    model : Model
    name : str
        What clients call it.
    limits : Limits
    allow_urls : bool
        Whether http(s) pictures are fetched.
    log_content : bool
        Whether requests and answers are logged.
    """

    def __init__(self, model: Model, name: str, limits: Limits, *, allow_urls: bool, log_content: bool):
        self.model, self.name, self.limits = model, name, limits
        self.allow_urls, self.log_content = allow_urls, log_content
        self.admission = Admission(limits)
        self.metrics = Metrics(self.admission)
        self.runner = Runner(self.admission, limits)
        self.answerer = Answerer(model, limits, self.metrics, threading.Semaphore(limits.preparing))
        self._parsing = asyncio.Semaphore(limits.preparing)

    async def checked(self, body: bytearray, read: Callable[[dict[str, Any]], R]) -> R:
        """The JSON of a request, checked by `read`, in a thread: some bodies take a second."""

        def work() -> R:
            data = parsed(body, self.limits)
            check_model(data, self.name)
            return read(data)

        async with self._parsing:
            return await asyncio.to_thread(work)

    async def stop(self) -> None:
        """Take no more requests, and wait until the running ones are answered, as long as the limits say."""
        self.admission.stop()
        try:
            async with asyncio.timeout(self.limits.stop_seconds):
                while self.admission.inside:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        await asyncio.to_thread(self.runner.close)
