"""The chat template of Qwen2-VL and Qwen2.5-VL, in code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qvl_runtime.inputs.prompt import Parts, Place


class SpecialToken(str):
    """A special token of a rendered prompt."""

    __slots__ = ()


Piece = str | SpecialToken | Place
"""A piece of a rendered prompt: text, a special token, or a picture or video with its vision tags."""

START, END = SpecialToken("<|im_start|>"), SpecialToken("<|im_end|>")


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes
    ----------
    role : str
    content : list
        Texts and places for pictures; an assistant's message has special tokens instead of places. Empty if an
        assistant only calls tools; a list of parts without any text is one empty text.
    calls : list of mapping
        `name` and `arguments` of an assistant's tool calls.
    reasoning : str, optional
        Reasoning of an assistant, if its content does not begin with it.
    """

    role: str
    content: Parts
    calls: Sequence[Mapping[str, Any]] = ()
    reasoning: str | None = None


class Template:
    """Renders messages to a prompt."""

    ROLES: ClassVar[tuple[str, ...]] = ("system", "user", "assistant")
    DEFAULT_SYSTEM: ClassVar[str | None] = "You are a helpful assistant."
    TIMESTAMPS: ClassVar[bool] = False
    """Whether each pair of video frames has its own vision tags, after its time as text."""

    def system(self, content: Parts | None) -> list[Piece]:
        """Render the system's turn: the message, else `DEFAULT_SYSTEM`, else nothing."""
        if content is None:
            content = [] if self.DEFAULT_SYSTEM is None else [self.DEFAULT_SYSTEM]
            if not content:
                return []
        return self.turn("system", content)

    def turns(self, messages: Sequence[Message]) -> list[Piece]:
        """Render the turns after the system's."""
        return [piece for message in messages for piece in self.turn(message.role, message.content)]

    def turn(self, role: str, content: Sequence[Piece]) -> list[Piece]:
        """Render one turn."""
        return [START, f"{role}\n", *content, END, "\n"]

    def answer_head(self) -> list[Piece]:
        """Render the text before an answer."""
        return [START, "assistant\n"]
