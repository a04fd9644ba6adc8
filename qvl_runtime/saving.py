"""Checking the path of a picture, and saving it."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from qvl_kernels.atomic import replacing
from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import as_path, shown


def check_path(path: str | os.PathLike) -> str:
    """Refuse a path that cannot be written as a picture, before hours of work; return its image format.

    Raises
    ------
    QvlError
        For an unknown extension, or a folder that is missing or not writable.
    """
    path = as_path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise QvlError(f"{shown(path)}: cannot be written (no image format has this ending); name a .png file")
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK) or os.path.isdir(path):
        raise QvlError(f"{shown(path)}: cannot be written; name a .png file in a folder that exists and is yours")
    return str(kind)


def save(image: Image.Image, path: str | Path) -> None:
    """Write a picture atomically; the extension selects the format.

    Raises
    ------
    QvlError
        If the file cannot be written.
    """
    kind, data = check_path(path), io.BytesIO()
    try:
        image.save(data, kind)
        with replacing(path, private=False) as file:
            file.write(data.getbuffer())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QvlError(f"{shown(path)}: cannot be written ({reason}); name a .png file elsewhere") from None
