"""Chat completions and completions in OpenAI's format, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from qvl_runtime.engine.generation import Logprob
from qvl_runtime.inputs.tokenizer import StreamDecoder, Tokenizer
from qvl_runtime.inputs.tools import CallReader
from qvl_runtime.openai.answers import Part, Whole
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.openai.requests import Asked
from qvl_runtime.openai.tools import CallWriter
from qvl_runtime.results import Result


class Reply(Protocol):
    """The response to one request: a body, or the events of a stream.

    Attributes
    ----------
    tail : bytes
        What follows the last event of a stream.
    """

    tail: bytes

    def body(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """Return the body of a response that is no stream."""

    def begin(self) -> list[dict[str, Any]]:
        """Return the first events of a stream."""

    def part(self, part: Part) -> list[dict[str, Any]]:
        """Return the events of a piece of an answer."""

    def complete(self, whole: Whole) -> list[dict[str, Any]]:
        """Return the events of an answer's end."""

    def end(self, answers: Sequence[Whole]) -> list[dict[str, Any]]:
        """Return the last events of a stream."""

    def failed(self, problem: ApiError) -> list[dict[str, Any]]:
        """Return the last events of a stream that fails."""


class ChoiceFormat(Protocol):
    """The format of the choices of one request."""

    def head(self, index: int) -> dict[str, Any] | None:
        """Return the choice of a chunk before the text, or None."""

    def part(self, part: Part) -> dict[str, Any] | None:
        """Return the choice of a chunk with a piece of text; None if it is empty."""

    def ends(self, whole: Whole) -> list[dict[str, Any]]:
        """Return the choices of the last chunks of an answer."""

    def whole(self, whole: Whole) -> dict[str, Any]:
        """Return the choice of a complete answer."""


