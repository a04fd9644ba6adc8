"""Checking the path of an output, and saving a picture."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from qvl_kernels.atomic import replacing
from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import as_path, shown
from qvl_runtime.file.writing import unwritable
from qvl_runtime.inputs.images import local_path


def check_path(path: str | os.PathLike) -> str:
    """Refuse a path that cannot be written as a picture, before hours of work; return its image format.

    Raises
    ------
    QvlError
        For an unknown extension, a folder that is missing or not writable, or what is no regular file.
    """
    path = as_path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise QvlError(f"{shown(path)}: cannot be written (no image format has this ending); name a .png file")
    try:
        usable = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        usable = isinstance(error, FileNotFoundError)
    if not usable or not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise QvlError(f"{shown(path)}: cannot be written; name a .png file in a folder that exists and is yours")
    return str(kind)


def check_no_input(out: Path, inputs: Iterable[object]) -> None:
    """Refuse to write a file over one that is read.

    Parameters
    ----------
    out : Path
    inputs : iterable
        Paths, and sources of pictures. Those that are no files are skipped.

    Raises
    ------
    QvlError
        If `out` is one of them, also through a link.
    """
    for source in inputs:
        # Not a file, or one that does not exist.
        with contextlib.suppress(OSError, ValueError, QvlError):
            if isinstance(source, str | Path) and os.path.samefile(out, local_path(source)):
                break
    else:
        return
    raise QvlError(f"{out}: is read here and would be overwritten; name another file")


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
        raise unwritable(path, error, "name a .png file elsewhere") from None
