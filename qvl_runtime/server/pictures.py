"""Pictures of a request: ``data:`` URIs, or what is fetched where that is allowed. No path is ever opened."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import NamedTuple

from PIL import Image

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.fetch import fetch
from qvl_runtime.inputs.images import FORMATS, ORIENTATION, is_url
from qvl_runtime.server.errors import ApiError, refused
from qvl_runtime.server.limits import Limits

_HEAD = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[\w.+-]*)*;base64,", re.IGNORECASE)
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


class Sent(NamedTuple):
    """A picture as the client sent it: the bytes of an image file, and its size as it is shown."""

    content: bytes
    width: int
    height: int


def checked_url(url: str, name: str, allow_urls: bool) -> str | bytes:
    """The bytes in a ``data:`` URI, or an http(s) URL that may be fetched."""
    if head := _HEAD.match(url):
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (ValueError, binascii.Error):
            raise refused(f"{name}: the base64 of the picture is broken", name) from None
    if is_url(url):
        if not allow_urls:
            raise refused(f"{name}: this server fetches no pictures; send a data: URI", name)
        return url
    raise refused(f"{name}: a picture must be a URI like data:image/png;base64,...", name)


def fetched(source: str | bytes, number: int, limits: Limits) -> bytes:
    """The bytes of a picture; `source` is as `checked_url` gave it, `number` what errors call it."""
    if isinstance(source, bytes):
        return source
    try:
        return fetch(source, max_bytes=limits.picture_bytes)
    except QvlError:
        # What exactly went wrong would tell a stranger about this machine's network.
        raise refused(f"picture {number} cannot be fetched; send a data: URI") from None


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
