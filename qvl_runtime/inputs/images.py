"""Reading pictures from any supported source as RGB images."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeGuard
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from qvl_runtime.errors import QvlError, excerpt
from qvl_runtime.file.opening import read_regular, shown

ImageSource = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray

# A decoded picture of this size takes 270 MB. Pillow's limit for decompression bombs is the same.
MAX_PIXELS = 89_478_485
# OpenJPEG allocates 24 bytes a pixel, even for a file of 1.5 KB. Pillow has two decoders in Python, which take seconds
# for this many pixels, even of a file of 1 KB.
MAX_SLOW_PIXELS = 16 << 20
PYTHON_DECODERS = ("bmp_rle", "ppm_plain")
# Progressive files have ten. A scan of 14 bytes can cost a full pass over the picture; libtiff has the same limit.
MAX_SCANS = 100
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
"""A marker of a JPEG, but those that have no length and may stand within a scan."""
# The size of a bitmap of `MAX_PIXELS`.
MAX_FILE_BYTES = 257 << 20
# Formats that Pillow decodes by itself. For EPS it would run Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    *(".bmp", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".tif"),
    *(".tiff", ".webp"),
)
"""Endings of the names of pictures in these formats."""
UNREAD_SUFFIXES = (".avif", ".heic", ".heif", ".jxl")
"""Endings of pictures in other formats, as cameras and web sites give them: to be refused, not left out."""
PICTURE_SUFFIXES = frozenset((*SUFFIXES, *UNREAD_SUFFIXES))
"""Endings of all pictures of a folder or an archive."""
ORIENTATION = 0x0112
"""The EXIF tag of the orientation."""
UPRIGHT: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: ImageSource, *, allow_urls: bool = False, allow_paths: bool = True, exif: bool = False
) -> Image.Image:
    """Read a picture and convert it to RGB; alpha is dropped.

    Parameters
    ----------
    source : str, pathlib.Path, bytes, file, PIL.Image.Image or numpy.ndarray
        A path, a ``file://`` URI, a base64 ``data:`` URL, an http(s) URL, the bytes of an image file, a binary file
        object, a PIL image, or an array ``[H, W]`` or ``[H, W, 1]`` (grey), ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (alpha
        is dropped): uint8, or floating point from 0 to 1.
    allow_urls : bool
        Allow http(s) URLs.
    allow_paths : bool
        Allow paths and ``file://`` URIs.
    exif : bool
        Apply the EXIF orientation. Qwen-VL was trained without it.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, first frame only. 16-bit grey values are scaled to 8 bits.

    Raises
    ------
    QvlError
        No such file, not an image, more than `MAX_PIXELS` pixels or `MAX_SCANS` scans, an array of another dtype,
        shape or range, or a source that is not allowed.
    """
    content = read_image(source, allow_urls=allow_urls, allow_paths=allow_paths)
    return decode_image(content, image_label(source), exif=exif)


def read_image(
    source: ImageSource, *, allow_urls: bool = False, allow_paths: bool = True
) -> bytes | Image.Image | np.ndarray:
    """Read or fetch the bytes of a picture. A PIL image or an array is returned as it is.

    Raises
    ------
    QvlError
        As for `load_image`, except for errors of decoding.
    """
    if isinstance(source, Image.Image | np.ndarray):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _read_data_url(source)
    if is_url(source):
        if not allow_urls:
            refuse_url(source)
        from qvl_runtime.inputs.fetch import fetch  # imports ssl and http, which most runs do not need

        return fetch(source)
    if isinstance(source, str | os.PathLike):
        if not allow_paths:
            raise QvlError(
                f"image {str(source)[:100]!r}: no file is opened here; pass the picture's bytes or a data: URL"
            )
        return _read_file(source)
    if hasattr(source, "read"):
        return _read_stream(source)
    raise QvlError(
        "an image must be a path, a URL, bytes, a file opened for reading, a PIL image or an array, "
        f"not {type(source).__name__}"
    )


def decode_image(content: bytes | Image.Image | np.ndarray, label: str, *, exif: bool = False) -> Image.Image:
    """Decode the result of `read_image` to RGB. `label` names the picture in errors. See `load_image`."""
    if isinstance(content, np.ndarray):
        return _from_array(content)
    if isinstance(content, Image.Image):
        return _to_rgb(lambda: content, label, exif)
    if not content:
        raise QvlError(f"{label} is empty (0 bytes): get the file again")
    if content.startswith(b"\xff\xd8") and _scans(content) > MAX_SCANS:
        raise QvlError(f"{label} is a JPEG of more than {MAX_SCANS} scans: save it again")
    return _to_rgb(lambda: Image.open(io.BytesIO(content), formats=FORMATS), label, exif)


def image_label(source: ImageSource) -> str:
    """Return the name of a source for errors."""
    if isinstance(source, Image.Image):
        return "the PIL image"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "the data: URL"
    if is_url(source):
        return f"the picture at {shown(source)}"
    return f"image {shown(source)!r}" if isinstance(source, str | os.PathLike) else "the image data"


def is_url(source: object) -> TypeGuard[str]:
    """Whether a source is an http(s) URL."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def refuse_url(url: str) -> NoReturn:
    raise QvlError(
        f"no URL is fetched unless you allow it (--allow-urls, or allow_urls=True): download {shown(url)} and pass the "
        "file's path or bytes"
    )


