"""The chat template of Qwen3-VL, in code: tools, and the reasoning of the Thinking models."""

from __future__ import annotations

import dataclasses
import json
import reprlib
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
        Whether answers begin with reasoning, up to ``</think>``. That of earlier answers is omitted, except between
        the last question and the result of a tool: there the answer is not finished.
    tools : sequence of mapping
        JSON schemas of functions that the model may call.
    """

    thinking: bool = False
    tools: Sequence[Mapping[str, Any]] = ()

    ROLES = ("system", "user", "assistant", "tool")
    DEFAULT_SYSTEM = None
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
        questions = [i for i, role in enumerate(roles) if role == "user"]
        asked = questions[-1] if questions and roles[-1] == "tool" else len(roles)
        for i, (message, before, after) in enumerate(zip(messages, [None, *roles], [*roles[1:], None])):
            if message.role == "tool":
                pieces += [] if before == "tool" else [START, "user"]
                pieces += ["\n", RESPONSE, "\n", *message.content, "\n", RESPONDED]
                pieces += [] if after == "tool" else [END, "\n"]
            elif message.role == "assistant":
                pieces += self.turn(message.role, self._answer(message, reasons=i > asked))
            else:  # a later message of the system as Qwen3's own template has it; that of Qwen3-VL would omit it
                pieces += self.turn(message.role, message.content)
        return pieces

    def _answer(self, message: Message, *, reasons: bool) -> list[Piece]:
        """Render an answer and its calls of tools; `reasons` keeps its reasoning."""
        pieces: list[Piece] = list(message.content)
        reasoning: list[Piece] = []
        if self.thinking and message.reasoning is not None:
            reasoning = [message.reasoning.strip("\n")]
            pieces = _trimmed(pieces) if reasons else pieces
        elif self.thinking and THOUGHT in pieces:
            first, last = pieces.index(THOUGHT), len(pieces) - pieces[::-1].index(THOUGHT)
            begin = first - pieces[first::-1].index(THINK) + 1 if THINK in pieces[:first] else 0
            reasoning, pieces = _trimmed(pieces[begin:first], end=True), _trimmed(pieces[last:])
        # Only the Thinking models' template joins the parts before it looks whether there are any.
        apart = any(pieces) if self.thinking else bool(message.content)
        for call in message.calls:
            arguments = call["arguments"]
            text = arguments if isinstance(arguments, str) else _json(arguments)
            pieces += ["\n"] if apart else []
            pieces += [CALL, f'\n{{"name": "{call["name"]}", "arguments": {text}}}\n', CALLED]
            apart = True
        return [THINK, "\n", *reasoning, "\n", THOUGHT, "\n\n", *pieces] if reasons and any(reasoning) else pieces

    def answer_head(self) -> list[Piece]:
        return [*super().answer_head(), *([THINK, "\n"] if self.thinking else [])]


def _trimmed(pieces: list[Piece], *, end: bool = False) -> list[Piece]:
    """Remove the newlines at the beginning, and at the end if asked for; both are texts, not special tokens."""
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip("\n")
    if end and pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip("\n")
    return pieces


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # it contains itself, or is too deep
        raise QvlError(f"a tool or its arguments are no JSON ({error}); found {reprlib.repr(value):.60}") from None
