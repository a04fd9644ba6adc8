"""HTTP responses: JSON, and errors in the format of the route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from qvl_runtime.anthropic.errors import error_body
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.server.json_text import to_json

MESSAGES = "/v1/messages"
"""The route whose errors, like those of the routes below it, are in Anthropic's format."""


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Create a JSON response."""
    return written_response(to_json(value), status, headers)


def written_response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Create a response of what is JSON already."""
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ApiError, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """Create the response of an error to a request for `path`."""
    sent = dict(headers or {})
    if error.retry_after is not None:
        sent["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    body = error_body(error) if path == MESSAGES or path.startswith(f"{MESSAGES}/") else error.body()
    return json_response(body, error.status, sent)
