"""Responses in the format of ``/v1/responses``, whole or as events.

A response is a list of items, one behind the other: the reasoning, texts, and calls. Each has its events.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from qvl_runtime.engine.generation import Logprob
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.inputs.tools import CallReader, ToolCall
from qvl_runtime.openai.answers import Part, Whole
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.openai.formats import token_logprobs
from qvl_runtime.openai.response_requests import ResponseAsked
from qvl_runtime.results import Result

Event = dict[str, Any]

REASONING, MESSAGE = "reasoning", "message"
PREFIXES = {REASONING: "rs", MESSAGE: "msg"}
"""Prefixes of the ids of items that are text."""
TEXT_EVENTS = {REASONING: "response.reasoning_text", MESSAGE: "response.output_text"}


class ResponseReply:
    """A response: `Reply`.

    Parameters
    ----------
    asked : ResponseAsked
    tokenizer : Tokenizer
    model : str
        Name of the model for clients.
    reader : callable, optional
        Creates the reader of the answer's calls, if the request has tools.
    number : str
        Part of all ids.
    created : int
        Time in seconds since 1970.
    """

    tail = b""

    def __init__(
        self,
        asked: ResponseAsked,
        tokenizer: Tokenizer,
        model: str,
        reader: Callable[[], CallReader] | None,
        number: str,
        created: int,
    ):
        self._fields = {"id": f"resp_{number}", "object": "response", "created_at": created, "model": model}
        self._echo, self._logprobs = asked.echo, asked.logprobs is not None
        self._tokenizer, self._number = tokenizer, number
        self._reader = None if reader is None else reader()
        self._items: list[dict[str, Any]] = []
        self._open: _Text | None = None
        self._entries: list[Logprob] = []
        self._events = 0

    def body(self, answers: Sequence[Whole]) -> dict[str, Any]:
        result = answers[0].result
        if result.reasoning:
            self._write(REASONING, result.reasoning, ())
        self._read(result.text, result.logprobs[result.reasoning_tokens :])
        self.complete(answers[0])
        return self._ended(result)

    def begin(self) -> list[Event]:
        response = self._response("in_progress")
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def part(self, part: Part) -> list[Event]:
        piece = part.piece
        if piece.reasoning:
            return self._write(REASONING, piece.text, ())
        return self._read(piece.text, piece.logprobs)

    def complete(self, whole: Whole) -> list[Event]:
        events = [] if self._reader is None else self._said(self._reader.finish())
        cut = whole.result.finish_reason == "length"
        if not self._items or (not cut and self._items[-1]["type"] == REASONING):
            events += self._write(MESSAGE, "", self._entries)  # an answer without any text
        if self._open is not None and self._open.kind == MESSAGE:
            self._open.boxes = whole.boxes
        return events + self._close("incomplete" if cut else "completed")

    def end(self, answers: Sequence[Whole]) -> list[Event]:
        response = self._ended(answers[0].result)
        return [self._event(f"response.{response['status']}", response=response)]

    def failed(self, problem: ApiError) -> list[Event]:
        error = problem.body()["error"]
        told = {"code": error["code"] or error["type"], "message": error["message"]}
        events = self._close("incomplete")
        return [*events, self._event("response.failed", response=self._response("failed", error=told))]

    def _read(self, text: str, logprobs: Sequence[Logprob]) -> list[Event]:
        """Write text of an answer, which may have calls."""
        self._entries += logprobs
        return self._said([text] if self._reader is None else self._reader.push(text))

    def _said(self, items: Sequence[str | ToolCall]) -> list[Event]:
        events = []
        for item in items:
            if isinstance(item, ToolCall):
                events += self._close("completed") + self._call(item)
            elif item or (self._open is not None and self._open.kind == MESSAGE):
                events += self._write(MESSAGE, item, self._entries)
            else:
                continue  # the log probabilities are given with the text that they become
            self._entries = []
        return events

    def _write(self, kind: str, text: str, logprobs: Sequence[Logprob]) -> list[Event]:
        """Add text to the open item of this kind, or to a new one."""
        events = []
        if self._open is None or self._open.kind != kind:
            events += self._close("completed")
            self._open = _Text(kind, f"{PREFIXES[kind]}_{self._number}_{len(self._items)}", len(self._items))
            self._items.append(self._open.item("in_progress", []))
            events += [
                self._event("response.output_item.added", output_index=self._open.index, item=self._items[-1]),
                self._event("response.content_part.added", **self._open.place, part=self._open.part()),
            ]
        entries = token_logprobs(self._tokenizer, logprobs) if self._logprobs else []
        self._open.texts.append(text)
        self._open.logprobs += entries
        if text or entries:
            more = {"logprobs": entries} if kind == MESSAGE else {}
            events.append(self._event(f"{TEXT_EVENTS[kind]}.delta", **self._open.place, delta=text, **more))
        return events

    def _close(self, status: str) -> list[Event]:
        """End the open item, if there is one."""
        if self._open is None:
            return []
        ended, self._open = self._open, None
        part, place = ended.part(), ended.place
        self._items[-1] = ended.item(status, [part])
        more = {"logprobs": part["logprobs"]} if ended.kind == MESSAGE else {}
        return [
            self._event(f"{TEXT_EVENTS[ended.kind]}.done", **place, text=part["text"], **more),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=ended.index, item=self._items[-1]),
        ]

    def _call(self, call: ToolCall) -> list[Event]:
        index, arguments = len(self._items), json.dumps(call.arguments, ensure_ascii=False)
        name = f"{self._number}_{index}"
        item = {"id": f"fc_{name}", "type": "function_call", "call_id": f"call_{name}", "name": call.name}
        whole = {**item, "arguments": arguments, "status": "completed"}
        self._items.append(whole)
        place = {"output_index": index, "item_id": item["id"]}
        begun = {**item, "arguments": "", "status": "in_progress"}
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=call.name, arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=whole),
        ]

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._events = self._events, self._events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _ended(self, result: Result) -> dict[str, Any]:
        """Return the response after the last item."""
        timings = result.timings
        usage = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": timings.cached_tokens},
            "output_tokens": timings.new_tokens,
            "output_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
            "total_tokens": result.prompt_tokens + timings.new_tokens,
        }
        if result.finish_reason == "length":
            return self._response("incomplete", usage=usage, incomplete_details={"reason": "max_output_tokens"})
        return self._response("completed", usage=usage)

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        empty = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._fields, "status": status, **empty, "output": list(self._items), **self._echo, **more}


class _Text:
    """An item that is text, while it is written."""

    def __init__(self, kind: str, name: str, index: int):
        self.kind, self.index, self._name = kind, index, name
        self.place = {"item_id": name, "output_index": index, "content_index": 0}
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.boxes: list[dict[str, Any]] = []

    def part(self) -> dict[str, Any]:
        """Return its only part as it is now."""
        text = "".join(self.texts)
        if self.kind == REASONING:
            return {"type": "reasoning_text", "text": text}
        more = {"annotations": [], "logprobs": list(self.logprobs), "boxes": self.boxes}
        return {"type": "output_text", "text": text, **more}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the item."""
        more: dict[str, Any] = {"summary": []} if self.kind == REASONING else {"role": "assistant"}
        return {"id": self._name, "type": self.kind, "status": status, **more, "content": content}
