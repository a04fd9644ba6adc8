"""Writing files so that a reader sees the old one or the new one, and never half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"
"""Ends the name of a file that is being written."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, private: bool = True, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write to; it takes the name `path` when the block ends without error.

    Parameters
    ----------
    path : path
    private : bool
        Only this user may read it; else the umask rules.
    durable : bool
        It is on the disk when the block has ended, and stays there if the machine fails.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
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


def _sync_folder(folder: Path) -> None:
    """Let the name of a new file reach the disk, where a system lets folders be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
