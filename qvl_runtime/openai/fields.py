"""Reading the fields of a request with checks of type and range; errors name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qvl_runtime.openai.errors import ApiError, refused


def wrong(value: Any, name: str, wanted: str) -> ApiError:
    """Create the error of a field that is missing or has another type."""
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    if value is None:
        return refused(f"{name} is missing: give {wanted}", name)
    return refused(f"{name} must be {wanted}, not {kinds.get(type(value), type(value).__name__)}", name)


def text(value: Any, name: str) -> str:
    """Check that a value is a valid Unicode string."""
    if not isinstance(value, str):
        raise wrong(value, name, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused(f"{name} holds half a character (a lone surrogate)", name) from None
    return value


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Check that a value is an object."""
    if not isinstance(value, dict):
        raise wrong(value, name, "an object")
    return value


def array(value: Any, name: str) -> list[Any]:
    """Check that a value is an array."""
    if not isinstance(value, list):
        raise wrong(value, name, "an array")
    return value


class Fields:
    """The fields of an object; null counts as absent.

    Parameters
    ----------
    data : mapping
    prefix : str
        Prefix of field names in errors.
    """

    def __init__(self, data: Mapping[str, Any], prefix: str = ""):
        self._data, self._prefix = data, prefix

    def get(self, name: str) -> Any:
        """Return a field; None if it is absent."""
        return self._data.get(name)

    def name(self, name: str) -> str:
        """Return a field's name for errors."""
        return f"{self._prefix}{name}"

    def flag(self, name: str) -> bool:
        """Return a boolean; False if absent."""
        value = self._data.get(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(value, self.name(name), "true or false")
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return an integer. 3.0 is accepted, because some clients only have floats."""
        value = self._number(name)
        if value is None:
            return None
        if isinstance(value, float):
            if not value.is_integer():
                raise refused(f"{self.name(name)} must be a whole number", self.name(name))
            value = int(value)
        return int(self._in_range(name, value, low, high))

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number."""
        value = self._number(name)
        return None if value is None else float(self._in_range(name, value, low, high))

    def string(self, name: str) -> str | None:
        """Return a string."""
        value = self._data.get(name)
        return None if value is None else text(value, self.name(name))

    def array(self, name: str) -> list[Any]:
        """Return an array; empty if absent."""
        value = self._data.get(name)
        return [] if value is None else array(value, self.name(name))

    def object(self, name: str) -> Fields:
        """Return the fields of an object; empty if absent."""
        value = self._data.get(name)
        return Fields({} if value is None else mapping(value, self.name(name)), f"{self.name(name)}.")

    def _number(self, name: str) -> int | float | None:
        value = self._data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(value, self.name(name), "a number")
        if not -math.inf < value < math.inf:
            raise refused(f"{self.name(name)} is too large", self.name(name))
        return value

    def _in_range(self, name: str, value: float, low: float, high: float) -> float:
        if not low <= value <= high:
            raise refused(f"{self.name(name)} must be from {low} to {high}", self.name(name))
        return value
