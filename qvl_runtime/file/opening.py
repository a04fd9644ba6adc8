"""Opening untrusted files: regular files only, of limited size, opened once."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qvl_runtime.errors import QvlError

# A pipe without a writer would block in open(); a terminal could become the controlling terminal.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
# A clone without Git-LFS has this in place of each large file.
LFS_POINTER, LFS_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
PIECE = 1 << 20
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike, *, limit: int | None = None, remedy: str = "check the path") -> BinaryIO:
    """Open a regular file for reading. The checks apply to the opened descriptor.

    Parameters
    ----------
    path : path
        Symbolic links are followed.
    limit : int, optional
        Largest size in bytes.
    remedy : str
        Ends the error message.

    Raises
    ------
    QvlError
        No such file, no permission, not a regular file, larger than `limit`, or a Git-LFS pointer.
    """
    name = as_path(path)
    try:
        descriptor = os.open(name, FLAGS)
    except FileNotFoundError:
        raise QvlError(f"{shown(path)}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name, or an invalid name
        raise QvlError(f"{shown(path)}: cannot be read ({reason_of(error)}); {remedy}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
            raise QvlError(f"{shown(path)}: cannot be read (it is {kind}, not a regular file); {remedy}")
        if limit is not None and status.st_size > limit:
            raise _too_large(path, limit, remedy)
        if status.st_size <= LFS_POINTER_BYTES:
            if os.read(descriptor, len(LFS_POINTER)) == LFS_POINTER:
                raise QvlError(f"{shown(path)}: is a Git-LFS pointer, not the file; fetch that with `git lfs pull`")
            os.lseek(descriptor, 0, os.SEEK_SET)
        return open(descriptor, "rb")
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):  # such as /proc/self/mem, or a bad disk
            raise QvlError(f"{shown(path)}: cannot be read ({reason_of(error)}); {remedy}") from None
        raise


def read_regular(path: str | os.PathLike, *, limit: int, remedy: str = "check the path") -> bytes:
    """Read a regular file of at most `limit` bytes; see `open_regular`.

    Raises
    ------
    QvlError
        As for `open_regular`, and if the file cannot be read or grows beyond `limit`.
    """
    with open_regular(path, limit=limit, remedy=remedy) as file:
        try:
            # By pieces: files in /proc report no size, a file may grow, and read() allocates all it is asked for.
            content = bytearray()
            while len(content) <= limit and (piece := file.read(min(PIECE, limit + 1 - len(content)))):
                content += piece
        except OSError as error:
            raise QvlError(f"{shown(path)}: cannot be read ({reason_of(error)}); {remedy}") from None
    if len(content) > limit:
        raise _too_large(path, limit, remedy)
    return bytes(content)


def as_path(value: str | os.PathLike) -> Path:
    """Convert an argument to a path.

    Raises
    ------
    QvlError
        If it is not a path.
    """
    try:
        path = Path(value)
    except TypeError:
        raise QvlError(f"expected a path, not {type(value).__name__}") from None
    if "\0" in str(path):
        raise QvlError(f"{shown(path)}: a path has no NUL character; leave it out")
    return path


def below(folder: Path, name: str | os.PathLike) -> Path | None:
    """Resolve `name` against `folder`, following links; None if the result lies outside `folder`, or cannot exist."""
    try:
        path = Path(folder, name).resolve()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a link to itself, which Python 3.13 leaves as it is
        return None
    looped = any(map(os.path.islink, (path, *path.parents)))
    return path if path.is_relative_to(folder.resolve()) and not looped else None


def shown(path: str | os.PathLike) -> str:
    """Format a path for a one-line error: shortened if very long, escaped if it has control characters."""
    text = os.fsdecode(path)
    text = text if len(text) <= 1024 else f"{text[:500]}…{text[-20:]}"
    return text if text.isprintable() else ascii(text)


def reason_of(error: Exception) -> str:
    """Return why an operation on a file failed, without the file's name."""
    return getattr(error, "strerror", None) or str(error)


def _too_large(path: str | os.PathLike, limit: int, remedy: str) -> QvlError:
    size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
    return QvlError(f"{shown(path)}: is larger than the {size} such a file may have; {remedy}")
