"""Errors in Anthropic's format: ``{"type": "error", "error": {"type", "message"}}``."""

from __future__ import annotations

from typing import Any

from qvl_runtime.openai.errors import TOO_LONG, ApiError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Error types by status; all others are invalid_request_error."""

NO_THREADS = "thread_unsupported_request"
"""Code of the error of a request for a stored conversation. Anthropic's client then sends the whole one."""


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON body of an error."""
    message = error.shortened
    if error.param is not None and error.param not in message:  # it has no field of its own
        message = f"{error.param}: {message}"
    if error.code == TOO_LONG:  # clients know this error by Anthropic's words, and shorten the conversation
        message = f"prompt is too long: {message}"
    told: dict[str, Any] = {"type": TYPES.get(error.status, "invalid_request_error"), "message": message}
    if error.code == NO_THREADS:
        told["details"] = {"error_code": NO_THREADS, "unsupported": [error.param]}
    return {"type": "error", "error": told}
