"""The chat template of Qwen2-VL and Qwen2.5-VL, as rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qvl_runtime.inputs.prompt import Parts, Place


class Form(str):
    """A special form of a rendered prompt."""

    __slots__ = ()


Piece = str | Form | Place
"""A piece of a rendered prompt: text, a special form, or a picture or video with its vision tags."""

START, END = Form("<|im_start|>"), Form("<|im_end|>")


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes
    ----------
    role : str
    content : list
        Texts and places for pictures; an assistant's has special forms instead of places.
    calls : list of mapping
        `name` and `arguments` of the tools that an assistant calls.
    """

    role: str
    content: Parts
    calls: Sequence[Mapping[str, Any]] = ()


class Template:
    """How messages become a prompt."""

    ROLES: ClassVar[tuple[str, ...]] = ("system", "user", "assistant")
    DEFAULT_SYSTEM: ClassVar[str | None] = "You are a helpful assistant."
    TIMESTAMPS: ClassVar[bool] = False
    """Whether each two frames of a video stand behind their time in words, between vision tags of their own."""

    def system(self, content: Parts | None) -> list[Piece]:
        """The system's turn; `DEFAULT_SYSTEM` if there is no message, and nothing if there is none of both."""
        if content is None:
            content = [] if self.DEFAULT_SYSTEM is None else [self.DEFAULT_SYSTEM]
            if not content:
                return []
        return self.turn("system", content)

    def turns(self, messages: Sequence[Message]) -> list[Piece]:
        """The turns of a conversation behind the system's."""
        return [piece for message in messages for piece in self.turn(message.role, message.content)]

    def turn(self, role: str, content: Sequence[Piece]) -> list[Piece]:
        """One turn."""
        return [START, f"{role}\n", *content, END, "\n"]

    def answer_head(self) -> list[Piece]:
        """What stands before an answer."""
        return [START, "assistant\n"]
