"""Computes the answers of a request in a thread: pictures and prompt, then a stream of pieces."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from qvl_runtime.batching import one_each
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.tools import Tools
from qvl_runtime.model import Model
from qvl_runtime.openai.answers import Part, Whole, described
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import Messages
from qvl_runtime.openai.pictures import Sent, fetched
from qvl_runtime.openai.prompts import NOTHING, sources_of, with_pictures
from qvl_runtime.openai.requests import Asked
from qvl_runtime.results import Stream
from qvl_runtime.server.metrics import Metrics, Watch
from qvl_runtime.server.running import Emit, Switch


@dataclasses.dataclass(frozen=True)
class Preparing:
    """Event: preparation of the prompt begins."""


@dataclasses.dataclass(frozen=True)
class Begun:
    """Event: the prompt was accepted, and the computation of an answer begins."""


@dataclasses.dataclass(frozen=True)
class End:
    """Event: all answers are complete."""


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Computes the answers of requests. Its methods run in threads.

    Attributes
    ----------
    model : Model
    limits : Limits
    metrics : Metrics
    preparing : threading.Semaphore
        Held while pictures are decoded, because each takes hundreds of megabytes.
    """

    model: Model
    limits: Limits
    metrics: Metrics
    preparing: threading.Semaphore

    def answer(self, asked: Asked, salt: str | None, arrived: float, emit: Emit, switch: Switch) -> None:
        """Answer a request and emit events. The answers are computed concurrently, so their parts are interleaved.

        Parameters
        ----------
        asked : Asked
        salt : str or None
            Partition of the caches; see `Model.stream`.
        arrived : float
            Time of arrival.
        """
        watch = Watch(self.metrics, arrived)
        contents = fetched(sources_of(asked.prompt), self.limits, switch.check)
        prompt: Any = None
        pictures: list[Sent] = []

        def read(index: int, stream: Stream) -> None:
            try:
                for piece in stream:
                    watch.piece(index, piece)
                    emit(Part(index, piece))
                switch.check()
                result = stream.result()
            except QvlError as error:
                # The prompt was accepted: only a grammar of the request can still be invalid.
                ours = asked.options["constraint"] is None and asked.options.get("tools") is None
                raise ApiError(500 if ours else 400, str(error)) from error
            self.metrics.answer(result.timings, result.finish_reason)
            emit(Whole(index, result, described(result.boxes, pictures)))

        with ThreadPoolExecutor(asked.n, thread_name_prefix="qvl-read") as pool:
            readings: list[Future[None]] = []
            try:
                for index, options in enumerate(one_each({"n": asked.n, "seed": asked.seed, **asked.options})):
                    with self._turn(contents):
                        switch.check()
                        emit(Preparing())
                        if prompt is None:
                            prompt, pictures = with_pictures(self.model, asked.prompt, contents, self.limits)
                        stream = self.model.stream(prompt, allow_paths=False, cache_salt=salt, **options)
                    switch.watch(stream)
                    emit(Begun())
                    readings.append(pool.submit(read, index, stream))
                for reading in as_completed(readings):
                    reading.result()
            except BaseException:
                switch.cancel()  # after a failure nobody reads the others, and the pool would wait for them
                raise
        watch.end()
        emit(End())

    def tokenize(self, prompt: Messages | str | list[int], tools: Tools | None, emit: Emit, switch: Switch) -> None:
        """Emit the token ids of a prompt as a list, including the placeholders of pictures."""
        contents = fetched(sources_of(prompt), self.limits, switch.check)
        with self._turn(contents):
            switch.check()
            made, _ = with_pictures(self.model, prompt, contents, self.limits)
            prompts = self.model.prompts
            if tools is not None:
                prompts = self.model.calling(made).prompts(prompts, tools)
            emit(prompts.build(made, None, NOTHING).ids)

    def _turn(self, contents: Sequence[bytes]) -> contextlib.AbstractContextManager:
        """Return the semaphore to hold while preparing a prompt; text-only prompts do not wait."""
        return self.preparing if contents else contextlib.nullcontext()
