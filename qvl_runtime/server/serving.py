"""The routes of answers: from a request's body to a response or a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, TypeVar

from starlette.types import Message, Receive, Scope, Send

from qvl_kernels.ops import DeviceError
from qvl_runtime.openai.answers import Part, Whole
from qvl_runtime.openai.errors import ApiError, of_exception, refused
from qvl_runtime.openai.formats import Reply
from qvl_runtime.openai.messages import Messages
from qvl_runtime.openai.requests import Asked
from qvl_runtime.server.answers import Begun, End, Preparing
from qvl_runtime.server.body import with_body
from qvl_runtime.server.json_text import to_json, to_json_in_pieces
from qvl_runtime.server.responses import written_response
from qvl_runtime.server.security import SALT
from qvl_runtime.server.service import Service

A = TypeVar("A", bound=Asked)

log = logging.getLogger(__name__)

PING = b": ping\n\n"

LAST_SECONDS = 5.0
"""Seconds for sending a stream the reason of its end."""


class AnswerRoute(Generic[A]):
    """A route that returns answers, as an ASGI application.

    Parameters
    ----------
    service : Service
    read : callable
        Validates the JSON of a request.
    reply : callable
        Creates the response to a request.
    """

    def __init__(
        self,
        service: Service,
        read: Callable[[Mapping[str, Any]], A],
        reply: Callable[[A], Reply],
    ):
        self._service, self._read, self._reply = service, read, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, arrived = self._service, time.monotonic()

        async def handle(body: bytearray) -> None:
            asked = await service.checked(body, self._read)
            if service.log_content:
                log.info("request: %r", asked.prompt.turns if isinstance(asked.prompt, Messages) else asked.prompt)
            await until_gone(receive, self._respond(asked, arrived, scope, receive, send))

        await with_body(service.admission, service.limits, scope, receive, send, handle)

    async def _respond(self, asked: A, arrived: float, scope: Scope, receive: Receive, send: Send) -> None:
        service, reply = self._service, self._reply(asked)
        stream = EventStream(send)
        try:
            async with asyncio.timeout(service.limits.seconds):
                job = functools.partial(service.answerer.answer, asked, scope[SALT], arrived)
                async with service.runner.run(job) as events:
                    await _begun(events, service.limits.prepare_seconds)
                    if asked.stream:
                        await self._stream(reply, events, stream)
                    else:
                        await self._whole(reply, events, scope, receive, send)
        except Exception as error:
            problem = problem_of(error, service, asked.limit_field)
            if not stream.started:
                raise problem from None
            last = await asyncio.to_thread(to_json_events, reply.failed(problem), to_json_in_pieces)
            # A client that reads nothing does not read this either.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_SECONDS):
                    await stream.send(last + reply.tail)
                    await stream.end()

    async def _whole(self, reply: Reply, events: asyncio.Queue, scope: Scope, receive: Receive, send: Send) -> None:
        ended = [event async for event in _until_end(events) if isinstance(event, Whole)]
        answers = sorted(ended, key=lambda answer: answer.index)
        self._log(answers)
        body = await asyncio.to_thread(lambda: to_json_in_pieces(reply.body(answers)))
        await written_response(body)(scope, receive, send)

    async def _stream(self, reply: Reply, events: asyncio.Queue, stream: EventStream) -> None:
        answers: list[Whole] = []
        await stream.start()
        await stream.send(to_json_events(reply.begin()))
        async for event in _until_end(events, stream, self._service.limits.ping_seconds):
            if isinstance(event, Whole):
                answers.append(event)
                await _send_large(await asyncio.to_thread(reply.complete, event), stream)
            else:
                await stream.send(to_json_events(reply.part(event)))
        answers.sort(key=lambda answer: answer.index)
        self._log(answers)
        await _send_large(await asyncio.to_thread(reply.end, answers), stream)
        await stream.send(reply.tail)
        await stream.end()

    def _log(self, answers: list[Whole]) -> None:
        if self._service.log_content:
            for answer in answers:
                log.info("answer: %r", answer.result.text)


class EventStream:
    """A response of server-sent events.

    Parameters
    ----------
    send : callable
        The ASGI callable.

    Attributes
    ----------
    started : bool
        Whether the head was sent.
    sent : float
        Time of the event loop at which something was sent last.
    """

    def __init__(self, send: Send):
        self._send, self.started, self.sent = send, False, 0.0

    async def start(self) -> None:
        """Send the response head."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        self.started, self.sent = True, asyncio.get_running_loop().time()
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(self, events: bytes) -> None:
        """Send complete events."""
        if events:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
            self.sent = asyncio.get_running_loop().time()

    async def end(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def to_json_events(values: Sequence[dict[str, Any]], encode: Callable[[dict[str, Any]], bytes] = to_json) -> bytes:
    """Encode objects as server-sent events, with their types as names if they have any."""
    return b"".join(
        (b"event: %s\n" % value["type"].encode() if "type" in value else b"") + b"data: " + encode(value) + b"\n\n"
        for value in values
    )


async def _send_large(values: Sequence[dict[str, Any]], stream: EventStream) -> None:
    """Send events that may hold a whole answer with its log probabilities, one after the other."""
    for value in values:
        await stream.send(await asyncio.to_thread(to_json_events, [value], to_json_in_pieces))


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine; cancel it if the client disconnects.

    Parameters
    ----------
    receive : callable
        The ASGI callable, after the whole body was received.
    work : coroutine
    """

    async def gone() -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        finished = working.done()
        working.cancel()
        await asyncio.wait((working, watching))
    if finished:
        await working


async def _begun(events: asyncio.Queue, seconds: float) -> None:
    """Wait until a job has accepted its prompt."""
    event = await next_event(events)
    try:
        async with asyncio.timeout(seconds):
            while not isinstance(event, Begun):
                event = await next_event(events)
    except TimeoutError:
        raise refused(f"reading the pictures and preparing the prompt took more than {seconds:g} seconds") from None


async def next_event(events: asyncio.Queue) -> Any:
    """Return the next event of a job; raise its exception."""
    event = await events.get()
    if isinstance(event, BaseException):
        raise event
    return event


async def _until_end(
    events: asyncio.Queue, stream: EventStream | None = None, ping: float | None = None
) -> AsyncIterator[Part | Whole]:
    """Yield the parts and answers of a job; send a ping to a stream to which nothing was sent for `ping` seconds.

    Parts may come meanwhile: those of a call are sent when it is complete.
    """
    while True:
        try:
            async with asyncio.timeout_at(None if stream is None or ping is None else stream.sent + ping):
                event = await next_event(events)
        except TimeoutError:
            if stream is not None:
                await stream.send(PING)
            continue
        if isinstance(event, End):
            return
        if not isinstance(event, Preparing | Begun):
            yield event


def problem_of(error: Exception, service: Service, limit_field: str = Asked.limit_field) -> ApiError:
    """Convert an exception to an error for the client, see `of_exception`; log internal errors."""
    if isinstance(error, TimeoutError):
        return ApiError(504, f"the request took more than {service.limits.seconds:g} seconds")
    problem = of_exception(error, limit_field)
    problem.message = problem.message.removeprefix(f"{service.model.blob.path}: ")  # only its owner's to know
    if problem.status == 500:
        log_error(error, service.log_content)
    # The error and its frames refer to each other: what they hold, such as pictures, would wait for a collection.
    traceback.clear_frames(error.__traceback__)
    return problem


def log_error(error: BaseException, content: bool) -> None:
    """Log the origin of an exception. Its message may contain a prompt and is only logged with `content`, but one of
    the device, which tells the machine's owner what to do."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    said = f": {error}" if content or isinstance(error, DeviceError) else ""
    log.error("%s%s at %s", type(error).__name__, said, " < ".join(reversed(places)))
