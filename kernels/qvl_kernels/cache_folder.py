"""The folder that compiled kernels are kept in, and files in it that nobody else can have written.

Compiled code is run as it is found, so a folder or a file that another user owns or may write to is not used: each
process then compiles for itself.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import platform
import stat
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

PARTIAL = ".partial"
FORGOTTEN = 3600
"""Seconds after which the partial file of a process that was killed is removed."""


@dataclasses.dataclass(frozen=True)
class CacheFolder:
    """Where compiled kernels go.

    Attributes
    ----------
    path : Path or None
        An existing, private folder, or None where they cannot be kept.
    problem : str
        Why they cannot.
    """

    path: Path | None
    problem: str = ""

    @property
    def notice(self) -> str:
        """What becomes of kernels that are compiled now, for the one line that announces it."""
        if self.path:
            return f"once; they are kept in {self.path}"
        return f"at every start, because {self.problem}; set QVL_CACHE_DIR to a folder of your own"


def find() -> CacheFolder:
    """``QVL_CACHE_DIR``, else ``qvl`` in the user's cache folder."""
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
            problem = _foreign(str(path), found)
        if not problem and not os.access(path, os.W_OK):
            problem = f"{path} cannot be written to"
        if not problem:
            return CacheFolder(path)
    except (OSError, ValueError, RuntimeError) as error:
        # RuntimeError: the user has no home folder; ValueError: a NUL byte in the name.
        problem = f"{named or 'the cache folder'} cannot be used ({getattr(error, 'strerror', None) or error})"
    return CacheFolder(None, problem)


def _default() -> Path:
    if platform.system() == "Windows":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "qvl"


def _foreign(name: str, found: os.stat_result) -> str:
    """Why another user can have changed a file or folder, or ""; Windows keeps profiles apart by itself."""
    if not hasattr(os, "geteuid"):
        return ""
    if found.st_uid != os.geteuid():
        return f"{name} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {name}"
    return ""


def open_private(path: Path) -> BinaryIO | None:
    """Open a regular file for reading, or None if there is none that only this user can have written."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or _foreign(str(path), found):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


def keep(path: Path, data: bytes) -> None:
    """Write a file with mode 0600, at once or not at all, whoever else is writing it.

    Where that fails nothing is left of it, and a warning is logged that says why.
    """
    partial = None
    try:
        _remove_forgotten(path.parent)
        descriptor, partial = tempfile.mkstemp(suffix=PARTIAL, dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(partial, path)
        partial = None
    except OSError as error:
        log.warning(
            "qvl: the compiled kernels could not be kept in %s (%s) and will be compiled again; make room there, or "
            "set QVL_CACHE_DIR to another folder",
            path.parent,
            error.strerror or error,
        )
    finally:
        if partial:
            Path(partial).unlink(missing_ok=True)


def _remove_forgotten(folder: Path) -> None:
    for partial in folder.glob(f"*{PARTIAL}"):
        try:
            if time.time() - partial.stat().st_mtime > FORGOTTEN:
                partial.unlink()
        except OSError:  # another process was quicker
            continue
