"""Validation of requests for ``/v1/responses``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.inputs.tools import Tools
from qvl_runtime.openai.errors import refused
from qvl_runtime.openai.fields import Fields, array, mapping, text
from qvl_runtime.openai.items import read_items
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.requests import Asked, read_common, read_form, read_forms, read_sampling
from qvl_runtime.openai.tools import read_tools

STORED = {
    "previous_response_id": "this server keeps no responses: send the whole conversation as input",
    "conversation": "this server keeps no conversations: send the whole conversation as input",
    "prompt": "this server keeps no prompts: send instructions and input",
    "background": "this server computes no response in the background: stream it",
}
"""Fields that need what a server has stored, and what to do."""

LOGPROBS = "message.output_text.logprobs"
"""What `include` names for log probabilities. Nothing else that it may name exists here."""


SPARE = 200
"""Levels that what a response repeats may be nested less deeply than a request: the stack of who writes it."""


@dataclasses.dataclass
class ResponseAsked(Asked):
    """A validated request for a response.

    Attributes
    ----------
    echo : dict
        The request's fields that the response repeats.
    """

    limit_field: ClassVar[str] = "max_output_tokens"
    echo: dict[str, Any]


def read_response(data: Mapping[str, Any], limits: Limits, own: GenerationConfig, allow_urls: bool) -> ResponseAsked:
    """Validate a request for ``/v1/responses``; `own` has the model's defaults.

    Raises
    ------
    ApiError
        Names the invalid field.
    """
    fields = Fields(data)
    for name, remedy in STORED.items():
        if fields.get(name):
            raise refused(f"{name}: {remedy}", name)
    most = fields.integer("max_output_tokens", 1, 1 << 31)
    options = read_sampling(fields, limits, own) | {"max_new_tokens": most or own.max_new_tokens}
    form = fields.object("text").object("format")
    schema = None if form.get("type") is None else read_form(form, form, limits)
    options |= read_forms(fields, schema, _tools(fields, limits))
    messages = read_items(fields.get("input"), fields.get("instructions"), limits, allow_urls)
    asked = read_common(fields, limits, options, _logprobs(fields, limits))
    if asked["n"] != 1:
        raise refused("n: a response has one answer", "n")
    return ResponseAsked(prompt=messages, **asked, echo=_echo(fields, limits, options, most))


def _logprobs(fields: Fields, limits: Limits) -> int | None:
    """Return the number of alternatives, if log probabilities are requested."""
    top = fields.integer("top_logprobs", 0, limits.top_logprobs)
    included = LOGPROBS in [text(name, "include") for name in fields.array("include")]
    return (top or 0) if included or top else None


def _tools(fields: Fields, limits: Limits) -> Tools | None:
    """Read the tools, which have the form of chat completions but for one level."""
    tools = [_nested(mapping(tool, f"tools[{i}]"), f"tools[{i}]") for i, tool in enumerate(fields.array("tools"))]
    choice: Any = fields.get("tool_choice")
    if isinstance(choice, dict):
        chosen = fields.object("tool_choice")
        kind = chosen.string("type")
        if kind == "allowed_tools":
            allowed = [mapping(tool, "tool_choice.tools") for tool in array(chosen.get("tools"), "tool_choice.tools")]
            names = [text(tool.get("name"), "tool_choice.tools.name") for tool in allowed]
            tools = [tool for tool in tools if tool["function"].get("name") in names]
            choice = chosen.string("mode") or "auto"
        elif kind == "function":
            choice = {"type": kind, "function": {"name": text(chosen.get("name"), "tool_choice.name")}}
        else:
            raise refused("tool_choice.type must be function or allowed_tools", "tool_choice.type")
    parallel = fields.get("parallel_tool_calls")
    return read_tools(Fields({"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}), limits)


def _nested(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = text(tool.get("type"), f"{name}.type")
    if kind != "function":
        raise refused(f"{name}.type is {kind[:40]!r}: this server only knows functions", f"{name}.type")
    known = ("name", "description", "parameters", "strict")
    return {"type": kind, "function": {key: tool[key] for key in known if tool.get(key) is not None}}


def _echo(fields: Fields, limits: Limits, options: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    """Return the fields that OpenAI's clients expect in every response.

    Raises
    ------
    ApiError
        They cannot be written as JSON, or are too long: a stream repeats them three times.
    """
    parallel = fields.get("parallel_tool_calls")
    fields.object("metadata")
    echo = {
        "background": False,
        "instructions": fields.get("instructions"),
        "max_output_tokens": most,
        "metadata": fields.get("metadata") or {},
        "parallel_tool_calls": parallel is None or parallel,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": options["temperature"],
        "text": fields.get("text") or {"format": {"type": "text"}},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.get("tools") or [],
        "top_logprobs": fields.get("top_logprobs") or 0,
        "top_p": options["top_p"],
        "truncation": "disabled",
        "user": fields.string("user"),
    }
    deeper: Any = {name: value for name, value in echo.items() if name != "instructions"}  # they are counted as texts
    for _ in range(SPARE):
        deeper = [deeper]
    try:
        written = json.dumps(deeper, allow_nan=False)
    except RecursionError:
        raise refused("metadata, text, tools or tool_choice is nested too deeply") from None
    except ValueError:
        raise refused("metadata, text, tools or tool_choice holds a number that is too large") from None
    if len(written) > limits.text:
        told = "metadata, text, tools, tool_choice and user, which a response repeats, have more than"
        raise refused(f"{told} {limits.text} characters together: shorten them")
    return echo