class Envelope:
    """The object around choices.

    Parameters
    ----------
    kind, prefix : str
        OpenAI's name of the object, and the prefix of its id.
    model : str
        Name of the model for clients.
    """

    def __init__(self, kind: str, prefix: str, model: str):
        self._fields = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self._fields["model"] = model

    def around(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return the object with these choices."""
        return {**self._fields, "choices": list(choices), **more}


def usage(answers: Sequence[Whole]) -> dict[str, Any]:
    """Return the token counts of a request; the prompt counts once."""
    prompt = answers[0].result.prompt_tokens
    completion = sum(answer.result.timings.new_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answers[0].result.timings.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.result.reasoning_tokens for answer in answers)},
    }


def token_logprobs(tokenizer: Tokenizer, logprobs: Sequence[Logprob]) -> list[dict[str, Any]]:
    """Return the log probabilities of tokens, and of their alternatives."""

    def described(token: int, logprob: float) -> dict[str, Any]:
        content = tokenizer.token_bytes(token)
        return {"token": content.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(content)}

    return [
        described(entry.token_id, entry.logprob) | {"top_logprobs": [described(*top) for top in entry.top]}
        for entry in logprobs
    ]


class Choices:
    """Choices of a format in their envelopes: `Reply`.

    Parameters
    ----------
    form : ChoiceFormat
    asked : Asked
    model : str
        Name of the model for clients.
    kind, chunk, prefix : str
        OpenAI's name of the object, that of a stream's, and the prefix of its id.
    """

    tail = b"data: [DONE]\n\n"

    def __init__(self, form: ChoiceFormat, asked: Asked, model: str, *, kind: str, chunk: str, prefix: str):
        self._form, self._asked = form, asked
        self._whole, self._chunk = Envelope(kind, prefix, model), Envelope(chunk, prefix, model)

    def body(self, answers: Sequence[Whole]) -> dict[str, Any]:
        return self._whole.around([self._form.whole(answer) for answer in answers], usage=usage(answers))

    def begin(self) -> list[dict[str, Any]]:
        return self._chunks([self._form.head(index) for index in range(self._asked.n)])

    def part(self, part: Part) -> list[dict[str, Any]]:
        return self._chunks([self._form.part(part)])

    def complete(self, whole: Whole) -> list[dict[str, Any]]:
        return self._chunks(self._form.ends(whole))

    def end(self, answers: Sequence[Whole]) -> list[dict[str, Any]]:
        return [self._chunk.around([], usage=usage(answers))] if self._asked.usage else []

    def failed(self, problem: ApiError) -> list[dict[str, Any]]:
        return [problem.body()]

    def _chunks(self, choices: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
        more = {"usage": None} if self._asked.usage else {}
        return [self._chunk.around([choice], **more) for choice in choices if choice]


class ChatFormat:
    """Chat completions: `ChoiceFormat`.

    Parameters
    ----------
    tokenizer : Tokenizer
    logprobs : bool
        Whether to write the log probabilities of the tokens.
    reader : callable, optional
        Creates the reader of an answer's calls, if the request has tools.
    call_id : str
        Prefix of the ids of calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        logprobs: bool,
        reader: Callable[[], CallReader] | None = None,
        call_id: str = "call",
    ):
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._reader, self._call_id = reader, call_id
        self._writers: dict[int, CallWriter] = {}

    def head(self, index: int) -> dict[str, Any]:
        return _chat_chunk(index, {"role": "assistant", "content": ""})

    def part(self, part: Part) -> dict[str, Any] | None:
        if part.piece.reasoning:
            delta = {"reasoning_content": part.piece.text}
        else:
            delta = self._writer(part.index).push(part.piece.text)
        if not part.piece.logprobs and not any(delta.values()):
            return None
        return _chat_chunk(part.index, delta, self._tokens(part.piece.logprobs))

    def ends(self, whole: Whole) -> list[dict[str, Any]]:
        rest = self._writer(whole.index).finish()
        boxes = {"boxes": whole.boxes}
        chunks = [_chat_chunk(whole.index, delta) for delta in (rest, boxes) if any(delta.values())]
        return [*chunks, _chat_chunk(whole.index, {}) | {"finish_reason": _reason(whole.result)}]

    def whole(self, whole: Whole) -> dict[str, Any]:
        writer = self._writer(whole.index)
        said, rest = writer.push(whole.result.text), writer.finish()
        calls = [*said.get("tool_calls", ()), *rest.get("tool_calls", ())]
        content = said["content"] + rest["content"]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
            "boxes": whole.boxes,
        }
        if calls:
            message["tool_calls"] = [{key: call[key] for key in call if key != "index"} for call in calls]
        if whole.result.reasoning:
            message["reasoning_content"] = whole.result.reasoning
        return {
            "index": whole.index,
            "message": message,
            "logprobs": self._tokens(whole.result.logprobs),
            "finish_reason": _reason(whole.result),
        }

    def _writer(self, index: int) -> CallWriter:
        if index not in self._writers:
            reader = None if self._reader is None else self._reader()
            self._writers[index] = CallWriter(reader, f"{self._call_id}_{index}_")
        return self._writers[index]

    def _tokens(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": token_logprobs(self._tokenizer, logprobs), "refusal": None}


def _reason(result: Result) -> str:
    return "tool_calls" if result.finish_reason == "stop" and result.tool_calls else result.finish_reason


def _chat_chunk(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class TextFormat:
    """Completions: `ChoiceFormat`.

    Parameters
    ----------
    tokenizer : Tokenizer
    logprobs : bool
        Whether to write the log probabilities of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._written: dict[int, tuple[StreamDecoder, int]] = {}

    def head(self, index: int) -> None:
        return None

    def part(self, part: Part) -> dict[str, Any] | None:
        if not part.piece.text and not part.piece.logprobs:
            return None
        return self._choice(part.index, part.piece.text, part.piece.logprobs)

    def ends(self, whole: Whole) -> list[dict[str, Any]]:
        return [self._choice(whole.index, "", ()) | {"finish_reason": whole.result.finish_reason}]

    def whole(self, whole: Whole) -> dict[str, Any]:
        choice = self._choice(whole.index, whole.result.text, whole.result.logprobs)
        return choice | {"finish_reason": whole.result.finish_reason}

    def _choice(self, index: int, text: str, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        written = self._tokens(index, logprobs) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": written, "finish_reason": None}

    def _tokens(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        # A character may span tokens: the text of each alone is longer than that of all.
        decoder, written = self._written.get(index) or (StreamDecoder(self._tokenizer), 0)
        offsets = []
        for entry in logprobs:
            offsets.append(written)
            written += len(decoder.push(entry.token_id))
        self._written[index] = decoder, written
        return {
            "tokens": [self._text(entry.token_id) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{self._text(token): value for token, value in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")
