"""Reading values of a config file that nobody vouches for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qvl_runtime.errors import QvlError


def take(data: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    """Read ``data[key]`` as `kind`, refusing a missing or mistyped value by name."""
    value = data.get(key, default)
    if value is None:
        raise QvlError(f"{where}: '{key}' is missing; download the file again")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1023 else math.inf
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise QvlError(f"{where}: '{key}' is {value!r}, expected {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise QvlError(f"{where}: '{key}' is {value!r}, expected a finite number")
    return value


def check(ok: bool, where: str, message: str) -> None:
    """Refuse a value, with a message that names it."""
    if not ok:
        raise QvlError(f"{where}: {message}")
