"""Tools: functions that a model may call, and the calls in its answers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from qvl_runtime.errors import QvlError

NAME = re.compile(r"[\w.:/-]{1,128}")
"""A function's name: templates write it between quotes, without escapes."""

CHOICES = ("auto", "none", "required")
"""Choices of tools that name no function."""


class Function(NamedTuple):
    """A function.

    Attributes
    ----------
    name : str
    schema : dict
        JSON schema of its arguments, an object.
    strict : bool
        Whether calls must match the schema.
    """

    name: str
    schema: dict[str, Any]
    strict: bool


@dataclasses.dataclass(frozen=True)
class Tools:
    """Functions that the model may call, and whether it must.

    Parameters
    ----------
    given : sequence of mapping
        ``{"name", "description", "parameters"}`` of each function, or OpenAI's ``{"type": "function", "function": …}``
        around it. `parameters` is the JSON schema of its arguments; without it there are none. With
        ``"strict": True`` calls always match it.
    choice : str
        "auto" lets the model choose, "required" demands a call, and a function's name a call of this function. Demanded
        calls always match their schemas.
    parallel : bool
        Whether one answer may have several calls.

    Attributes
    ----------
    functions : list of Function
        Those of `given`, in its order.

    Raises
    ------
    QvlError
        A function that cannot be read, a name that is used twice, a choice that names none, or `parallel` of another
        type.
    """

    given: Sequence[Mapping[str, Any]]
    choice: str = "auto"
    parallel: bool = True
    functions: list[Function] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.given, Sequence) or isinstance(self.given, str | bytes) or not self.given:
            raise QvlError(f"tools is {self.given!r:.60}; expected a list of functions")
        object.__setattr__(self, "functions", [_function(tool, i) for i, tool in enumerate(self.given)])
        names = [function.name for function in self.functions]
        if twice := [name for name in names if names.count(name) > 1]:
            raise QvlError(f"tools has two functions named {twice[0]!r}; rename one")
        if self.choice not in ("auto", "required", *names):
            raise QvlError(f"the choice of tools is {self.choice!r:.80}; expected auto, required or a function's name")
        if not isinstance(self.parallel, bool):
            raise QvlError(f"parallel of the tools is {self.parallel!r:.60}; expected True or False")

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice != "auto"

    @property
    def possible(self) -> list[Function]:
        """The functions that the choice allows."""
        return [function for function in self.functions if self.choice in ("auto", "required", function.name)]


def _function(tool: Any, index: int) -> Function:
    where = f"tools[{index}]"
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or not isinstance(function, Mapping) or tool.get("type") not in (None, "function"):
        raise QvlError(f"{where} is {tool!r:.60}; expected {{'type': 'function', 'function': {{'name': …}}}}")
    name, schema, strict = function.get("name"), function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise QvlError(f"{where} has the name {name!r:.80}; use 1 to 128 letters, digits, and . : / _ -")
    if name in CHOICES:
        raise QvlError(f"{where} has the name {name!r}, which is a choice of tools; rename the function")
    if schema is None:
        schema = {"properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise QvlError(f"the parameters of the function {name!r} are {schema!r:.60}; expected an object's JSON schema")
    if strict is not None and not isinstance(strict, bool):
        raise QvlError(f"strict of the function {name!r} is {strict!r:.60}; expected True or False")
    return Function(name, {**schema, "type": "object"}, bool(strict))


class ToolCall(NamedTuple):
    """A call in an answer: a function's name and its arguments."""

    name: str
    arguments: dict[str, Any]


class CallReader(Protocol):
    """Separates calls from the text of an answer while it arrives."""

    def push(self, text: str) -> list[str | ToolCall]:
        """Return what is complete: text, and calls."""

    def finish(self) -> list[str | ToolCall]:
        """Return the rest at the end of the answer."""


def calls_in(new: Callable[[], CallReader], text: str) -> list[ToolCall]:
    """Return the calls of a whole answer; `new` creates a reader."""
    reader = new()
    return [item for item in [*reader.push(text), *reader.finish()] if isinstance(item, ToolCall)]
