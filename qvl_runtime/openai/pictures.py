"""Pictures of a request: ``data:`` URIs, or http(s) URLs if allowed. Paths are never opened."""

from __future__ import annotations

import base64
import binascii
import io
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.fetch import fetch
from qvl_runtime.inputs.images import ORIENTATION, is_url
from qvl_runtime.openai.errors import ApiError, refused
from qvl_runtime.openai.limits import Limits

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Formats that browsers send. Decoders of other formats have had more vulnerabilities."""

SIDE = 65_535
"""Largest width or height of a picture, which is JPEG's. Pillow shrinks longer ones in hundreds of megabytes."""

HEAD_LENGTH = 200
_HEAD = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


class Sent(NamedTuple):
    """A picture from the client: the bytes of an image file, and its displayed size."""

    content: bytes
    width: int
    height: int


def checked_url(url: str, name: str, allow_urls: bool) -> str | bytes:
    """Return the bytes of a ``data:`` URI, or an allowed http(s) URL."""
    # Match only the beginning: a pattern could take very long on megabytes.
    if head := _HEAD.match(url[:HEAD_LENGTH]):
        return decoded(url[head.end() :], name)
    if is_url(url):
        if not allow_urls:
            raise refused(f"{name}: this server fetches no pictures; send a data: URI", name)
        return url
    raise refused(f"{name}: a picture must be a URI like data:image/png;base64,...", name)


def decoded(data: str, name: str) -> bytes:
    """Return the bytes of a picture in base64."""
    try:
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        raise refused(f"{name}: the base64 of the picture is broken", name) from None


def fetched(sources: Sequence[str | bytes], limits: Limits, check: Callable[[], None] = lambda: None) -> list[bytes]:
    """Return the bytes of the pictures of a request.

    Parameters
    ----------
    sources : sequence of bytes or str
        Results of `checked_url`.
    limits : Limits
    check : callable, optional
        Called before each picture; it may raise.
    """
    contents, end = [], time.monotonic() + limits.fetch_seconds
    for number, source in enumerate(sources):
        check()
        try:
            if isinstance(source, str):
                left = end - time.monotonic()
                source = fetch(source, max_bytes=limits.picture_bytes, max_seconds=left)
        except QvlError:
            # The exact reason would reveal this machine's network to the client.
            raise refused(f"picture {number} cannot be fetched; send a data: URI") from None
        contents.append(source)
    return contents


def measured(content: bytes, number: int, limits: Limits, *, upright: bool) -> Sent:
    """Check the size of a picture before decoding.

    Parameters
    ----------
    content : bytes
    number : int
        Index of the picture in the request, from 0, for errors.
    limits : Limits
    upright : bool
        Whether the model applies the EXIF orientation.
    """
    label = f"picture {number}"
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) > SIDE:
                raise refused(f"{label} has {width} x {height} pixels, more than {SIDE} on a side: cut it")
            if width * height > limits.pixels:
                raise refused(f"{label} has {width} x {height} pixels, more than {limits.pixels}: shrink it first")
            # Reading the orientation decodes a PNG, so the size is checked first.
            turned = upright and image.getexif().get(ORIENTATION) in _SIDEWAYS
    except ApiError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refused(f"{label} has more than {limits.pixels} pixels: shrink it first") from None
    except Exception:  # Pillow raises many types on damaged files
        raise refused(f"{label} is no image in a known format ({', '.join(FORMATS)})") from None
    return Sent(content, height, width) if turned else Sent(content, width, height)
