"""What one request, and all of them together, may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes
    ----------
    running : int
        Requests that are computed at once.
    waiting : int
        Requests that wait for their turn, in order, or whose answer is still being read. Beyond: status 429.
    seconds : float
        For a request as a whole, waiting included.
    prepare_seconds : float
        For reading the pictures of a request, tokenizing it and compiling its schema.
    body_seconds : float
        For receiving a request.
    body_bytes, held_bytes : int
        Of one request, and of all that are held at once. A request takes up to three times its bytes of memory.
    values : int
        Of the JSON of a request.
    text : int
        Characters of all texts of a request.
    pictures : int
        Of a request.
    picture_bytes : int
        Of a picture that is fetched.
    fetch_seconds : float
        For all pictures of a request that are fetched.
    pixels : int
        Of a picture.
    preparing : int
        Requests whose pictures are decoded at once.
    n : int
        Answers to one request.
    stops, stop_text : int
        Stop strings, and the characters of one.
    top_logprobs : int
        Alternatives of a token.
    schema_bytes : int
        Of a JSON schema.
    ping_seconds : float
        A stream that has nothing to say for so long says that it is alive.
    stop_seconds : float
        Running answers may take so long when the server is stopped.
    """

    running: int = 16
    waiting: int = 64
    seconds: float = 600.0
    prepare_seconds: float = 60.0
    body_seconds: float = 60.0
    body_bytes: int = 32 << 20
    held_bytes: int = 256 << 20
    values: int = 100_000
    text: int = 1 << 20
    pictures: int = 16
    picture_bytes: int = 20 << 20
    fetch_seconds: float = 30.0
    pixels: int = 16_000_000
    preparing: int = 2
    n: int = 8
    stops: int = 16
    stop_text: int = 256
    top_logprobs: int = 20
    schema_bytes: int = 64 << 10
    ping_seconds: float = 5.0
    stop_seconds: float = 60.0
