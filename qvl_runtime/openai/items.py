"""Input items of a response's request: validation, and conversion to messages.

A turn of the assistant is one message, but several items: its reasoning, its text, and each of its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvl_runtime.openai.errors import refused
from qvl_runtime.openai.fields import array, mapping, text, wrong
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import ROLES, Message, MessageReader, Messages, Part, check_role, read_role

KINDS = ("message", "reasoning", "function_call", "function_call_output")
"""Types of items; one without a type is a message."""
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the fields that have it."""


def read_items(value: Any, instructions: Any, limits: Limits, allow_urls: bool) -> Messages:
    """Check the input of a request.

    Parameters
    ----------
    value
        A text of the user, or items.
    instructions : str or None
        The beginning of the system's message.

    Raises
    ------
    ApiError
        For an unknown item, role or part, a wrong type, a picture that is not a URI, too many of them, or too much
        text.
    """
    reader = _ItemReader(limits, allow_urls)
    if instructions is not None:
        reader.turns.append(Message("system", [reader.messages.counted(instructions, "instructions")], [], None))
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise wrong(value, "input", "a string or an array of items")
    if not value:
        raise refused("input is empty: it needs a user's message", "input")
    for i, item in enumerate(value):
        reader.item(mapping(item, f"input[{i}]"), f"input[{i}]")
    return Messages(reader.turns, reader.messages.sources, "input")


class _ItemReader:
    """Reads items into `turns`."""

    def __init__(self, limits: Limits, allow_urls: bool):
        self.messages = MessageReader(limits, allow_urls)
        self.turns: list[Message] = []

    def item(self, item: Mapping[str, Any], name: str) -> None:
        kind = "message" if item.get("type") is None else text(item.get("type"), f"{name}.type")
        if kind == "message":
            self._message(item, name)
        elif kind == "reasoning":
            self._reasoning(item, name)
        elif kind == "function_call":
            call = {key: self.messages.counted(item.get(key), f"{name}.{key}") for key in ("name", "arguments")}
            self._assistant().calls.append(call)
        elif kind == "function_call_output":
            parts = self.messages.content(item.get("output"), f"{name}.output", "tool", self._part)
            self.turns.append(Message("tool", parts, [], None))
        else:
            raise refused(f"{name}.type is {kind[:40]!r}; it must be one of {', '.join(KINDS)}", f"{name}.type")

    def _message(self, item: Mapping[str, Any], name: str) -> None:
        role = read_role(item, name, [role for role in ROLES if role != "tool"])
        parts = self.messages.content(item.get("content"), f"{name}.content", role, self._part)
        last = self.turns[-1] if self.turns else None
        if ROLES[role] == "system" and last is not None and len(self.turns) == 1 and last.role == "system":
            last.parts.extend(["\n\n", *parts])  # after the instructions: one message for a model that takes one
        elif role == "assistant" and last is not None and (last.calls or not last.parts):
            self._assistant().parts.extend(parts)
        else:
            self.turns.append(Message(ROLES[role], parts, [], None))

    def _reasoning(self, item: Mapping[str, Any], name: str) -> None:
        said = []
        for field in ("content", "summary"):
            for i, part in enumerate([] if item.get(field) is None else array(item.get(field), f"{name}.{field}")):
                where = f"{name}.{field}[{i}]"
                said.append(self.messages.counted(mapping(part, where).get("text"), f"{where}.text"))
            if said:  # a summary is a second version of the content
                break
        if said:
            self.turns.append(Message("assistant", [], [], "\n".join(said)))

    def _assistant(self) -> Message:
        """Return the assistant's turn that goes on; a new one after another's."""
        if not self.turns or self.turns[-1].role != "assistant":
            self.turns.append(Message("assistant", [], [], None))
        return self.turns[-1]

    def _part(self, part: Mapping[str, Any], name: str, role: str) -> Part:
        kind = text(part.get("type"), f"{name}.type")
        if kind in TEXTS:
            return self.messages.counted(part.get(TEXTS[kind]), f"{name}.{TEXTS[kind]}")
        if kind == "input_image":
            check_role(role, name)
            if part.get("image_url") is None and part.get("file_id") is not None:
                raise refused(
                    f"{name}.file_id: this server keeps no files; give image_url a data: URI", f"{name}.file_id"
                )
            return self.messages.picture(part.get("image_url"), f"{name}.image_url", part, name)
        if kind in ("box", "video"):
            return self.messages.part(part, name, role)
        known = f"{', '.join(TEXTS)}, input_image, video or box"
        raise refused(f"{name}.type is {kind[:40]!r}; it must be {known}", f"{name}.type")
