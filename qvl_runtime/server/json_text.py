"""JSON from and to clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from qvl_runtime.file.json_text import DuplicateKeyError, without_duplicates

PIECE = 64
"""Largest number of an array's items that are encoded at once."""
LEVELS = 8
"""Levels of a value in which arrays are cut; those of log probabilities lie within."""


def to_json(value: Any) -> bytes:
    """Encode a value as JSON in UTF-8. Lone surrogates become question marks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def to_json_in_pieces(value: Any) -> bytes:
    """Encode a value that may be large, in a thread other than the event loop's.

    While `to_json` encodes a hundred thousand log probabilities, no other thread runs for seconds.
    """
    return b"".join(_pieces(value, LEVELS))


def _pieces(value: Any, levels: int) -> Iterator[bytes]:
    """Yield the JSON of a value; long arrays in the outer levels are cut."""
    if isinstance(value, dict) and value and levels:
        for number, (key, item) in enumerate(value.items()):
            yield (b"," if number else b"{") + to_json(key) + b":"
            yield from _pieces(item, levels - 1)
        yield b"}"
    elif isinstance(value, list) and levels and 0 < len(value) <= PIECE:
        for number, item in enumerate(value):
            yield b"," if number else b"["
            yield from _pieces(item, levels - 1)
        yield b"]"
    elif isinstance(value, list) and len(value) > PIECE:
        for first in range(0, len(value), PIECE):
            yield (b"," if first else b"[") + to_json(value[first : first + PIECE])[1:-1]
        yield b"]"
    else:
        yield to_json(value)


def from_json(body: bytes | bytearray, values: int) -> dict[str, Any]:
    """Parse a JSON object of at most `values` values.

    Three bytes of JSON become a list of 64 bytes, so the values are counted before parsing.

    Raises
    ------
    ValueError
        Describes the problem of the body.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > values:
        raise ValueError(f"has more than {values} values")
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=without_duplicates)
    except _NoJson:
        raise
    except DuplicateKeyError:  # a proxy that reads one of the two would check another request than is answered
        raise ValueError("has a key twice in an object") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    except ValueError:  # Python's limit on the digits of an int
        raise ValueError("holds a number of too many digits") from None
    if not isinstance(data, dict):
        raise ValueError("must be a JSON object")
    return data


class _NoJson(ValueError):
    pass


def _refuse(constant: str) -> NoReturn:
    raise _NoJson(f"holds {constant}, which is no JSON")
