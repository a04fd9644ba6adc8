"""What a server is made of, and its end."""

from __future__ import annotations

import asyncio
import threading

from qvl_runtime.model import Model
from qvl_runtime.server.admission import Admission
from qvl_runtime.server.answers import Answerer
from qvl_runtime.server.limits import Limits
from qvl_runtime.server.metrics import Metrics
from qvl_runtime.server.running import Runner


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
        self.parsing = asyncio.Semaphore(limits.preparing)

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
