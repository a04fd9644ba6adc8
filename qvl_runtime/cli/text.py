"""Text for terminals, numbers with units, and standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from qvl_kernels.ops import DeviceError
from qvl_runtime.errors import QvlError

FAILURES = (QvlError, DeviceError, OSError, MemoryError)
"""Errors of the input and of the system, which are told in one line."""

# Control characters can clear a terminal, set its title, or write to the clipboard.
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "�") | {ord("\n"): "\n", ord("\t"): "\t", 13: None}


def printable(text: str) -> str:
    """Replace control characters except line ends and tabs."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Return printable text without line ends."""
    return printable(" ".join(text.split()))


def message(error: BaseException) -> str:
    """Return what one of `FAILURES` says, in one line."""
    text = str(error)
    if isinstance(error, MemoryError):
        text = "there is not enough memory; close other programs or take a smaller model"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return one_line(text)


def size(nbytes: int) -> str:
    """Format bytes with three digits and a unit.

    Examples
    --------
    >>> size(512), size(5_352_000), size(6_590_000_000)
    ('512 bytes', '5.35 MB', '6.59 GB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:
            return f"{_three_digits(nbytes / scale)} {unit}"
    return f"{nbytes} bytes"


def duration(seconds: float) -> str:
    """Format a time with three digits and a unit: 1.42 ms, 33.8 s."""
    return f"{_three_digits(seconds)} s" if seconds >= 0.9995 else f"{_three_digits(seconds * 1e3)} ms"


def _three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def standard_input() -> Iterator[str]:
    """Yield the lines of standard input, with their line ends.

    Raises
    ------
    QvlError
        If it is closed, or is not UTF-8 text.
    """
    if sys.stdin is None:
        raise QvlError("standard input is closed; pipe a text into it")
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise QvlError(f"standard input is no {error.encoding} text ({error.reason}); convert it to UTF-8") from None
