"""JSON from and to strangers."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def to_json(value: Any) -> bytes:
    """A value as JSON in UTF-8. Half a character of UTF-16, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def from_json(body: bytes | bytearray, values: int) -> dict[str, Any]:
    """A JSON object of at most `values` values.

    Three bytes of JSON make an empty list of 64, so the values are counted before anything is made.

    Raises
    ------
    ValueError
        Says what is wrong with the body.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > values:
        raise ValueError(f"has more than {values} values")
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError("must be a JSON object")
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"holds {constant}, which is no JSON")
