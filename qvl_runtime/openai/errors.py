"""Errors in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from qvl_runtime.errors import NoRoomError, PromptTooLongError, QvlError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""Error types by status; all others are invalid_request_error."""

LONGEST = 500
"""Largest number of characters of a message."""

TOO_LONG = "context_length_exceeded"
"""Code of the error of a prompt that does not fit the window."""


class ApiError(Exception):
    """An error response.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
    param : str, optional
        The invalid field of the request.
    code : str, optional
        Machine-readable code.
    retry_after : int, optional
        Seconds until a retry.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def shortened(self) -> str:
        """The message, of `LONGEST` characters at most."""
        return self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 3] + "..."

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.shortened, "type": kind, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Create the error of an invalid request: status 400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(reason: str, retry_after: int = 5) -> ApiError:
    """Create the error of a temporary failure: status 503."""
    return ApiError(503, reason, retry_after=retry_after)


def of_exception(error: BaseException, limit_field: str = "max_tokens") -> ApiError:
    """Convert an exception to an error for the client. A `QvlError` means an invalid request.

    `limit_field` is the request's name of `max_new_tokens`.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError):
        return unavailable("there is not enough memory for this request now")
    if isinstance(error, PromptTooLongError):
        # Clients that lose the code, like LiteLLM, know the error by OpenAI's words, and shorten the conversation.
        return refused(f"this model's maximum context length is exceeded: {error}", code=TOO_LONG)
    if isinstance(error, NoRoomError):
        return refused(str(error).replace("max_new_tokens", limit_field, 1), limit_field)
    if isinstance(error, QvlError):
        return refused(str(error))
    return ApiError(500, "internal server error; see the server's log")
