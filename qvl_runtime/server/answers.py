"""Computes the answers of a request in a thread: pictures and prompt, then a stream of pieces."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from qvl_runtime.boxes import Box
from qvl_runtime.engine.generation import Piece
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.pictures import Access
from qvl_runtime.model import Model
from qvl_runtime.results import Result, Stream
from qvl_runtime.server.errors import ApiError, refused
from qvl_runtime.server.limits import Limits
from qvl_runtime.server.messages import Messages
from qvl_runtime.server.pictures import Sent, fetched, measured
from qvl_runtime.server.requests import Asked
from qvl_runtime.server.running import Emit, Switch

if TYPE_CHECKING:
    from qvl_runtime.server.metrics import Metrics

NOTHING = Access(paths=False)
"""Access of a request: neither files nor URLs."""


@dataclasses.dataclass(frozen=True)
class Preparing:
    """Event: preparation of the prompt begins."""


@dataclasses.dataclass(frozen=True)
class Begun:
    """Event: the prompt was accepted, and the computation of an answer begins."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Event: a piece of the answer with this index."""

    index: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class Whole:
    """Event: the answer with this index is complete; the boxes are in the client's format."""

    index: int
    result: Result
    boxes: list[dict[str, Any]]


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
        from qvl_runtime.server.metrics import Watch  # `qvl batch` uses this module without prometheus_client

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
                raise ApiError(500 if asked.options["constraint"] is None else 400, str(error)) from error
            self.metrics.answer(result.timings, result.finish_reason)
            emit(Whole(index, result, described(result.boxes, pictures)))

        with ThreadPoolExecutor(asked.n, thread_name_prefix="qvl-read") as pool:
            readings: list[Future[None]] = []
            try:
                for index in range(asked.n):
                    with self._turn(contents):
                        switch.check()
                        emit(Preparing())
                        if prompt is None:
                            prompt, pictures = with_pictures(self.model, asked.prompt, contents, self.limits)
                        seed = None if asked.seed is None else asked.seed + index
                        options = {"seed": seed, "allow_paths": False, "cache_salt": salt, **asked.options}
                        stream = self.model.stream(prompt, **options)
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

    def tokenize(self, prompt: Messages | str | list[int], emit: Emit, switch: Switch) -> None:
        """Emit the token ids of a prompt as a list, including the placeholders of pictures."""
        contents = fetched(sources_of(prompt), self.limits, switch.check)
        with self._turn(contents):
            switch.check()
            made, _ = with_pictures(self.model, prompt, contents, self.limits)
            emit(self.model.prompts.build(made, None, NOTHING).ids)

    def _turn(self, contents: Sequence[bytes]) -> contextlib.AbstractContextManager:
        """Return the semaphore to hold while preparing a prompt; text-only prompts do not wait."""
        return self.preparing if contents else contextlib.nullcontext()


def with_pictures(
    model: Model, prompt: Messages | str | list[int], contents: Sequence[bytes], limits: Limits
) -> tuple[Any, list[Sent]]:
    """Return the prompt for `Model.stream` and its pictures; `contents` are the bytes of the pictures."""
    if not isinstance(prompt, Messages):
        return prompt, []
    if contents and model.pictures is None:
        raise refused("this model has no vision part: it takes no pictures", "messages")
    upright = model.pictures is not None and model.pictures.reader.upright
    pictures = [measured(content, i, limits, upright=upright) for i, content in enumerate(contents)]

    def mark(corners: Sequence[float], number: int) -> str:
        assert model.pictures is not None, "a box lies on a picture"
        read = model.pictures.reader.read(pictures[number].content, NOTHING)
        return model.blob.family.grounding.mark(corners, read)

    return prompt.for_model(pictures, mark), pictures


def sources_of(prompt: Messages | str | list[int]) -> list[str | bytes]:
    """Return the pictures of a prompt, for `fetched`."""
    return prompt.sources if isinstance(prompt, Messages) else []


def described(boxes: Sequence[Box], pictures: Sequence[Sent]) -> list[dict[str, Any]]:
    """Return boxes in the client's format. They refer to the last picture; without one they have no pixels."""
    size = (pictures[-1].width, pictures[-1].height) if pictures else None
    image = len(pictures) - 1 if pictures else None
    return [{**box_fields(box, size), "image": image} for box in boxes]


def box_fields(box: Box, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return a box as JSON types: the model's coordinates, and pixels of a picture of `size`, if there is one."""
    pixels = None if size is None else list(box.to_pixels(*size))
    return {"ref": box.ref, "numbers": [box.x1, box.y1, box.x2, box.y2], "pixels": pixels}
