"""The body of a request: counted while it is read, for a limited time."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope

from qvl_runtime.server.admission import Held
from qvl_runtime.server.errors import ApiError, refused
from qvl_runtime.server.json_text import from_json
from qvl_runtime.server.limits import Limits


class ClientGone(Exception):
    """The client closed its connection."""


async def read_body(scope: Scope, receive: Receive, held: Held, limits: Limits) -> bytearray:
    """The body of a request.

    Raises
    ------
    ApiError
        413 for a body that is too large, 408 for one that takes too long, 429 when all bodies together are too large.
    ClientGone
    """
    too_large = ApiError(413, f"the request has more than {limits.body_bytes} bytes", code="request_too_large")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and (len(length) > 18 or int(length) > limits.body_bytes):
        raise too_large
    body = bytearray()  # a list of chunks of one byte would take forty times their size
    try:
        async with asyncio.timeout(limits.body_seconds):
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
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {limits.body_seconds:g} seconds") from None
    return body


def parsed(body: bytearray, limits: Limits) -> dict[str, Any]:
    """The JSON object in a body."""
    try:
        return from_json(body, limits.values)
    except ValueError as error:
        raise refused(f"the body {error}") from None
