"""The cache folder for compiled kernels, and private files in it.

Cached machine code is executed. A folder or file that another user owns or may write to is therefore not used: each
process then compiles the kernels again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qvl_kernels.atomic import remove_stale, replacing
from qvl_kernels.locks import lock_file

log = logging.getLogger(__name__)

LONGEST_WAIT = 300
"""Seconds that a process waits for another one that compiles, before it compiles as well."""


@dataclasses.dataclass(frozen=True)
class CacheFolder:
    """Where compiled kernels are stored.

    Attributes
    ----------
    path : Path or None
        An existing private folder, whose files may be used; or None.
    problem : str
        Why nothing can be stored in it, or "". A read-only image of a container may bring a folder with kernels along.
    """

    path: Path | None
    problem: str = ""

    @property
    def notice(self) -> str:
        """How often the kernels are compiled and where they are stored, for the log message."""
        if not self.problem:
            return f"once; they are kept in {self.path}"
        return f"at every start, because {self.problem}; set QVL_CACHE_DIR to a folder of your own"


def find() -> CacheFolder:
    """Return ``QVL_CACHE_DIR`` if set, else ``qvl`` in the user's cache folder."""
    return _find(os.environ.get("QVL_CACHE_DIR", ""))


@functools.cache
def _find(named: str) -> CacheFolder:
    try:
        path = Path(named).absolute() if named else _default()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            problem = f"{path} is not a folder"
        else:
            problem = foreign(path, found)
        if not problem:
            return CacheFolder(path, "" if os.access(path, os.W_OK) else f"{path} cannot be written to")
    except (OSError, ValueError, RuntimeError) as error:
        # RuntimeError: no home folder; ValueError: a NUL byte in the name.
        problem = f"{named or 'the cache folder'} cannot be used ({getattr(error, 'strerror', None) or error})"
    return CacheFolder(None, problem)


def subfolder(name: str) -> Path | None:
    """Return a folder below that of `find` which only this user may enter, created if need be.

    None if nothing can be stored, or, with a warning, if another user could change this folder.
    """
    folder = find()
    if folder.path is None or folder.problem:
        return None
    path = folder.path / name
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        problem = foreign(path, os.lstat(path))
        if not problem:
            path.chmod(0o700)  # files that are made in it later may be open to all
    except OSError as error:
        problem = f"{path} cannot be used ({error.strerror})"
    if problem:
        log.warning("qvl: nothing is kept in %s, because %s; remove it", path, problem)
        return None
    return path


def _default() -> Path:
    if platform.system() == "Windows":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "qvl"


def foreign(path: Path, found: os.stat_result) -> str:
    """Return why another user may have changed a file or folder, or "". Windows protects user profiles by itself."""
    if not hasattr(os, "geteuid"):
        return ""
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path}"
    return ""


def open_private(path: Path) -> BinaryIO | None:
    """Open a regular file that only this user can have written; None if there is none."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or foreign(path, found):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside for the same folder, at most `LONGEST_WAIT`.

    Processes that start at the same time compile once. The lock only saves work: there is none on Windows and on file
    systems that cannot lock a folder. It ends with its process.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        end = time.monotonic() + LONGEST_WAIT
        if not lock_file(descriptor):
            log.warning("qvl: waiting for another process that is compiling kernels")
            while time.monotonic() < end and not lock_file(descriptor):
                time.sleep(0.1)
        yield
    finally:
        # A child forked meanwhile holds the same lock: closing the descriptor alone would not release it.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def store(path: Path, data: bytes, what: str = "the compiled kernels", done: str = "compiled") -> None:
    """Write a private file atomically. On failure log a warning with the reason and leave nothing behind.

    The warning says `what` was to be kept, and what will be `done` again.
    """
    try:
        remove_stale(path.parent.iterdir())
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        warn_of(error, path.parent, what, done)


def warn_of(error: OSError, folder: Path, what: str = "the compiled kernels", done: str = "compiled") -> None:
    """Log that `what` could not be kept in a folder and will be `done` again."""
    log.warning(
        "qvl: %s could not be kept in %s (%s) and will be %s again; make room there, or set QVL_CACHE_DIR to "
        "another folder",
        what,
        folder,
        error.strerror or error,
        done,
    )
