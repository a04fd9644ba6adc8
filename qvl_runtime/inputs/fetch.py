"""Fetching a picture over http(s): public addresses only, with limits on bytes and time.

Each host of a chain of redirects is resolved once, its addresses are checked, and the connection uses a checked
address. DNS rebinding (a public address for the check, a local one for the connection) is therefore impossible. Proxy
settings of the environment are ignored: the check would only see the proxy's address.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from qvl_runtime.errors import QvlError, excerpt

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_BYTES = 64 << 20
MAX_SECONDS = 30.0
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {True: 443, False: 80}  # by whether the scheme is https
# IPv6 ranges that embed an IPv4 address, which a gateway may reach.
TRANSLATED = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet: not local, private, or in a special range."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    translated = ip.version == 6 and any(ip in net for net in TRANSLATED)
    # What is reserved, such as the obsolete ::127.0.0.1, or site-local counts as global.
    reserved = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    return ip.is_global and not reserved and not translated


def fetch(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    allowed: Callable[[str], bool] | None = None,
) -> bytes:
    """Fetch the content of a URL.

    Parameters
    ----------
    url : str
        An http or https URL without user name and password.
    max_bytes : int
        Limit of the content.
    max_seconds : float
        Limit for everything together: name resolution, connections, redirects, content.
    allowed : callable, optional
        Predicate for an IP address; by default `is_public`.

    Raises
    ------
    QvlError
        If the URL cannot be fetched within the limits, or a URL or address on the way is not allowed.
    """
    deadline, where = _Deadline(max_seconds), url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            reply = _get(_parse(where), deadline, allowed or is_public)
            with reply:
                if reply.status not in REDIRECTS:
                    return _content(reply, max_bytes)
                where = urljoin(where, reply.getheader("Location", ""))
        raise QvlError(f"more than {MAX_REDIRECTS} redirects")
    except (OSError, ValueError, http.client.HTTPException) as error:  # QvlError is a ValueError
        reason = f"took longer than {max_seconds:g} seconds" if isinstance(error, TimeoutError) else excerpt(error)
        raise QvlError(f"cannot fetch {excerpt(url)}: {reason}; download it and pass the file") from None


class _Deadline:
    """A deadline for all steps of a request."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds


class _Target(NamedTuple):
    """The parts of a URL: the path is escaped, the host is IDNA-encoded."""

    secure: bool
    host: str
    port: int
    path: str


def _parse(url: str) -> _Target:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise QvlError(f"{excerpt(parts.scheme) or 'nothing'}: is not a supported scheme; only http and https are")
    if not parts.hostname or "@" in parts.netloc:
        raise QvlError("its URL names no host" if not parts.hostname else "its URL has a user name or password")
    try:
        host = parts.hostname.encode("idna").decode()
    except UnicodeError:
        raise QvlError(f"the host {excerpt(parts.hostname)!r} cannot exist") from None
    secure = parts.scheme == "https"
    path = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe="/%?&=:;,+@!$'()*~[]")
    return _Target(secure, host, parts.port or _PORTS[secure], path)


def _get(target: _Target, deadline: _Deadline, allowed: Callable[[str], bool]) -> http.client.HTTPResponse:
    """Ask a server; the connection ends with the reply."""
    channel = _connect(target, deadline, allowed)
    try:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.default_port = _PORTS[target.secure]  # left out of the header Host, which servers may verify
        connection.sock = _TimedSocket(channel, deadline)
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "qvl", "Connection": "close"}
        connection.request("GET", target.path, headers=headers)
        return connection.getresponse()
    except BaseException:
        channel.close()
        raise


def _connect(target: _Target, deadline: _Deadline, allowed: Callable[[str], bool]) -> socket.socket:
    addresses = _resolve(target.host, target.port, deadline)
    for address in addresses:
        if not allowed(address):
            raise QvlError(f"{target.host} has the address {address}, which is not public")
    failure: OSError = OSError("it has no address")
    for address in addresses:
        try:
            channel = socket.create_connection((address, target.port), timeout=deadline.left())
        except OSError as error:
            failure = error
            continue
        if not target.secure:
            return channel
        try:
            return ssl.create_default_context().wrap_socket(channel, server_hostname=target.host)
        except BaseException:
            channel.close()
            raise
    raise failure


def _resolve(host: str, port: int, deadline: _Deadline) -> list[str]:
    """Resolve a host. The system's resolver has no timeout, so it runs in a thread."""
    found: list = []

    def look_up() -> None:
        try:
            found.append([entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(deadline.left())
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise found[0]
    return list(dict.fromkeys(found[0]))


class _TimedSocket:
    """The part of the socket interface that `http.client` uses; every wait ends at the deadline."""

    def __init__(self, channel: socket.socket, deadline: _Deadline):
        self._channel, self._deadline = channel, deadline

    def sendall(self, data: bytes) -> None:
        self._channel.settimeout(self._deadline.left())
        self._channel.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._channel, self._deadline))

    def close(self) -> None:
        """Do nothing: the reader of the reply closes the connection."""


class _TimedReader(io.RawIOBase):
    def __init__(self, channel: socket.socket, deadline: _Deadline):
        self._channel, self._deadline = channel, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._channel.settimeout(self._deadline.left())
        return self._channel.recv_into(buffer)

    def close(self) -> None:
        self._channel.close()
        super().close()


def _content(reply: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if reply.status != 200:
        raise QvlError(f"the server answers {reply.status} {excerpt(reply.reason)}")
    if (reply.length or 0) <= max_bytes:
        content = reply.read(max_bytes + 1)
        if reply.length:
            raise QvlError(f"the connection closed {reply.length} bytes before the end")
        if len(content) <= max_bytes:
            return content
    raise QvlError(f"it is larger than {max_bytes:,} bytes")
