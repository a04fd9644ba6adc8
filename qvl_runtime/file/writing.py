"""The error of a file that cannot be written."""

from __future__ import annotations

import os

from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import reason_of, shown


def unwritable(path: str | os.PathLike, error: Exception, remedy: str) -> QvlError:
    """Return the error for a file that cannot be written because of `error`, such as an OSError; `remedy` ends it."""
    return QvlError(f"{shown(path)}: cannot be written ({reason_of(error)}); {remedy}")