def local_path(source: str | os.PathLike) -> str | os.PathLike:
    """Return the path that a ``file://`` URI names, or a path as it is.

    Raises
    ------
    QvlError
        For a URI of another machine, or a malformed one.
    """
    return _path_of_uri(source) if isinstance(source, str) and source[:7].lower() == "file://" else source


def _read_file(path: str | os.PathLike) -> bytes:
    try:
        return read_regular(local_path(path), limit=MAX_FILE_BYTES)
    except QvlError as error:
        raise QvlError(f"cannot read image {error}") from None


def _path_of_uri(uri: str) -> str:
    from urllib.request import url2pathname  # imports http and email

    try:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise ValueError("it names another machine")
        return url2pathname(parts.path)
    except ValueError as error:
        raise QvlError(f"{shown(uri)}: is no file URI ({error}); expected file:///path") from None


def _read_stream(stream: BinaryIO) -> bytes:
    """Read all of an open file object, from its beginning if it is seekable."""
    try:
        if stream.seekable():
            stream.seek(0)
        content = stream.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # `read` may raise anything
        raise QvlError(f"the image file cannot be read: {excerpt(error) or type(error).__name__}") from None
    if not isinstance(content, bytes):
        raise QvlError(f"the image file gives {type(content).__name__}, not bytes: open it with mode 'rb'")
    if len(content) > MAX_FILE_BYTES:
        raise QvlError(
            f"the image file is larger than {MAX_FILE_BYTES >> 20} MiB: it is not a picture, or shrink it first"
        )
    return content


def _read_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise QvlError(f"cannot read the image {url[:40]!r}: expected data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise QvlError(f"cannot read the image {url[:40]!r}: its base64 is broken ({error})") from None


def _to_rgb(open_image: Callable[[], Image.Image], label: str, exif: bool) -> Image.Image:
    # Pillow's warnings are left to the application: `catch_warnings` is not thread-safe.
    try:
        image = open_image()
        slow = image.format == "JPEG2000" or any(tile[0] in PYTHON_DECODERS for tile in getattr(image, "tile", ()))
        _check_size(*image.size, label, MAX_SLOW_PIXELS if slow else MAX_PIXELS)
        transparent = image.mode == "P" and "transparency" in image.info  # `convert` warns of what RGB cannot hold
        rgb = (image.convert("RGBA") if transparent else _scaled(image, label)).convert("RGB")
        turn = UPRIGHT.get(_orientation(image)) if exif else None
        return rgb if turn is None else rgb.transpose(turn)
    except QvlError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise QvlError(f"{label} has more than {MAX_PIXELS} pixels: shrink it first") from None
    except Image.UnidentifiedImageError:
        raise QvlError(
            f"{label} is no image in a known format ({', '.join(FORMATS)}): save it as PNG or JPEG"
        ) from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise QvlError(f"{label} is broken ({excerpt(error) or type(error).__name__}): get the file again") from None


def _scans(content: bytes) -> int:
    """Count the scans of a JPEG as its decoder finds them, at most one more than `MAX_SCANS`.

    Other bytes than a scan's may look like its marker: those of a thumbnail, or of a video that follows the picture.
    """
    scans, at = 0, 2
    while scans <= MAX_SCANS and (marker := MARKER.search(content, at)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return scans


def _scaled(image: Image.Image, label: str) -> Image.Image:
    """Scale grey values of more than 8 bits to 8. Pillow's own conversion clips at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        return _grey(values * np.float32(255), label) if not (values > 1).any() else _grey(values, label)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise QvlError(f"{label} has 32-bit grey values: save it with 8 or 16 bits")
    return _grey(values.astype(np.float32) / np.float32(257), label)


def _grey(values: np.ndarray, label: str) -> Image.Image:
    if not np.isfinite(values).all():
        raise QvlError(f"{label} holds a value that is not finite: save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data: the picture itself is valid
        return None


def _check_size(width: int, height: int, label: str, limit: int = MAX_PIXELS) -> None:
    if width * height > limit:
        raise QvlError(f"{label} has {width} x {height} pixels, more than {limit}: shrink it first")
    if width * height == 0:
        raise QvlError(f"{label} has no pixels ({width} x {height})")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise QvlError(f"an image array must be uint8 (0 to 255) or floating point (0 to 1), not {array.dtype}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise QvlError(
            f"an image array must have the shape [height, width] or [height, width, 1, 3 or 4], not {list(array.shape)}"
        )
    _check_size(array.shape[1], array.shape[0], "the image array")
    colours = array[:, :, :3] if array.ndim == 3 else array[:, :, None]
    if array.dtype != np.uint8:
        if not ((colours >= 0) & (colours <= 1)).all():
            raise QvlError("a floating-point image array must have values from 0 to 1; for 0 to 255 make it uint8")
        colours = np.rint(colours * np.float32(255)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(colours, (*array.shape[:2], 3))))
