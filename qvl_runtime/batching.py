"""Answering many requests concurrently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import QvlError, excerpt
from qvl_runtime.options import whole_number
from qvl_runtime.results import Stream

if TYPE_CHECKING:
    from qvl_runtime.request_methods import RequestMethods

SEEDS = 1 << 64
"""Number of seeds of OpenAI's API."""

ANSWERS = 128
"""Largest number of answers to one prompt, as in OpenAI's API. All of them are begun at once."""


def answer_all(
    model: RequestMethods,
    requests: Iterable[Mapping[str, Any]],
    max_batch: int,
    on_result: Callable[[int, Any], None] | None,
) -> list[Any]:
    """See `RequestMethods.generate_batch`."""
    results: dict[int, Any] = {}
    if not isinstance(requests, Iterable) or isinstance(requests, str | Mapping):
        raise QvlError(f"requests is {excerpt(repr(requests))}; expected dicts of options, one for each answer")
    running: dict[int, Request] = {}
    ended: SimpleQueue[int] = SimpleQueue()

    def finish(index: int, result: Any) -> None:
        results[index] = result
        if on_result is not None:
            on_result(index, result)

    try:
        for index, options in enumerate(requests):
            while len(running) >= max_batch:
                _collect(running, ended, finish)
            try:
                running[index] = Request(model, index, options, ended)
            except QvlError as error:
                finish(index, error)
        while running:
            _collect(running, ended, finish)
    finally:
        for request in running.values():
            request.cancel()
    return [results[index] for index in sorted(results)]


def _collect(running: dict[int, Request], ended: SimpleQueue[int], finish: Callable[[int, Any], None]) -> None:
    """Wait until a request ends, and report its result."""
    index = ended.get()
    if not running[index].last_ended():
        return
    try:
        result = running[index].result()
    except QvlError as error:
        result = error
    del running[index]
    finish(index, result)


class Request:
    """One request: its stream, or the streams of its `n` answers.

    Parameters
    ----------
    model : RequestMethods
    index : int
        Number of the request, for errors and `ended`.
    given : mapping
        Options of `generate`, or of `stream_chat` if there is a "query".
    ended : queue
        Receives `index` for each stream that ends.

    Raises
    ------
    QvlError
        For an invalid option.
    """

    def __init__(self, model: RequestMethods, index: int, given: Mapping[str, Any], ended: SimpleQueue[int]):
        if not isinstance(given, Mapping):
            raise QvlError(f"request {index} is {excerpt(repr(given))}; expected a dict of options")
        options = dict(given)
        self._several = "query" not in options and options.get("n") is not None
        self.streams: list[Stream] = []
        try:
            if "query" in options:
                self.streams.append(model.stream_chat(**options))
            else:
                self.streams += [model.stream(**one) for one in one_each(options)]
        except BaseException as error:
            self.cancel()
            if isinstance(error, TypeError):
                raise QvlError(f"request {index} cannot be read: {error}") from None
            raise
        self._left = len(self.streams)
        for stream in self.streams:
            stream.when_ended(lambda: ended.put(index))

    def last_ended(self) -> bool:
        """Count one ended stream; return whether it was the last."""
        self._left -= 1
        return self._left == 0

    def result(self) -> Any:
        """Return the result as `generate` or `chat` does."""
        results = [stream.result() for stream in self.streams]
        return results if self._several else results[0]

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()


def one_each(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Expand the options of `Model.generate` to those of `Model.stream`, one set for each of `n` answers.

    Seed 0 follows the seed 2**64 - 1, which is -1 in OpenAI's API.

    Raises
    ------
    QvlError
        For an invalid `n` or seed.
    """
    n, seed = options.pop("n", None), options.pop("seed", None)
    first = seed if seed is None else whole_number("seed", seed)
    count = 1 if n is None else whole_number("n", n, 1)
    if count > ANSWERS:
        raise QvlError(f"n is {excerpt(count)}; a request has at most {ANSWERS} answers, so make several")
    for i in range(count):
        yield {**options, "seed": None if first is None else _after(first, i)}


def _after(first: int, i: int) -> int:
    seed = first + i
    return seed - SEEDS if first < SEEDS <= seed else seed
