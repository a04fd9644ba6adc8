"""Locking a file or folder against other processes."""

from __future__ import annotations

from qvl_kernels.locks import lock_file
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
    if not lock_file(handle):
        raise QvlError(message)
