"""Locking a file or folder against other processes."""

from __future__ import annotations

from qvl_runtime.errors import QvlError


def lock(handle: int, message: str) -> None:
    """Lock an open file until it is closed. On Windows, and on a file system without locks, it does nothing.

    Parameters
    ----------
    handle : int
        Descriptor of the file.
    message : str
        The error if another process has locked it.

    Raises
    ------
    QvlError
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise QvlError(message) from None
    except OSError:
        return
