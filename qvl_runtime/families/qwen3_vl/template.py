"""The chat template of Qwen3-VL, in code: tools, and the reasoning of the Thinking models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.template import END, START, Message, Piece, SpecialToken, Template
from qvl_runtime.inputs.prompt import Parts

THINK, THOUGHT = SpecialToken("<think>"), SpecialToken("</think>")
CALL, CALLED = SpecialToken("<tool_call>"), SpecialToken("</tool_call>")
RESPONSE, RESPONDED = SpecialToken("<tool_response>"), SpecialToken("</tool_response>")

_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALLS: tuple[Piece, ...] = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within ",
    CALL,
    CALLED,
    " XML tags:\n",
    CALL,
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
    CALLED,
)


@dataclasses.dataclass(frozen=True)
class Qwen3Template(Template):
    """Renders messages to a prompt.

    Attributes
    ----------
    thinking : bool
        Whether answers begin with reasoning, up to ``</think>``. The reasoning of earlier turns is omitted.
    tools : sequence of mapping
        JSON schemas of functions that the model may call.
    """

    thinking: bool = False
    tools: Sequence[Mapping[str, Any]] = ()

    ROLES = ("system", "user", "assistant", "tool")
    DEFAULT_SYSTEM = None
    SYSTEM_ANYWHERE = False
    TIMESTAMPS = True

    def system(self, content: Parts | None) -> list[Piece]:
        if not self.tools:
            return super().system(content)
        said = [] if content is None else [*content, "\n\n"]
        listed = [f"\n{_json(tool)}" for tool in self.tools]
        return self.turn("system", [*said, _TOOLS, *listed, *_CALLS])

    def turns(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        roles = [message.role for message in messages]
        for message, before, after in zip(messages, [None, *roles], [*roles[1:], None]):
            if message.role == "tool":
                pieces += [] if before == "tool" else [START, "user"]
                pieces += ["\n", RESPONSE, "\n", *message.content, "\n", RESPONDED]
                pieces += [] if after == "tool" else [END, "\n"]
            elif message.role == "assistant":
                pieces += self.turn(message.role, self._answer(message))
            else:
                pieces += self.turn(message.role, message.content)
        return pieces

    def _answer(self, message: Message) -> list[Piece]:
        pieces: list[Piece] = list(message.content)
        if self.thinking and THOUGHT in pieces:
            last = len(pieces) - pieces[::-1].index(THOUGHT)
            pieces = pieces[last:]
            if pieces and isinstance(pieces[0], str):
                pieces[0] = pieces[0].lstrip("\n")
        # Only the Thinking models' template joins the parts before it looks whether there are any.
        apart = any(pieces) if self.thinking else bool(message.content)
        for call in message.calls:
            arguments = call["arguments"]
            text = arguments if isinstance(arguments, str) else _json(arguments)
            pieces += ["\n"] if apart else []
            pieces += [CALL, f'\n{{"name": "{call["name"]}", "arguments": {text}}}\n', CALLED]
            apart = True
        return pieces

    def answer_head(self) -> list[Piece]:
        return [*super().answer_head(), *([THINK, "\n"] if self.thinking else [])]


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # ValueError: it contains itself
        raise QvlError(f"a tool or its arguments are no JSON ({error}); found {value!r:.60}") from None
