"""Access control: API keys, the ``Host`` header, and the ``Origin`` header."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence, Set
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl_runtime.errors import QvlError
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.server.body import refuse_unread

SALT = "qvl.salt"
"""Key of an ASGI scope for the client's cache salt: a hash of its API key, so that caches are not shared."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Default headers of responses."""

KEY_HEADER = "x-api-key"
"""Anthropic's header for the key that others send as ``Authorization: Bearer KEY``."""

ALLOWED = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Max-Age": "600",
    "Vary": "Access-Control-Request-Headers",
}
"""Headers of the response to a preflight of an allowed origin."""

ASKED_HEADERS = ("authorization", "content-type")
"""Headers that an allowed origin may send if it asks for none."""

MOST_ASKED = 64
"""Largest number of headers that a preflight may ask for, each of 64 characters at most."""


def check_names(hosts: Sequence[str], origins: Sequence[str]) -> None:
    """Refuse names that no request can match.

    Parameters
    ----------
    hosts, origins : sequence of str
        As for `Security`.

    Raises
    ------
    QvlError
        For a host with a scheme, a port or a wildcard, or an origin without a scheme or with a path.
    """
    for host in hosts:
        if not isinstance(host, str) or not (re.fullmatch(r"[\w.-]+", host, re.ASCII) or _is_address(host)):
            raise QvlError(f"allowed host {host!r:.200}: is no host name; give the name alone, like qvl.example.org")
    for origin in origins:
        if not isinstance(origin, str) or not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/*?#@\s]+/?|null", origin.lower()):
            raise QvlError(f"allowed origin {origin!r:.200}: is no web origin; give one like https://example.org")


class Security:
    """ASGI middleware that checks access.

    Parameters
    ----------
    app : callable
    open_paths : set of str
        Routes that need no key.
    keys : sequence of str
        Accepted keys. If empty, no key is needed.
    hosts : sequence of str
        Names of this server in addition to ``localhost``. Other names are refused, which prevents DNS rebinding. IP
        addresses are always accepted.
    origins : sequence of str
        Web origins that may send requests in addition to the server's own: ``https://example.org``.
    """

    def __init__(
        self,
        app: ASGIApp,
        open_paths: Set[str],
        keys: Sequence[str],
        hosts: Sequence[str],
        origins: Sequence[str],
    ):
        self._app, self._open = app, open_paths
        self._digests = [_digest(key.encode()) for key in keys]
        self._hosts = {host.lower().rstrip(".") for host in hosts} | {"localhost"}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        foreign = origin if origin is not None and self._is_foreign(origin, headers.get("host", "")) else None
        # A proxy that goes by the other length takes the end of this request for the next one, of another client.
        two_lengths = "content-length" in headers and "transfer-encoding" in headers

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                written = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    written.setdefault(name, value)
                if foreign is not None and self._is_named(foreign):
                    written["Access-Control-Allow-Origin"] = foreign
                    written["Access-Control-Expose-Headers"] = "Retry-After"
                    written["Cross-Origin-Resource-Policy"] = "cross-origin"
                    written.add_vary_header("Origin")
                if two_lengths:
                    written["Connection"] = "close"
            await send(message)

        try:
            if two_lengths:
                raise ApiError(400, "a request has Content-Length or Transfer-Encoding, not both")
            salt = self._check(scope, headers, foreign)
        except ApiError as error:
            await refuse_unread(error, scope, receive, sending)
            return
        if scope["method"] == "OPTIONS":
            allowed = ALLOWED | {"Access-Control-Allow-Headers": _asked_headers(headers)} if foreign else None
            await Response(status_code=204, headers=allowed)(scope, receive, sending)
            return
        scope[SALT] = salt
        await self._app(scope, receive, sending)

    def _check(self, scope: Scope, headers: Headers, foreign: str | None) -> str | None:
        """Raise if access is denied; return the client's cache salt."""
        if not self._is_own_host(headers.get("host", "")):
            raise ApiError(403, "this server does not go by that name; allow it with --allow-host", code="wrong_host")
        if foreign is not None and not self._is_named(foreign):
            raise ApiError(403, "pages of other sites may not ask; allow one with --allow-origin", code="wrong_origin")
        if scope["method"] == "OPTIONS" or not self._digests:
            return None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer] if kind.lower() == "bearer" else []
        given += [headers[KEY_HEADER]] if KEY_HEADER in headers else []
        for key in given:
            digest = _digest(key.strip().encode("latin-1"))
            # Every key is compared, in constant time.
            known = [hmac.compare_digest(digest, own) for own in self._digests]
            if any(known):
                return digest.hex()
        if scope["path"] in self._open:
            return None
        needed = f"this server needs a key: Authorization: Bearer KEY, or {KEY_HEADER}: KEY"
        raise ApiError(401, needed, code="invalid_api_key")

    def _is_own_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name is not None and (name.rstrip(".") in self._hosts or _is_address(name))

    def _is_foreign(self, origin: str, host: str) -> bool:
        return origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")

    def _is_named(self, origin: str) -> bool:
        return origin.lower() in self._origins


def _asked_headers(headers: Headers) -> str:
    """Return the header names that a preflight asks for, such as openai-node's ``x-stainless-os``.

    A client library chooses them, and the server ignores those that it does not know.
    """
    asked = [name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",")]
    valid = [name for name in asked if re.fullmatch(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}", name)]
    return ", ".join(valid[:MOST_ASKED] or ASKED_HEADERS)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(b"qvl key " + key).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
