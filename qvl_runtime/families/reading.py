"""Reading values of untrusted config files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import MAX_JSON, parse_object
from qvl_runtime.file.opening import read_regular, shown

LARGEST = 1e6
"""Limit of means and standard deviations, far beyond those of any model; float32 computes them without overflow."""


def read_json(path: Path, folder_of: str = "a Hugging Face model") -> dict[str, Any]:
    """Read a JSON object from an untrusted file; `folder_of` says in the error what its folder should hold.

    Raises
    ------
    QvlError
        If it is missing or not a JSON object.
    """
    content = read_regular(path, limit=MAX_JSON, remedy=f"is {shown(path.parent)} the folder of {folder_of}?")
    return parse_object(content, f"{path}:", "download it again")


def take(data: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    """Return ``data[key]`` as `kind`. Raises QvlError for a missing or mistyped value."""
    value = data.get(key, default)
    if value is None:
        raise QvlError(f"{where}: '{key}' is missing; download the file again")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1023 else math.inf
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise QvlError(f"{where}: '{key}' is {value!r:.80}, expected {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise QvlError(f"{where}: '{key}' is {value!r}, expected a finite number")
    return value


def three(data: Mapping[str, Any], key: str, where: str, least: float = -LARGEST) -> tuple[float, float, float]:
    """Return a list of a number for red, green and blue, each from `least` to `LARGEST`."""
    values = take(data, key, list, where)
    check(len(values) == 3, where, f"'{key}' has {len(values)} numbers, expected 3")
    red, green, blue = (take({key: value}, key, float, where) for value in values)
    low, high = min(red, green, blue), max(red, green, blue)
    check(
        least <= low and high <= LARGEST, where, f"'{key}' is {values}, expected numbers from {least:g} to {LARGEST:g}"
    )
    return red, green, blue


def check(ok: bool, where: str, message: str) -> None:
    """Raise a QvlError with `message` unless `ok`."""
    if not ok:
        raise QvlError(f"{where}: {message}")
