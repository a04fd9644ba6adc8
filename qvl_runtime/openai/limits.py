"""Resource limits of a request, and of all requests together."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server. Those of a single request also apply to the lines of a job.

    Attributes
    ----------
    running : int
        Concurrently computed requests.
    waiting : int
        Requests that wait, or whose answer is still being read. Beyond this limit: status 429.
    seconds : float
        For a whole request, including waiting.
    prepare_seconds : float
        For reading the pictures of a request, tokenizing it and compiling its schema.
    body_seconds : float
        For receiving a request.
    body_bytes, held_bytes : int
        Bytes of one request, and of all requests in memory. A request takes up to three times its bytes of memory.
    values : int
        JSON values of a request.
    text : int
        Characters of all texts of a request, and again of its tools as JSON.
    pictures, frames : int
        Pictures of a request, and frames of its videos.
    picture_bytes : int
        Bytes of a fetched picture.
    fetch_seconds : float
        For fetching all pictures of a request.
    pixels, all_pixels : int
        Pixels of a picture, and of all pictures and frames of a request.
    preparing : int
        Requests whose pictures are decoded concurrently.
    n : int
        Answers to one request.
    stops, stop_text : int
        Stop strings, and the characters of one.
    top_logprobs : int
        Alternatives of a token.
    tools : int
        Functions of a request.
    schema_bytes : int
        Bytes of a JSON schema, or of those of all functions whose calls are held to them.
    ping_seconds : float
        Interval of keep-alive comments in an idle stream.
    stop_seconds : float
        Time for running answers when the server stops.
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
    pictures: int = 64
    frames: int = 128
    picture_bytes: int = 20 << 20
    fetch_seconds: float = 30.0
    pixels: int = 16_000_000
    all_pixels: int = 256_000_000
    preparing: int = 2
    n: int = 8
    stops: int = 16
    stop_text: int = 256
    top_logprobs: int = 20
    tools: int = 128
    schema_bytes: int = 64 << 10
    ping_seconds: float = 5.0
    stop_seconds: float = 60.0
