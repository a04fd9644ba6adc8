"""Pictures of a request: ``data:`` URIs, or what is fetched where that is allowed. No path is ever opened."""

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
from qvl_runtime.server.errors import ApiError, refused
from qvl_runtime.server.limits import Limits

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Formats that browsers send; decoders of others have had more holes."""

SCANS = 100
"""Scans of a JPEG: progressive ones have ten, and each passes over all pixels though it may be a hundred bytes long."""

HEAD_LENGTH = 200
_HEAD = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


class Sent(NamedTuple):
    """A picture as the client sent it: the bytes of an image file, and its size as it is shown."""

    content: bytes
    width: int
    height: int


def checked_url(url: str, name: str, allow_urls: bool) -> str | bytes:
    """The bytes in a ``data:`` URI, or an http(s) URL that may be fetched."""
    # Only the beginning is looked at: a pattern could try for ever on megabytes.
    if head := _HEAD.match(url[:HEAD_LENGTH]):
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (ValueError, binascii.Error):
            raise refused(f"{name}: the base64 of the picture is broken", name) from None
    if is_url(url):
        if not allow_urls:
            raise refused(f"{name}: this server fetches no pictures; send a data: URI", name)
        return url
    raise refused(f"{name}: a picture must be a URI like data:image/png;base64,...", name)


def fetched(sources: Sequence[str | bytes], limits: Limits, check: Callable[[], None] = lambda: None) -> list[bytes]:
    """The bytes of the pictures of a request.

    Parameters
    ----------
    sources : sequence of bytes or str
        As `checked_url` gave them.
    limits : Limits
    check : callable, optional
        Called before each; it may raise.
    """
    contents, end = [], time.monotonic() + limits.fetch_seconds
    for number, source in enumerate(sources):
        check()
        try:
            if isinstance(source, str):
                left = end - time.monotonic()
                source = fetch(source, max_bytes=limits.picture_bytes, max_seconds=left)
        except QvlError:
            # What exactly went wrong would tell a stranger about this machine's network.
            raise refused(f"picture {number} cannot be fetched; send a data: URI") from None
        contents.append(source)
    return contents


def measured(content: bytes, number: int, limits: Limits, *, upright: bool) -> Sent:
    """Look at the size of a picture before anything is decoded.

    Parameters
    ----------
    content : bytes
    number : int
        Of the picture in the request, from 0 on: what errors call it.
    limits : Limits
    upright : bool
        Whether the model turns pictures as their EXIF orientation says.
    """
    label = f"picture {number}"
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > SCANS:
        raise refused(f"{label} is a JPEG of more than {SCANS} scans: save it again")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.pixels:
                raise refused(f"{label} has {width} x {height} pixels, more than {limits.pixels}: shrink it first")
            # Looking for the orientation decodes a PNG, so the size comes first.
            turned = upright and image.getexif().get(ORIENTATION) in _SIDEWAYS
    except ApiError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refused(f"{label} has more than {limits.pixels} pixels: shrink it first") from None
    except Exception:  # Pillow raises many kinds on damaged files
        raise refused(f"{label} is no image in a known format ({', '.join(FORMATS)})") from None
    return Sent(content, height, width) if turned else Sent(content, width, height)
