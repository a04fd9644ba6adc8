"""Listening for connections with uvicorn: graceful shutdown, and timeouts of stuck connections."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from qvl_runtime.errors import QvlError
from qvl_runtime.server.service import Service

if sys.platform != "win32":
    import resource

CONNECTIONS = 4096
"""Largest number of open connections; beyond it uvicorn responds with 503."""

HEAD_SECONDS = 20.0
"""Timeout of a connection that is idle or in the middle of a request's head."""

WRITE_SECONDS = 60.0
"""Timeout of a client that reads nothing."""

SLOW_SECONDS = 900.0
"""Timeout of a client that reads too slowly."""


class Connection(H11Protocol):
    """A connection that detects that its client is stuck."""

    _idle_since: float | None = None
    _last_cycle: RequestResponseCycle | None = None
    _unread: tuple[int, float] | None = None
    _behind_since: float | None = None

    def is_stuck(self, now: float) -> bool:
        """Whether the client sends no request, or does not read the response."""
        unread = self.transport.get_write_buffer_size()
        if unread == 0:
            self._unread = self._behind_since = None
        elif self._unread is None or unread != self._unread[0]:
            self._unread = (unread, now)
            self._behind_since = now if self._behind_since is None else self._behind_since
        served = self.cycle is not None and not self.cycle.response_complete
        if served or unread:
            self._idle_since = None
        elif self._idle_since is None or self.cycle is not self._last_cycle:  # another request came and went meanwhile
            self._idle_since = now
        self._last_cycle = self.cycle
        silent = self._idle_since is not None and now - self._idle_since > HEAD_SECONDS
        slow = self._behind_since is not None and now - self._behind_since > SLOW_SECONDS
        return silent or slow or (self._unread is not None and now - self._unread[1] > WRITE_SECONDS)


class Listener(uvicorn.Server):
    """Runs an application until a signal. Then running answers finish, and new requests get 503.

    Parameters
    ----------
    app : Starlette
        The result of `create_app`.
    listening : callable
        Called when the server accepts requests.
    """

    def __init__(self, app: Starlette, listening: Callable[[], None] = lambda: None):
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                loop="asyncio",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=int(HEAD_SECONDS),
                timeout_graceful_shutdown=5,
            )
        )
        self._service: Service = app.state.service
        self._listening = listening
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Task | None = None
        self._signals = 0
        self._answered = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._listening()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection) and connection.is_stuck(now):
                    connection.transport.abort()
            admission = self._service.admission
            if admission.inside == 0 and admission.entered != self._answered:
                self._answered = admission.entered
                return_freed_memory()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop gracefully at the first signal, end running answers at the second, and leave at the third."""
        self._signals += 1
        if self._loop is None or self._signals > 2:
            self.should_exit = self.force_exit = True
        elif self._signals == 2:
            self._service.hurried = True
        else:
            self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Begin a graceful stop; call on the event loop."""
        if self._end is None:
            self._end = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        with contextlib.suppress(Exception):
            await self._service.stop()
        self.should_exit = True


MMAP_THRESHOLD = -3
"""The number of this parameter of glibc's `mallopt`."""
LARGE_BYTES = 1 << 20
"""Least size of an allocation that returns to the system when it is freed."""


def map_large_memory() -> None:
    """Let the C library return large allocations when they are freed, as it does until the first one is freed.

    From then on it would keep up to 32 MB each in a pool a thread: requests with 16 pictures left gigabytes there.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BYTES)


def return_freed_memory() -> None:
    """Let the C library return what it keeps to the system: after large pictures that is hundreds of megabytes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # there is no such function, or no library to ask
        ctypes.CDLL(None).malloc_trim(0)


def bind(host: str, port: int) -> socket.socket:
    """Bind a listening socket; port 0 takes a free port.

    Raises
    ------
    QvlError
        If the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise QvlError(f"{host}:{port}: cannot listen there ({reason}); choose another --host or --port") from None
    bound.setblocking(False)
    # Connections inherit it. Otherwise a piece waits until the client acknowledges the one before, after 40 ms; asyncio
    # only does it where the protocol was named when the socket was made.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def allow_connections() -> None:
    """Raise this process's limit of open files, of which each connection is one. The default is 1024."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS if most == resource.RLIM_INFINITY else min(most, 2 * CONNECTIONS)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def serve(app: Starlette, bound: socket.socket, listening: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM."""
    if sys.platform != "win32":
        allow_connections()
    map_large_memory()
    listener = Listener(app, listening)
    with contextlib.suppress(KeyboardInterrupt):
        listener.run([bound])
