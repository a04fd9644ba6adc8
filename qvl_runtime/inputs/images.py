"""Pictures: from whatever the caller has to the patches the vision tower multiplies."""

from __future__ import annotations

import base64
import binascii
import io
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image

from qvl_runtime.errors import QvlError

ImageSource = str | Path | bytes | Image.Image | np.ndarray

# A decoded picture of this many pixels takes 270 MB; Pillow too suspects an attack from here on.
MAX_PIXELS = 89_478_485
MAX_FETCH_BYTES = 64 << 20
# Only formats that Pillow decodes by itself: for EPS it would start Ghostscript on the file.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def load_image(source: ImageSource, *, allow_urls: bool = False) -> Image.Image:
    """Read a picture and convert it to RGB, as the model was trained: alpha dropped, EXIF rotation ignored.

    Parameters
    ----------
    source : str, pathlib.Path, bytes, PIL.Image.Image or numpy.ndarray
        A path, a base64 ``data:`` URL, the bytes of an image file, a PIL image, or a uint8 array [H, W, 3] (RGB)
        or [H, W, 4] (alpha is dropped).
    allow_urls : bool
        Whether an http(s) URL may be fetched.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, first frame only.

    Raises
    ------
    QvlError
        Nothing there, no image in it, more than `MAX_PIXELS` pixels, an array of another dtype or shape, or a
        URL that is not allowed.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(lambda: source, "the PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_stream(io.BytesIO(source), "the image bytes")
    if isinstance(source, str) and source.startswith("data:"):
        return _from_stream(io.BytesIO(_read_data_url(source)), "the data: URL")
    if is_url(source):
        return _from_stream(io.BytesIO(_fetch(source, allow_urls)), source)
    if isinstance(source, str | Path):
        return _from_file(source)
    raise QvlError(
        f"an image must be a path, bytes, a PIL image or a uint8 array [H, W, 3], not {type(source).__name__}"
    )


def is_url(source: ImageSource) -> bool:
    """Whether a picture would have to be fetched from a network."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def refuse_url(url: str) -> NoReturn:
    raise QvlError(f"no URL is fetched unless you allow it: download {url} and pass the file's path or bytes")


def _from_file(path: str | Path) -> Image.Image:
    try:
        # Opened, not read: someone will pass a model file by mistake.
        with open(path, "rb") as file:
            return _from_stream(file, f"image {str(path)!r}")
    except QvlError:
        raise
    except (OSError, ValueError) as error:
        raise QvlError(f"cannot read image {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None


def _read_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise QvlError(f"cannot read the image {url[:40]!r}: expected data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise QvlError(f"cannot read the image {url[:40]!r}: its base64 is broken ({error})") from None


def _fetch(url: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        refuse_url(url)
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            data = reply.read(MAX_FETCH_BYTES + 1)
    except (OSError, ValueError) as error:
        raise QvlError(f"cannot fetch {url}: {error}") from None
    if len(data) > MAX_FETCH_BYTES:
        raise QvlError(f"{url} is larger than {MAX_FETCH_BYTES >> 20} MiB: download and shrink it first")
    return data


def _from_stream(stream: BinaryIO, name: str) -> Image.Image:
    if not stream.seek(0, io.SEEK_END):
        raise QvlError(f"{name} is empty (0 bytes)")
    stream.seek(0)
    return _to_rgb(lambda: Image.open(stream, formats=FORMATS), name)


def _to_rgb(open_image: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = open_image()
            _check_size(*image.size, name)
            return image.convert("RGB")
    except QvlError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise QvlError(f"{name} has more than {MAX_PIXELS} pixels: shrink it first") from None
    except Image.UnidentifiedImageError:
        raise QvlError(f"{name} is no image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise QvlError(f"{name} is broken: {_one_line(error)}") from None


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise QvlError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}: shrink it first")
    if width * height == 0:
        raise QvlError(f"{name} has no pixels ({width} x {height})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise QvlError(f"an image array must be uint8 with values 0..255, not {array.dtype}")
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise QvlError(f"an image array must have the shape [height, width, 3], not {list(array.shape)}")
    _check_size(array.shape[1], array.shape[0], "the image array")
    return Image.fromarray(np.ascontiguousarray(array[:, :, :3]))
