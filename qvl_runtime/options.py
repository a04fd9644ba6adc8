"""Validation of request options. Errors name the option and the remedy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec, TypedDict, TypeVar

import numpy as np

from qvl_runtime.engine.constraints import AtLeast, Form
from qvl_runtime.engine.scheduler import MAX_BATCH
from qvl_runtime.errors import QvlError, excerpt
from qvl_runtime.inputs.prompt import Window
from qvl_runtime.inputs.tools import Tools

ANSWER_SHARE = 8
"""Reserve up to window / 8 tokens for the answer of a chat."""

BLOCK_SHARE = 4
"""On overflow leave out at least window / 4 tokens of history, so that later prompts still share a prefix."""

P = ParamSpec("P")
R = TypeVar("R")

OTHER_NAMES = {
    "max_tokens": ("max_new_tokens", ""),
    "max_length": ("max_new_tokens", ""),
    "do_sample": ("temperature", " (0 is greedy)"),
    "image": ("images", ", a list"),
    "picture": ("images", ", a list"),
    "stop_words": ("stop", ""),
    "stop_strings": ("stop", ""),
    "num_return_sequences": ("n", ""),
    "form": ("constraint", ""),
    "max_completion_tokens": ("max_new_tokens", ""),
    "min_tokens": ("min_new_tokens", ""),
    "messages": ("prompt", ""),
    "response_format": ("constraint", ""),
}
"""Names that other libraries use, and an older one: the option that is meant, and a note on it."""


class AnswerOptions(TypedDict, total=False):
    """The options of `Model.generate` besides `n`, for the type checker: its result depends on `n`."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    constraint: Form | None
    tools: Tools | Sequence[Mapping[str, Any]] | None
    logprobs: int | None
    speculate: bool
    allow_paths: bool
    allow_urls: bool
    cache_salt: str | None


def named_options(function: Callable[P, R]) -> Callable[P, R]:
    """Raise a QvlError for an unknown option, with the name that was probably meant."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        for name in options:
            if name not in parameters:
                raise QvlError(f"{function.__name__}() has no option {name!r}; {_meant(name, parameters)}")
        return function(*args, **options)

    return checked


def _meant(name: str, parameters: Collection[str]) -> str:
    """Return the remedy for an unknown option."""
    import difflib  # only an error needs it

    option, note = OTHER_NAMES.get(name, ("", ""))
    if option in parameters:
        return f"use {option}{note}"
    close = difflib.get_close_matches(name, parameters, 1)
    return f"use {close[0]}" if close else "see its help"


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """Check that `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise QvlError(f"{name} is {excerpt(repr(value))}; expected a whole number")
    if value < least:
        raise QvlError(f"{name} is {excerpt(value)}; expected {least} or more")
    return int(value)


def batch_size(value: Any) -> int:
    """Check that `max_batch` is a number of answers that are computed together."""
    if whole_number("max_batch", value, 1) > MAX_BATCH:
        raise QvlError(f"max_batch is {value}; at most {MAX_BATCH} answers are computed together")
    return int(value)


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """Return `stop` as a list of strings."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, Sequence) or not all(isinstance(text, str) for text in stops):
        raise QvlError(f"stop is {excerpt(repr(stop))}; expected a str or a list of str")
    return list(stops)


def given(value: Any, default: Any) -> Any:
    """Return `value`, or `default` if it is None."""
    return default if value is None else value


def salt(value: Any) -> str | None:
    """Check that `cache_salt` is a str or None."""
    if value is not None and not isinstance(value, str):
        raise QvlError(f"cache_salt is {excerpt(repr(value))}; expected a str")
    return value


def one_constraint(constraint: Form | None, min_new_tokens: int = 0) -> Form | None:
    """Return the constraint of an answer."""
    if whole_number("min_new_tokens", min_new_tokens):
        if constraint is not None:
            raise QvlError("min_new_tokens and constraint may contradict each other; give one of them")
        return AtLeast(min_new_tokens)
    if constraint is None:
        return None
    if isinstance(constraint, type):
        name, is_schema = constraint.__name__, hasattr(constraint, "model_json_schema")
        hint = f"qvl.JsonSchema({name}.model_json_schema())" if is_schema else f"an object, {name}(...)"
        raise QvlError(f"constraint is the class {name}; pass {hint}")
    if not callable(getattr(constraint, "start", None)):
        raise QvlError(
            f"constraint is {excerpt(repr(constraint))}; "
            "expected qvl.Regex(...), qvl.JsonSchema(...) or qvl.Grounding()"
        )
    return constraint


def chat_window(
    window: int, own_history: int, answer: int, history: int | None = None, block: int | None = None
) -> Window:
    """Return the rule for leaving out turns of a history.

    Parameters
    ----------
    window : int
        Tokens of the model's window.
    own_history : int
        Tokens of history in the model's generation config.
    answer : int
        Largest number of tokens of the answer.
    history, block : int, optional
        `max_window_size` and `block` of `Model.chat`.
    """
    if block is not None:
        whole_number("block", block, 1)
    tokens = window - min(answer, window // ANSWER_SHARE)
    if history is not None:
        return Window(whole_number("max_window_size", history), tokens, 1 if block is None else block)
    own_block = max(1, min(own_history, window) // BLOCK_SHARE)
    return Window(own_history, tokens, own_block if block is None else block)
