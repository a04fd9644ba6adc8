"""Arrays of a calibration on disk, which leave no file behind."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from pathlib import Path

import numpy as np


def spilled(path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Create a file, and return it mapped as an array of zeros.

    The file has lost its name by then (on Windows it keeps it): its room is free again with the array, also if the
    process is killed.

    Raises
    ------
    OSError
        If the disk is full.
    """
    with open(path, "w+b") as file:
        _reserve(file.fileno(), path, math.prod(shape) * np.dtype(dtype).itemsize)
        array = np.memmap(file, dtype, "r+", shape=shape)
    with contextlib.suppress(OSError):
        path.unlink()
    return array


def _reserve(handle: int, path: Path, nbytes: int) -> None:
    """Give a file its room: on a disk without it, the system would end the process that writes to the mapped file."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:  # a file system that cannot do it says so with another number
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from None
