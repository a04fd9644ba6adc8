"""The settings of a chat: how they are read, and the values they may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.errors import QvlError, excerpt
from qvl_runtime.options import whole_number

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}
"""Options of `Model.chat`, and their types."""


def check_name(name: str) -> None:
    """Raise a QvlError for a name that is no setting's."""
    if name not in SETTINGS:
        raise QvlError(f"{excerpt(name)} is no setting; there are {', '.join(SETTINGS)}")


def read_setting(name: str, text: str) -> Any:
    """Read the value of one of `SETTINGS`, an int or a float.

    Raises
    ------
    QvlError
        If the value is no number or out of range.
    """
    try:
        value = SETTINGS[name](text)
    except ValueError:
        kind = "whole number" if SETTINGS[name] is int else "number"
        raise QvlError(f"{name} is {excerpt(text)}; expected a {kind}") from None
    if name == "max_new_tokens":
        whole_number(name, value, 1)
    else:
        Sampler(**{name: value})
    return value
