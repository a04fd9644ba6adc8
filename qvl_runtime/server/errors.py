"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import QvlError
from qvl_runtime.server.json_text import to_json

if TYPE_CHECKING:
    from starlette.responses import Response

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
"""The type of a status; all others are the request's fault."""

LONGEST = 500
"""Characters of a message."""


class ApiError(Exception):
    """An answer that is an error.

    Parameters
    ----------
    status : int
        Of HTTP.
    message : str
    param : str, optional
        The field of the request that is wrong.
    code : str, optional
        For programs.
    retry_after : int, optional
        Seconds after which to try again.
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

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        message = self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 3] + "..."
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """It as a response."""
        sent = dict(headers or {})
        if self.retry_after is not None:
            sent["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            sent["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), self.status, sent)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong: status 400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(reason: str, retry_after: int = 5) -> ApiError:
    """A request that nobody can answer now: status 503."""
    return ApiError(503, reason, retry_after=retry_after)


def of_exception(error: BaseException) -> ApiError:
    """What a client is told of an exception. A `QvlError` is one of the request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError):
        return unavailable("there is not enough memory for this request now")
    if isinstance(error, QvlError):
        return refused(str(error))
    return ApiError(500, "the server made an error; its log has more")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as a JSON response."""
    from starlette.responses import Response  # Not above: `qvl batch` reads requests without a server's packages.

    return Response(to_json(value), status, headers, media_type="application/json")
