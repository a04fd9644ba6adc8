"""Results of a model: a stream of pieces, and whole answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from qvl_runtime.boxes import Box
from qvl_runtime.engine.generation import Logprob, Piece, Timings
from qvl_runtime.engine.job import Job
from qvl_runtime.inputs.tools import ToolCall


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer.

    Attributes
    ----------
    text : str
        The generated text with its tags, without the reasoning.
    token_ids : list of int
        Tokens of reasoning and text, without the stop token.
    finish_reason : str
        "stop" or "length".
    boxes : list of Box
        All well-formed boxes of the text.
    prompt_tokens : int
    timings : Timings
    logprobs : list of Logprob
        One for each of `token_ids` if requested, else empty.
    reasoning : str
        Reasoning before the answer, stripped; empty for a model without reasoning.
    reasoning_tokens : int
        How many of `token_ids`, from the first on, are the reasoning's.
    tool_calls : list of ToolCall
        All well-formed calls of the text, if the request has tools.
    stop_string : str or None
        The string of `stop` that ended the answer.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    boxes: list[Box]
    prompt_tokens: int
    timings: Timings
    logprobs: list[Logprob] = dataclasses.field(default_factory=list)
    reasoning: str = ""
    reasoning_tokens: int = 0
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)
    stop_string: str | None = None


@dataclasses.dataclass(frozen=True)
class ChatResult(Result):
    """An answer in a chat.

    Attributes
    ----------
    text : str
        Stripped.
    history : list of (query, answer)
        The conversation with this turn.
    left_out : int
        Number of turns, from the oldest on, that did not fit the window and were not part of the prompt.
    """

    history: list[tuple[Any, str | None]] = dataclasses.field(default_factory=list)
    left_out: int = 0


R = TypeVar("R", bound=Result)


class Stream(Iterator[Piece], Generic[R]):
    """The pieces of an answer as they are computed, and the whole answer at the end, a `Result` or a `ChatResult`.

    The engine computes the answer whether or not the stream is read. A stream is thread-safe. Closing or deleting it
    cancels the answer.
    """

    def __init__(self, job: Job, finish: Callable[[list[Piece]], R]):
        self._job, self._finish = job, finish

    def __next__(self) -> Piece:
        return next(self._job)

    def result(self) -> R:
        """Wait for the end and return the whole answer.

        Raises
        ------
        QvlError
            If the answer was cancelled.
        """
        return self._finish(self._job.join())

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the answer ends, in the engine's thread; at once if it has ended. It must not block.

        An exception from it is logged and changes no answer; if it is called at once, it is raised here.
        """
        self._job.when_ended(callback)

    def cancel(self) -> None:
        """Cancel the answer: there are no further pieces, and its memory is freed at the next slice.

        Thread-safe.
        """
        self._job.cancel()

    close = cancel

    def __del__(self) -> None:
        if hasattr(self, "_job"):  # an interrupt may prevent that it is set
            self.cancel()


def collected(
    pieces: list[Piece], boxes: Callable[[str], list[Box]], calls: Callable[[str], list[ToolCall]] | None = None
) -> Result:
    """Join the pieces of an answer; `boxes` and `calls` parse the boxes and the calls of tools in its text."""
    text, last = "".join(piece.text for piece in pieces if not piece.reasoning), pieces[-1]
    assert last.finish_reason is not None and last.timings is not None
    return Result(
        text=text,
        token_ids=[token for piece in pieces for token in piece.token_ids],
        finish_reason=last.finish_reason,
        boxes=boxes(text),
        prompt_tokens=last.timings.prompt_tokens,
        timings=last.timings,
        logprobs=[entry for piece in pieces for entry in piece.logprobs],
        reasoning="".join(piece.text for piece in pieces if piece.reasoning).strip(),
        reasoning_tokens=sum(len(piece.token_ids) for piece in pieces if piece.reasoning),
        tool_calls=[] if calls is None else calls(text),
        stop_string=last.stop_string,
    )
