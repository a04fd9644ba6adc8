"""Validation of requests for ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvl_runtime.anthropic.errors import NO_THREADS
from qvl_runtime.anthropic.messages import read_conversation
from qvl_runtime.engine.constraints import JsonSchema
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.inputs.tools import Tools
from qvl_runtime.openai.errors import refused
from qvl_runtime.openai.fields import Fields, mapping, text, wrong
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import Messages
from qvl_runtime.openai.requests import Asked, read_common, read_form, read_forms, read_sampling
from qvl_runtime.openai.tools import read_tools

ELSEWHERE = {
    "thread": "this server keeps no conversations: send all messages",
    "container": "this server runs no code: leave it out",
    "mcp_servers": "this server calls no other servers: give their tools as tools of the type custom",
    "compaction": "this server shortens no conversations: ask for a summary in a message",
}
"""Fields of what Anthropic's servers do, without which an answer would be another one, and what to do."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""Choices of tools that name none, and OpenAI's names of them."""


def read_message(data: Mapping[str, Any], limits: Limits, own: GenerationConfig, allow_urls: bool) -> Asked:
    """Validate a request for ``/v1/messages``; `own` has the model's defaults.

    Raises
    ------
    ApiError
        Names the invalid field.
    """
    fields = _fields(data)
    most = fields.integer("max_tokens", 1, 1 << 31)
    if most is None:
        raise wrong(most, "max_tokens", "the largest number of tokens of the answer")
    options = read_sampling(fields, limits, own, stop="stop_sequences") | {"max_new_tokens": most}
    options |= read_forms(fields, _form(fields, limits), _tools(fields, limits))
    messages = read_conversation(fields, limits, allow_urls)
    asked = read_common(fields, limits, options, None)
    if asked["n"] != 1:
        raise refused("n: a message is one answer", "n")
    return Asked(prompt=messages, **asked)


def read_count(data: Mapping[str, Any], limits: Limits, allow_urls: bool) -> tuple[Messages, Tools | None]:
    """Validate what of a request for ``/v1/messages/count_tokens`` takes tokens.

    Raises
    ------
    ApiError
        Names the invalid field.
    """
    fields = _fields(data)
    return read_conversation(fields, limits, allow_urls), _tools(fields, limits)


def _fields(data: Mapping[str, Any]) -> Fields:
    fields = Fields(data)
    for name, remedy in ELSEWHERE.items():
        if fields.get(name):
            raise refused(f"{name}: {remedy}", name, NO_THREADS if name == "thread" else None)
    return fields


def _form(fields: Fields, limits: Limits) -> JsonSchema | None:
    """Read the form of the answer, whose older name is `output_format`."""
    config, form = fields.object("output_config"), fields.object("output_format")
    if config.get("format") is not None:
        if fields.get("output_format") is not None:
            raise refused("output_format is given beside output_config.format: give one of the two", "output_format")
        form = config.object("format")
    elif fields.get("output_format") is None:
        return None
    return read_form(form, form, limits)


def _tools(fields: Fields, limits: Limits) -> Tools | None:
    """Read the tools, which are functions as in chat completions."""
    tools = [_function(mapping(tool, f"tools[{i}]"), f"tools[{i}]") for i, tool in enumerate(fields.array("tools"))]
    chosen = fields.object("tool_choice")
    choice: Any = None
    if fields.get("tool_choice") is not None:
        kind = text(chosen.get("type"), "tool_choice.type")
        if kind == "tool":
            choice = {"type": "function", "function": {"name": text(chosen.get("name"), "tool_choice.name")}}
        elif kind in CHOICES:
            choice = CHOICES[kind]
        else:
            raise refused(f"tool_choice.type must be one of {', '.join((*CHOICES, 'tool'))}", "tool_choice.type")
    parallel = not chosen.flag("disable_parallel_tool_use")
    return read_tools(Fields({"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}), limits)


def _function(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = "custom" if tool.get("type") is None else text(tool.get("type"), f"{name}.type")
    if kind != "custom":
        told = f"{name}.type is {kind[:40]!r}, a tool that Anthropic defines"
        raise refused(f"{told}: this server only knows those of the type custom", f"{name}.type")
    if tool.get("input_schema") is not None:
        mapping(tool["input_schema"], f"{name}.input_schema")
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    function = {known: tool[given] for given, known in names.items() if tool.get(given) is not None}
    return {"type": "function", "function": function}
