"""Opening files nobody vouches for: regular ones only, of limited size, and each of them once."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qvl_runtime.errors import QvlError

# A pipe without a writer would block in open(), and a terminal could become this process's own.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
# What a clone without Git-LFS has in the place of each large file.
LFS_POINTER, LFS_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike, *, limit: int | None = None, remedy: str = "check the path") -> BinaryIO:
    """Open a regular file for reading; what is checked is the descriptor that is read.

    Parameters
    ----------
    path : path
        Symbolic links are followed.
    limit : int, optional
        Largest size in bytes.
    remedy : str
        Ends the error's line.

    Raises
    ------
    QvlError
        Nothing there, no permission, a folder, pipe, socket or device, a file above `limit`, or a Git-LFS pointer.
    """
    name = as_path(path)
    try:
        descriptor = os.open(name, FLAGS)
    except FileNotFoundError:
        raise QvlError(f"{shown(path)}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or a name that no file can have
        raise QvlError(f"{shown(path)}: cannot be read ({_reason(error)}); {remedy}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "something special")
            raise QvlError(f"{shown(path)}: cannot be read (it is {kind}, not a regular file); {remedy}")
        if limit is not None and status.st_size > limit:
            raise _too_large(path, limit, remedy)
        if status.st_size <= LFS_POINTER_BYTES:
            if os.read(descriptor, len(LFS_POINTER)) == LFS_POINTER:
                raise QvlError(f"{shown(path)}: is a Git-LFS pointer, not the file; fetch that with `git lfs pull`")
            os.lseek(descriptor, 0, os.SEEK_SET)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike, *, limit: int, remedy: str = "check the path") -> bytes:
    """The content of a regular file of at most `limit` bytes, as `open_regular` opens it.

    Raises
    ------
    QvlError
        As `open_regular`, and when the file cannot be read or grows beyond `limit` meanwhile.
    """
    with open_regular(path, limit=limit, remedy=remedy) as file:
        try:
            content = file.read(limit + 1)  # the files of /proc have no size, and others may grow
        except OSError as error:
            raise QvlError(f"{shown(path)}: cannot be read ({_reason(error)}); {remedy}") from None
    if len(content) > limit:
        raise _too_large(path, limit, remedy)
    return content


def as_path(value: str | os.PathLike) -> Path:
    """What a caller passed for a path, as one.

    Raises
    ------
    QvlError
        When it is no path.
    """
    try:
        return Path(value)
    except TypeError:
        raise QvlError(f"expected a path, not {type(value).__name__}") from None


def below(folder: Path, name: str | os.PathLike) -> Path | None:
    """Resolve `name` against `folder`, following links; None if the result lies outside `folder`."""
    path = Path(folder, name).resolve()
    return path if path.is_relative_to(folder.resolve()) else None


def shown(path: str | os.PathLike) -> str:
    """A path for an error's one line: whole, unless it is longer than any real one or has control characters."""
    text = os.fsdecode(path)
    text = text if len(text) <= 1024 else f"{text[:500]}…{text[-20:]}"
    return text if text.isprintable() else ascii(text)


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _too_large(path: str | os.PathLike, limit: int, remedy: str) -> QvlError:
    size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
    return QvlError(f"{shown(path)}: is larger than the {size} such a file may have; {remedy}")
