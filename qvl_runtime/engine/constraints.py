"""Answers of a given form: which tokens may come next, whatever the sampling.

A `Form` says what an answer must look like; `Form.start` gives the `Constraint` that watches over one answer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.tokenizer import Tokenizer


class Constraint(Protocol):
    """Watches over one answer."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next: bool ``[vocab_size]``. Stop tokens are among them where the answer may end."""

    def advance(self, token: int) -> None:
        """Note that `token`, which was allowed, is the next one."""


class Form(Protocol):
    """What an answer must look like."""

    def start(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        """Begin an answer of at most `limit` tokens to a prompt that left `opened` open (see `boxes.opened_box`)."""


def mask(logits: np.ndarray, constraint: Constraint) -> np.ndarray:
    """Logits with -inf wherever `constraint` does not allow the token."""
    return np.where(constraint.allowed(), logits, np.float32(-np.inf))


@dataclasses.dataclass(frozen=True)
class Grounding:
    """``<ref>…</ref><box>(x1,y1),(x2,y2)</box>``, once or more, always complete.

    Corners are 0..999 with x1 < x2 and y1 < y2. Every ref is closed in time for its box, so `max_new_tokens` must
    leave room for one.
    """

    def start(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        if tokenizer.box_start_id is None:
            raise QvlError("this model has no box tokens; grounding needs a Qwen-VL model")
        return _GroundingConstraint(tokenizer, stop_ids, limit, opened)


@dataclasses.dataclass(frozen=True)
class Regex:
    """Text that matches a regular expression as a whole (Rust's `regex` syntax, without look-around)."""

    pattern: str

    def start(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        return _GrammarConstraint(tokenizer, stop_ids, "regex", self.pattern)


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """A JSON document that fits a JSON schema, given as a dict or as text.

    A schema without bounds (strings of any length) may be cut off by `max_new_tokens`; the answer's finish_reason is
    then "length".
    """

    schema: Mapping[str, Any] | str

    def start(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        schema = self.schema if isinstance(self.schema, str) else json.dumps(self.schema)
        return _GrammarConstraint(tokenizer, stop_ids, "json_schema", schema)


CORNERS = "(999,999),(999,999)"
"""The longest content of a box; no token is shorter than one of its characters."""


def box_can_become(text: str) -> bool:
    """Whether `text` begins the content of a box: "(x1,y1),(x2,y2)" with 0 <= x1 < x2 <= 999 and so for y.

    Examples
    --------
    >>> box_can_become("(12,7),(12"), box_can_become("(12,7),(13"), box_can_become("(12,7),(1")
    (False, True, True)
    """
    corners: list[int] = []
    for before in ("(", ",", "),(", ","):
        if len(text) <= len(before):
            return before.startswith(text)
        if not text.startswith(before):
            return False
        text = text.removeprefix(before)
        digits = text[: len(text) - len(text.lstrip("0123456789"))]
        text = text.removeprefix(digits)
        low, high = (0, 998) if len(corners) < 2 else (corners[len(corners) - 2] + 1, 999)
        if not text:
            return _number_can_become(digits, low, high)
        if not digits or str(int(digits)) != digits or not low <= int(digits) <= high:
            return False
        corners.append(int(digits))
    return text == ")"


def _number_can_become(digits: str, low: int, high: int) -> bool:
    if not digits:
        return True
    if digits.startswith("0"):
        return digits == "0" and low == 0
    value = int(digits)
    spans = ((value * 10**more, (value + 1) * 10**more - 1) for more in range(3))
    return any(first <= high and last >= low for first, last in spans)


class _GroundingConstraint:
    """A small automaton over tokens: where it is, and what stands in the box so far."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str):
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._left, self._corners = limit, ""
        self._state = "begin"
        if opened:
            self._state, self._corners = "box", opened.rpartition("<box>")[2]
            if not box_can_become(self._corners):
                raise QvlError(f"the prompt opens the box {self._corners!r}, which no box completes; end it with <box>")
        needed = self._cost() if opened else self._cost() + 1
        if limit < needed:
            raise QvlError(f"max_new_tokens is {limit}; a box with its ref needs {needed}")

    def _cost(self) -> int:
        """Tokens that finish what is open, at worst: ref, its end, box, corners, its end."""
        box = len(CORNERS) - len(self._corners) + 1
        return box if self._state == "box" else box + {"begin": 3, "ref": 2, "text": 2, "after ref": 1}[self._state]

    def allowed(self) -> np.ndarray:
        ids, tokens = self._tokenizer, np.zeros(self._tokenizer.vocab_size, bool)
        if self._state == "begin":
            tokens[ids.ref_start_id] = True
        elif self._state in ("ref", "text"):
            tokens[ids.ref_end_id] = self._state == "text"
            if self._state == "ref" or self._left > self._cost():
                tokens |= _texts(ids)
        elif self._state == "after ref":
            tokens[ids.box_start_id] = True
        elif self._state == "box":
            for token, text in _corner_tokens(ids):
                tokens[token] = box_can_become(self._corners + text)
            tokens[ids.box_end_id] = self._corners.endswith(")") and self._corners.count(")") == 2
        else:
            tokens[list(self._stop_ids)] = True
            tokens[ids.ref_start_id] = self._left > len(CORNERS) + 4
        return tokens

    def advance(self, token: int) -> None:
        ids = self._tokenizer
        self._left -= 1
        following = {
            ids.ref_start_id: "ref",
            ids.ref_end_id: "after ref",
            ids.box_start_id: "box",
            ids.box_end_id: "after box",
        }
        if token in following:
            self._state, self._corners = following[token], ""
        elif self._state == "box":
            self._corners += ids.token_bytes(token).decode()
        elif self._state == "ref":
            self._state = "text"


@functools.lru_cache(maxsize=4)
def _texts(tokenizer: Tokenizer) -> np.ndarray:
    """Ordinary tokens that cannot be taken for a part of a tag."""
    ordinary = range(tokenizer.eod_id)
    plain = [b"<" not in tokenizer.token_bytes(token) for token in ordinary]
    return np.array(plain + [False] * (tokenizer.vocab_size - len(plain)))


@functools.lru_cache(maxsize=4)
def _corner_tokens(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Ordinary tokens of which a box's content may be made."""
    pairs = ((token, tokenizer.token_bytes(token)) for token in range(tokenizer.eod_id))
    return [(token, text.decode()) for token, text in pairs if text and not text.translate(None, b"0123456789(),")]


class _GrammarConstraint:
    """A grammar, matched by llguidance."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], kind: str, grammar: str):
        import llguidance

        matcher = llguidance.LLMatcher
        try:
            if kind == "regex":
                built = matcher.grammar_from_regex(grammar)
            else:
                # Free whitespace would let an undecided model go on for ever between two fields.
                built = matcher.grammar_from_json_schema(grammar, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise QvlError(f"the {kind} cannot be used: {_one_line(error)}") from None
        problem = matcher.validate_grammar(built)
        if problem:
            raise QvlError(f"the {kind} cannot be used: {_one_line(problem)}")
        self._matcher = matcher(_ll_tokenizer(tokenizer), built, log_level=0)
        self._stop_ids, self._size = stop_ids, tokenizer.vocab_size
        self._mask()
        if self._matcher.is_error():
            raise QvlError(f"the {kind} cannot be used: no text matches it")

    def _mask(self) -> np.ndarray:
        """Tokens that the grammar allows next: bool ``[vocab_size]``; none if it is stopped."""
        words = np.zeros(-(-self._size // 32), np.int32)
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return np.unpackbits(words.view(np.uint8), bitorder="little")[: self._size].astype(bool)

    def allowed(self) -> np.ndarray:
        tokens = self._mask()
        if self._matcher.is_error():
            raise QvlError(f"the grammar cannot go on here: {_one_line(self._matcher.get_error())[:200]}")
        tokens[list(self._stop_ids)] = self._matcher.is_accepting() or self._matcher.is_stopped()
        return tokens

    def advance(self, token: int) -> None:
        if token not in self._stop_ids and not self._matcher.consume_token(token):
            raise QvlError(f"token {token} does not fit the grammar: {_one_line(self._matcher.get_error())}")


@functools.lru_cache(maxsize=4)
def _ll_tokenizer(tokenizer: Tokenizer) -> Any:
    from llguidance.tiktoken import lltokenizer_from_encoding

    return lltokenizer_from_encoding(tokenizer.encoding, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eod_id)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
