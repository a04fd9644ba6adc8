"""Messages in the format of ``/v1/messages``, whole or as events.

A message is a list of blocks, one behind the other: the reasoning, texts, and calls. Each has its events.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from qvl_runtime.anthropic.errors import error_body
from qvl_runtime.inputs.tools import CallReader, ToolCall
from qvl_runtime.openai.answers import Part, Whole
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.results import Result

Event = dict[str, Any]

THINKING, TEXT = "thinking", "text"
"""Types of blocks that are written piece by piece, and their fields with the text."""
EMPTY = {
    THINKING: {"type": THINKING, "thinking": "", "signature": ""},
    TEXT: {"type": TEXT, "text": ""},
}


class MessageReply:
    """A message: `Reply`.

    Parameters
    ----------
    model : str
        Name of the model for clients.
    reader : callable, optional
        Creates the reader of the answer's calls, if the request has tools.
    number : str
        Part of all ids.
    """

    tail = b""

    def __init__(self, model: str, reader: Callable[[], CallReader] | None, number: str):
        self._head = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": model}
        self._number = number
        self._reader = None if reader is None else reader()
        self._blocks: list[dict[str, Any]] = []
        self._open = False
        self._texts: list[str] = []
        self._spaces = ""

    def body(self, answers: Sequence[Whole]) -> dict[str, Any]:
        whole = answers[0]
        self._think(whole.result.reasoning)
        self._read(whole.result.text)
        self.complete(whole)
        return {**self._head, "content": self._blocks, **_end(whole), "usage": _usage(whole.result)}

    def begin(self) -> list[Event]:
        # The tokens of the prompt are counted later: they are in the last event but one.
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _counts(0, 0, 0)}
        return [{"type": "message_start", "message": {**self._head, **empty}}]

    def part(self, part: Part) -> list[Event]:
        return self._think(part.piece.text) if part.piece.reasoning else self._read(part.piece.text)

    def complete(self, whole: Whole) -> list[Event]:
        events = [] if self._reader is None else self._said(self._reader.finish())
        cut = whole.result.finish_reason == "length"
        if not self._blocks or (not cut and self._blocks[-1]["type"] == THINKING):
            events += self._write(TEXT, "")  # an answer without any text
        return events + self._close()

    def end(self, answers: Sequence[Whole]) -> list[Event]:
        whole = answers[0]
        told = {"type": "message_delta", "delta": _end(whole), "usage": _usage(whole.result)}
        return [told, {"type": "message_stop"}]

    def failed(self, problem: ApiError) -> list[Event]:
        return [error_body(problem)]

    def _think(self, text: str) -> list[Event]:
        """Write reasoning without the blanks around it, as `Result.reasoning`."""
        text = self._spaces + text if self._open else text.lstrip()
        said = text.rstrip()
        self._spaces = text[len(said) :]
        return self._write(THINKING, said) if said else []

    def _read(self, text: str) -> list[Event]:
        """Write text of an answer, which may have calls."""
        return self._said([text] if self._reader is None else self._reader.push(text))

    def _said(self, items: Sequence[str | ToolCall]) -> list[Event]:
        events = []
        for item in items:
            if isinstance(item, ToolCall):
                events += self._call(item)
            elif item:
                events += self._write(TEXT, item)
        return events

    def _write(self, kind: str, text: str) -> list[Event]:
        """Add text to the open block of this kind, or to a new one."""
        events = []
        if not self._open or self._blocks[-1]["type"] != kind:
            events = [*self._close(), self._start(dict(EMPTY[kind]))]
        if text:
            self._texts.append(text)
            events.append(self._delta({"type": f"{kind}_delta", kind: text}))
        return events

    def _call(self, call: ToolCall) -> list[Event]:
        block = {"type": "tool_use", "id": f"toolu_{self._number}_{len(self._blocks)}", "name": call.name, "input": {}}
        events = [*self._close(), self._start(block)]
        written = json.dumps(call.arguments, ensure_ascii=False)
        self._blocks[-1]["input"] = call.arguments
        return [*events, self._delta({"type": "input_json_delta", "partial_json": written}), *self._close()]

    def _start(self, block: dict[str, Any]) -> Event:
        self._blocks.append(block)
        self._open = True
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[Event]:
        """End the open block, if there is one."""
        if not self._open:
            return []
        self._open, texts, block = False, self._texts, self._blocks[-1]
        if block["type"] in EMPTY:
            block[block["type"]], self._texts = "".join(texts), []
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]


def _end(whole: Whole) -> dict[str, Any]:
    """Return why an answer ended, and its boxes, which are not Anthropic's."""
    result, reason = whole.result, "end_turn"
    if result.finish_reason == "length":
        reason = "max_tokens"
    elif result.tool_calls:
        reason = "tool_use"
    elif result.stop_string is not None:
        reason = "stop_sequence"
    stop = result.stop_string if reason == "stop_sequence" else None
    return {"stop_reason": reason, "stop_sequence": stop, "boxes": whole.boxes}


def _usage(result: Result) -> dict[str, int]:
    return _counts(result.prompt_tokens, result.timings.cached_tokens, result.timings.new_tokens)


def _counts(prompt: int, cached: int, made: int) -> dict[str, int]:
    """Return the usage; Anthropic's `input_tokens` are those that were not in a cache."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": made,
    }
