"""Reading the body of a request with limits on size and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from qvl_runtime.openai.errors import ApiError, refused
from qvl_runtime.openai.limits import Limits
from qvl_runtime.server.admission import Admission, Held
from qvl_runtime.server.json_text import from_json
from qvl_runtime.server.responses import error_response

DROP_SECONDS = 2.0
"""Seconds for which the rest of a refused request is read."""


class ClientGone(Exception):
    """The client closed its connection."""


async def with_body(
    admission: Admission,
    limits: Limits,
    scope: Scope,
    receive: Receive,
    send: Send,
    handle: Callable[[bytearray], Awaitable[None]],
) -> None:
    """Admit a request, read its body, and handle it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(admission.place())
            held = stack.enter_context(admission.holding())
            async with admission.reading():
                body = await read_body(scope, receive, held, limits)
        except ClientGone:
            return
        except ApiError as error:
            await refuse_unread(error, scope, receive, send)
            return
        await handle(body)


async def refuse_unread(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a request whose body was not read, and discard the body.

    If the connection were closed with unread bytes, the client's system would drop the response.
    """

    async def sending(message: Any) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await error_response(error, scope["path"])(scope, receive, sending)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DROP_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def read_body(scope: Scope, receive: Receive, held: Held, limits: Limits) -> bytearray:
    """Read the body of a request.

    Raises
    ------
    ApiError
        413 if the body is too large, 429 if all bodies together are too large.
    ClientGone
    """
    too_large = ApiError(413, f"the request has more than {limits.body_bytes} bytes", code="request_too_large")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and (len(length) > 18 or int(length) > limits.body_bytes):
        raise too_large
    body = bytearray()  # a list of one-byte chunks would take forty times the memory
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        held.add(len(chunk))
        body += chunk
        if held.bytes > limits.body_bytes:
            raise too_large
    return body


def parsed(body: bytearray, limits: Limits) -> dict[str, Any]:
    """Parse a body as a JSON object."""
    try:
        return from_json(body, limits.values)
    except ValueError as error:
        raise refused(f"the body {error}") from None
