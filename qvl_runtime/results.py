"""What a model gives back: a stream of pieces, and the whole answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from qvl_runtime.boxes import Box
from qvl_runtime.engine.generation import Logprob, Piece, Timings
from qvl_runtime.engine.job import Job


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer.

    Attributes
    ----------
    text : str
        As generated, with its tags, without the reasoning.
    token_ids : list of int
        Of reasoning and text, without the token that ended it.
    finish_reason : str
        "stop" or "length".
    boxes : list of Box
        All well-formed boxes of the text.
    prompt_tokens : int
    timings : Timings
    logprobs : list of Logprob
        One for each of `token_ids` where they were asked for, else empty.
    reasoning : str
        What the model thought before it answered, stripped; empty for a model that does not.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    boxes: list[Box]
    prompt_tokens: int
    timings: Timings
    logprobs: list[Logprob] = dataclasses.field(default_factory=list)
    reasoning: str = ""


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
        Turns of the history, from the oldest on, which the window had no room for and the model did not see.
    """

    history: list[tuple[Any, str | None]] = dataclasses.field(default_factory=list)
    left_out: int = 0


class Stream(Iterator[Piece]):
    """The pieces of an answer as they are computed, and afterwards the whole of it.

    The engine computes it whether or not somebody reads. Several threads may use one, and `cancel` it. Closing it, or
    letting go of it, ends the answer.
    """

    def __init__(self, job: Job, finish: Callable[[list[Piece]], Result]):
        self._job, self._finish = job, finish

    def __next__(self) -> Piece:
        return next(self._job)

    def result(self) -> Any:
        """The whole answer; waits for what is left of it. A `Result`, or for a chat's turn a `ChatResult`.

        Raises
        ------
        QvlError
            When the answer was cancelled.
        """
        return self._finish(self._job.join())

    def when_ended(self, tell: Callable[[], object]) -> None:
        """Call something once the answer has ended, in the engine's thread, or at once if it has. It must not wait."""
        self._job.when_ended(tell)

    def cancel(self) -> None:
        """End the answer: no further piece comes, and at the next slice what it takes is freed.

        Any thread may call it at any time.
        """
        self._job.cancel()

    close = __del__ = cancel


def collected(pieces: list[Piece], boxes: Callable[[str], list[Box]]) -> Result:
    """All pieces of an answer as one; `boxes` finds those of its text."""
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
    )
