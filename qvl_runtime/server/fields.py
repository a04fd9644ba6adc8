"""Reading the fields of a request: each has its type and range, and an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qvl_runtime.server.errors import refused


def describe(value: Any) -> str:
    """The JSON type of a value."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")


def text(value: Any, name: str) -> str:
    """A string that is Unicode text."""
    if not isinstance(value, str):
        raise refused(f"{name} must be a string, not {describe(value)}", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused(f"{name} holds half a character (a lone surrogate)", name) from None
    return value


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise refused(f"{name} must be an object, not {describe(value)}", name)
    return value


def array(value: Any, name: str) -> list[Any]:
    """An array."""
    if not isinstance(value, list):
        raise refused(f"{name} must be an array, not {describe(value)}", name)
    return value


class Fields:
    """The fields of an object; null is as good as absent.

    Parameters
    ----------
    data : mapping
    prefix : str
        What errors write before a field's name.
    """

    def __init__(self, data: Mapping[str, Any], prefix: str = ""):
        self._data, self._prefix = data, prefix

    def get(self, name: str) -> Any:
        """A field as it is; None if it is absent."""
        return self._data.get(name)

    def name(self, name: str) -> str:
        """What errors call a field."""
        return f"{self._prefix}{name}"

    def flag(self, name: str) -> bool:
        """A boolean, False by default."""
        value = self._data.get(name)
        if value is not None and not isinstance(value, bool):
            raise refused(f"{self.name(name)} must be true or false, not {describe(value)}", self.name(name))
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number; 3.0 is one, as some clients know only floats."""
        value = self._number(name)
        if value is None:
            return None
        if isinstance(value, float):
            if not value.is_integer():
                raise refused(f"{self.name(name)} must be a whole number", self.name(name))
            value = int(value)
        return int(self._in_range(name, value, low, high))

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number."""
        value = self._number(name)
        return None if value is None else float(self._in_range(name, value, low, high))

    def string(self, name: str) -> str | None:
        """A text."""
        value = self._data.get(name)
        return None if value is None else text(value, self.name(name))

    def object(self, name: str) -> Fields:
        """An object's fields; without it there are none."""
        value = self._data.get(name)
        return Fields({} if value is None else mapping(value, self.name(name)), f"{self.name(name)}.")

    def _number(self, name: str) -> int | float | None:
        value = self._data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
            raise refused(f"{self.name(name)} must be a number, not {describe(value)}", self.name(name))
        return value

    def _in_range(self, name: str, value: float, low: float, high: float) -> float:
        if not low <= value <= high:
            raise refused(f"{self.name(name)} must be from {low:g} to {high:g}", self.name(name))
        return value
