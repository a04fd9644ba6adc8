"""HTTP responses: JSON, and errors in OpenAI's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from qvl_runtime.openai.errors import ApiError
from qvl_runtime.server.json_text import to_json


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Create a JSON response."""
    return written_response(to_json(value), status, headers)


def written_response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Create a response of what is JSON already."""
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """Create the response of an error."""
    sent = dict(headers or {})
    if error.retry_after is not None:
        sent["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    return json_response(error.body(), error.status, sent)
