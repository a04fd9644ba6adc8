"""Tools of a request, and calls in an answer, in OpenAI's format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.tools import CHOICES, CallReader, ToolCall, Tools
from qvl_runtime.openai.errors import refused
from qvl_runtime.openai.fields import Fields, array, mapping, text
from qvl_runtime.openai.limits import Limits


def read_tools(fields: Fields, limits: Limits) -> Tools | None:
    """Read the tools of a request; None if it has none, or its answer must not call any.

    Raises
    ------
    ApiError
        Names the invalid field.
    """
    for name, neutral in (("functions", ()), ("function_call", ("none", "auto"))):
        if fields.get(name) and fields.get(name) not in neutral:
            raise refused(f"this server knows no {name}; use tools and tool_choice", name)
    choice = _choice(fields)
    parallel = fields.get("parallel_tool_calls") is None or fields.flag("parallel_tool_calls")
    given = fields.array("tools")
    if not given:
        if choice not in ("auto", "none"):
            raise refused("tool_choice demands a call, but the request has no tools", "tool_choice")
        return None
    if len(given) > limits.tools:
        raise refused(f"tools has more than {limits.tools} functions", "tools")
    listed = [mapping(tool, f"tools[{i}]") for i, tool in enumerate(given)]
    try:
        tools = Tools(listed, parallel=parallel)
    except QvlError as error:
        raise refused(str(error), "tools") from None
    names = [function.name for function in tools.functions]
    if choice not in (*CHOICES, *names):
        raise refused(f"tool_choice names {choice[:80]!r}; tools has {', '.join(names):.200}", "tool_choice")
    if choice != "none":
        tools = dataclasses.replace(tools, choice=choice)
    _check_sizes(tools, limits)
    return None if choice == "none" else tools


def _choice(fields: Fields) -> str:
    """Return "none", "auto", "required", or the name of a function."""
    if not isinstance(fields.get("tool_choice"), dict):
        choice = fields.string("tool_choice") or "auto"
        if choice not in CHOICES:
            raise refused("tool_choice must be none, auto, required or a function", "tool_choice")
        return choice
    chosen = fields.object("tool_choice")
    if chosen.string("type") != "function":
        raise refused("tool_choice.type must be function", "tool_choice.type")
    name = text(chosen.object("function").get("name"), "tool_choice.function.name")
    if name in CHOICES:  # it would be taken for that choice
        raise refused(f"no function may have the name {name!r}, which is a choice of tools; rename it", "tools")
    return name


def _check_sizes(tools: Tools, limits: Limits) -> None:
    try:
        if len(json.dumps(tools.given)) > limits.text:
            raise refused(f"tools has more than {limits.text} characters", "tools")
        held = [function.schema for function in tools.possible if function.strict or tools.must_call]
        if len(json.dumps(held)) > limits.schema_bytes:
            raise refused(f"the parameters of the tools have more than {limits.schema_bytes} bytes", "tools")
    except RecursionError:
        raise refused("tools is nested too deeply", "tools") from None


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Read the calls of an assistant's message: `tool_calls` of a message for `Model.stream`."""
    calls = []
    for i, call in enumerate([] if value is None else array(value, name)):
        function = Fields(mapping(call, f"{name}[{i}]"), f"{name}[{i}].").object("function")
        found = {key: text(function.get(key), function.name(key)) for key in ("name", "arguments")}
        calls.append(found)
    return calls


class CallWriter:
    """Separates the calls of one answer from its text, and numbers them.

    Parameters
    ----------
    reader : CallReader or None
        None if the request has no tools.
    prefix : str
        Prefix of the ids.
    """

    def __init__(self, reader: CallReader | None, prefix: str):
        self._reader, self._prefix, self._count = reader, prefix, 0

    def push(self, text: str) -> dict[str, Any]:
        """Return `content` and, if there are any, `tool_calls` that are complete after this piece of the answer."""
        return self._written([text] if self._reader is None else self._reader.push(text))

    def finish(self) -> dict[str, Any]:
        """Return the rest."""
        return self._written([] if self._reader is None else self._reader.finish())

    def _written(self, items: Sequence[str | ToolCall]) -> dict[str, Any]:
        calls = [self._numbered(item) for item in items if isinstance(item, ToolCall)]
        content = {"content": "".join(item for item in items if isinstance(item, str))}
        return content | ({"tool_calls": calls} if calls else {})

    def _numbered(self, call: ToolCall) -> dict[str, Any]:
        number, self._count = self._count, self._count + 1
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        return {"index": number, "id": f"{self._prefix}{number}", "type": "function", "function": function}
