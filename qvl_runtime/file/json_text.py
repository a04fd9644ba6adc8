"""Parsing untrusted JSON, and comparing it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from qvl_runtime.errors import QvlError

MAX_JSON = 16 << 20
"""Largest size of a JSON file in bytes. The parsed values take up to 30 times as much memory."""


class DuplicateKeyError(ValueError):
    """An object has a key twice."""


def parse_json(text: str | bytes, where: str, remedy: str) -> Any:
    """Parse JSON text, or UTF-8 bytes. `where` begins the error message and `remedy` ends it.

    Raises
    ------
    QvlError
        If it is malformed, nested too deeply, or an object has a duplicate key.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=without_duplicates)
    except RecursionError:
        raise QvlError(f"{where} is not readable as JSON (it is nested too deeply); {remedy}") from None
    except ValueError as error:
        raise QvlError(f"{where} is not readable as JSON ({error}); {remedy}") from None


def parse_object(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """Parse JSON that must be an object; see `parse_json`."""
    value = parse_json(text, where, remedy)
    if not isinstance(value, dict):
        raise QvlError(f"{where} holds no JSON object; {remedy}")
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Create an object; an `object_pairs_hook` of the json module, which by itself takes the last of equal keys.

    Raises
    ------
    DuplicateKeyError
        If a key appears twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise DuplicateKeyError("a key appears twice")
    return result


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the keys that lead to each value in which two objects differ; null counts as absent."""
    for key in {**one, **other}:
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from ((key, *keys) for keys in differences(mine, theirs))
        elif mine != theirs:
            yield (key,)
