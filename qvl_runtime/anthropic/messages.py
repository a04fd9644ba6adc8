"""Messages in Anthropic's format: validation, and conversion to those of a chat.

A user's message has the results of tools beside what the user says. Each result becomes a message of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qvl_runtime.openai.errors import refused
from qvl_runtime.openai.fields import Fields, array, mapping, text
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import Message, MessageReader, Messages, Part, check_role, read_role

ROLES = ("user", "assistant", "system")

OWNERS = {"tool_result": "user", "tool_use": "assistant", "thinking": "assistant", "redacted_thinking": "assistant"}
"""Blocks that are no parts of a content, and the role whose messages have them."""

PARTS = ("text", "box", "video")
"""Blocks that have the form of parts in chat completions."""


def read_conversation(fields: Fields, limits: Limits, allow_urls: bool) -> Messages:
    """Check the fields `system` and `messages` of a request.

    Raises
    ------
    ApiError
        For an unknown role or block, a wrong type, a picture that is neither base64 nor a URI, too many of them, or
        too much text.
    """
    reader = _BlockReader(limits, allow_urls)
    system, listed = fields.get("system"), array(fields.get("messages"), "messages")
    if system not in (None, "", []):
        reader.system(system, "system")
    if not listed:
        raise refused("messages is empty: it needs a user's message", "messages")
    for i, data in enumerate(listed):
        reader.message(mapping(data, f"messages[{i}]"), f"messages[{i}]")
    return Messages(reader.turns, reader.messages.sources)


class _BlockReader:
    """Reads messages into `turns`."""

    def __init__(self, limits: Limits, allow_urls: bool):
        self.messages = MessageReader(limits, allow_urls)
        self.turns: list[Message] = []

    def system(self, value: Any, name: str) -> None:
        self.turns.append(Message("system", self.messages.content(value, name, "system", self._part), [], None))

    def message(self, data: Mapping[str, Any], name: str) -> None:
        role = read_role(data, name, ROLES)
        value, name = data.get("content"), f"{name}.content"
        if not isinstance(value, list):
            self.turns.append(Message(role, self.messages.content(value, name, role, self._part), [], None))
            return
        before, parts, calls, thoughts = len(self.turns), [], [], []
        blocks = [(mapping(block, f"{name}[{i}]"), f"{name}[{i}]") for i, block in enumerate(value)]
        # The calls are followed by their results, not by what the user says to these. So are the pictures numbered, of
        # which the last one is that of the answer's boxes.
        for block, where in sorted(blocks, key=lambda entry: entry[0].get("type") != "tool_result"):
            kind = text(block.get("type"), f"{where}.type")
            if OWNERS.get(kind, role) != role:
                raise refused(f"{where}: only a message of the role {OWNERS[kind]} has a {kind}", where)
            if kind == "tool_result":
                self._result(block, where)
            elif kind == "tool_use":
                calls.append(self._call(block, where))
            elif kind == "thinking":
                thoughts.append(self.messages.counted(block.get("thinking"), f"{where}.thinking"))
            elif kind != "redacted_thinking":
                parts.append(self._part(block, where, role))
        if parts or calls or thoughts or len(self.turns) == before:
            self.turns.append(Message(role, parts, calls, "\n".join(thoughts) if thoughts else None))

    def _result(self, block: Mapping[str, Any], name: str) -> None:
        value = [] if block.get("content") is None else block.get("content")
        parts = self.messages.content(value, f"{name}.content", "tool", self._part)
        self.turns.append(Message("tool", parts, [], None))

    def _call(self, block: Mapping[str, Any], name: str) -> dict[str, Any]:
        given = mapping(block.get("input"), f"{name}.input")
        try:
            arguments = json.dumps(given, ensure_ascii=False, allow_nan=False)
        except RecursionError:
            raise refused(f"{name}.input is nested too deeply", f"{name}.input") from None
        except ValueError:
            raise refused(f"{name}.input holds a number that is too large", f"{name}.input") from None
        called = self.messages.counted(block.get("name"), f"{name}.name")
        return {"name": called, "arguments": self.messages.counted(arguments, f"{name}.input")}

    def _part(self, block: Mapping[str, Any], name: str, role: str) -> Part:
        kind = text(block.get("type"), f"{name}.type")
        if kind in PARTS:
            return self.messages.part(block, name, role)
        if kind != "image":
            known = ", ".join(("image", *PARTS, *OWNERS))
            raise refused(f"{name}.type is {kind[:40]!r}; it must be one of {known}", f"{name}.type")
        check_role(role, name)
        source, where = mapping(block.get("source"), f"{name}.source"), f"{name}.source"
        form = text(source.get("type"), f"{where}.type")
        if form == "base64":
            return self.messages.encoded(source.get("data"), f"{where}.data", block, name)
        if form == "url":
            return self.messages.picture(source.get("url"), f"{where}.url", block, name)
        raise refused(f"{where}.type is {form[:40]!r}; it must be base64 or url", f"{where}.type")
