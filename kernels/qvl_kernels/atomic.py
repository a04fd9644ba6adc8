"""Atomic replacement of a file: a reader sees the old content or the new content, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"
"""Suffix of a file that is being written."""

STALE_SECONDS = 3600
"""Age at which the temporary file of a process that was killed is removed."""

_TEMPORARY = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(SUFFIX)}", re.DOTALL)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, private: bool = True, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; rename it to `path` when the block ends without an error, else remove it.

    Parameters
    ----------
    path : path
    private : bool
        Mode 0600; otherwise the umask decides.
    durable : bool
        Flush the file and its folder entry to disk, so that the file survives a power failure.

    Raises
    ------
    OSError
        If the file cannot be written; also if `path` is none of a file, like "." or a name with a NUL character.
    """
    path = Path(path)
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if "\0" in str(path):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}{SUFFIX}")
    handle = os.open(
        partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600 if private else 0o666
    )
    try:
        with open(handle, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove those files that `replacing` left long ago in a process that was killed. Others may do so, too."""
    for path in paths:
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush a folder entry to disk, on systems that can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
