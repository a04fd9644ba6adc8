"""Constrained answers: masks over the next token, independent of sampling.

A `Form` describes the allowed answers. `Form.start` returns the `Constraint`, the state for one answer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from qvl_runtime.engine.schema_references import has_end
from qvl_runtime.engine.schemas import check_schema
from qvl_runtime.errors import QvlError, excerpt
from qvl_runtime.inputs.tokenizer import Tokenizer

NOTATION: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "json_allowed_escapes": 'nrbtf\\"',
}
"""How JSON is written, whatever a schema's "x-guidance" says. With free whitespace a model could emit blanks between
two fields forever. With numeric escapes it could write a property's name in another way, and then any value."""


class Constraint(Protocol):
    """The state of a constraint for one answer."""

    def allowed(self) -> np.ndarray:
        """Return the tokens that may follow: bool ``[vocab_size]``, including stop tokens if the answer may end."""

    def advance(self, token: int) -> None:
        """Append `token`, which was allowed."""


class Answer(NamedTuple):
    """What a constraint needs to know of an answer.

    Attributes
    ----------
    tokenizer : Tokenizer
    stop_ids : frozenset of int
    limit : int
        Largest number of tokens.
    opened : str
        An incomplete box at the end of the prompt, which the answer completes.
    grounding : callable
        ``grounding(tokenizer, stop_ids, limit, opened)``: the family's constraint for boxes.
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    limit: int
    opened: str
    grounding: Callable[[Tokenizer, frozenset[int], int, str], Constraint]


class Form(Protocol):
    """A description of the allowed answers."""

    def start(self, answer: Answer) -> Constraint:
        """Create the constraint of one answer."""


def mask(logits: np.ndarray, constraint: Constraint) -> np.ndarray:
    """Return the logits with -inf for every token that `constraint` does not allow."""
    return np.where(constraint.allowed(), logits, np.float32(-np.inf))


@dataclasses.dataclass(frozen=True)
class Grounding:
    """One or more phrases with boxes, in the model's own notation, always complete."""

    def start(self, answer: Answer) -> Constraint:
        return answer.grounding(answer.tokenizer, answer.stop_ids, answer.limit, answer.opened)


@dataclasses.dataclass(frozen=True)
class Regex:
    """Text that fully matches a regular expression.

    Parameters
    ----------
    pattern : str
        In the syntax of Rust's `regex`, without look-around. One that cannot be used is an error of the request.
    """

    pattern: str

    def start(self, answer: Answer) -> Constraint:
        return _GrammarConstraint(answer, "regex", _built("regex", self.pattern))


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """A JSON document that matches a JSON schema.

    If the schema allows unbounded values, `max_new_tokens` may truncate the document; `finish_reason` is then "length".

    Parameters
    ----------
    schema : mapping or str
        The schema, or its text. One that cannot be used is an error of the request.
    """

    schema: Mapping[str, Any] | str

    def text(self) -> str:
        """Return the schema as JSON of an object.

        Raises
        ------
        QvlError
            If it is no JSON, or llguidance would not compute it rightly or in time.
        """
        try:
            schema = self.schema if isinstance(self.schema, str) else json.dumps(self.schema)
        except (TypeError, ValueError, RecursionError) as error:  # no JSON, or one that contains itself, or is too deep
            raise QvlError(f"the json_schema cannot be used: {excerpt(error)}; correct it") from None
        check_schema(schema)  # before llguidance, which some schemas crash
        return {"true": "{}", "false": '{"enum": []}'}.get(schema.strip(), schema)  # llguidance takes objects alone

    def start(self, answer: Answer) -> Constraint:
        return _GrammarConstraint(answer, "json_schema", schema_grammar(self.text()))


def schema_grammar(text: str) -> str:
    """Return llguidance's form of a schema that `JsonSchema.text` returned.

    Raises
    ------
    QvlError
        If it cannot be used.
    """
    built = _built("json_schema", text)
    if not has_end(json.loads(text)):
        reason = "no text matches it, its required parts have no end"
        raise QvlError(f"the json_schema cannot be used: {reason}; require less")
    return built


@dataclasses.dataclass(frozen=True)
class Lark:
    """Text that matches a grammar in llguidance's Lark syntax; `kind` names it in errors."""

    grammar: str
    kind: str

    def start(self, answer: Answer) -> Constraint:
        return _GrammarConstraint(answer, self.kind, _built(self.kind, self.grammar))


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Text of at least `tokens` tokens: no stop token is allowed before."""

    tokens: int

    def start(self, answer: Answer) -> Constraint:
        return _LengthConstraint(answer.tokenizer.vocab_size, answer.stop_ids, self.tokens)


class _LengthConstraint:
    def __init__(self, vocab_size: int, stop_ids: frozenset[int], tokens: int):
        self._all, self._left = np.ones(vocab_size, bool), tokens
        self._unfinished = self._all.copy()
        self._unfinished[list(stop_ids)] = False

    def allowed(self) -> np.ndarray:
        return self._unfinished if self._left > 0 else self._all

    def advance(self, token: int) -> None:
        self._left -= 1


class ReasoningFirst:
    """Allows reasoning at the start of an answer, then applies another constraint.

    Parameters
    ----------
    constraint : Constraint
    end : int
        The token that ends the reasoning.
    stop_ids : frozenset of int
        Tokens that end an answer; not allowed within the reasoning.
    limit : int
        Largest number of reasoning tokens, including `end`.
    """

    def __init__(self, constraint: Constraint, end: int, stop_ids: frozenset[int], limit: int):
        self._constraint, self._end, self._stop_ids, self._left = constraint, end, stop_ids, limit
        self._reasoning = True

    @functools.cached_property
    def _shape(self) -> tuple[int, ...]:
        return self._constraint.allowed().shape

    def allowed(self) -> np.ndarray:
        if not self._reasoning:
            return self._constraint.allowed()
        tokens = np.full(self._shape, self._left > 1)
        tokens[list(self._stop_ids)] = False
        tokens[self._end] = True
        return tokens

    def advance(self, token: int) -> None:
        if not self._reasoning:
            self._constraint.advance(token)
            return
        self._left -= 1
        self._reasoning = token != self._end


class _GrammarConstraint:
    """A grammar, evaluated by llguidance."""

    def __init__(self, answer: Answer, kind: str, grammar: str):
        import llguidance

        self._matcher = llguidance.LLMatcher(_ll_tokenizer(answer.tokenizer), grammar, log_level=0)
        self._kind, self._stop_ids, self._size = kind, answer.stop_ids, answer.tokenizer.vocab_size
        self._mask()
        if self._matcher.is_error():
            if not self._matcher.get_error().startswith("NoExtension"):
                raise self._too_large()
            raise QvlError(f"the {kind} cannot be used: no text matches it; allow at least one")

    def _mask(self) -> np.ndarray:
        """Return the tokens that the grammar allows next: bool ``[vocab_size]``; none if it has stopped."""
        words = np.zeros(-(-self._size // 32), np.int32)
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return np.unpackbits(words.view(np.uint8), bitorder="little")[: self._size].astype(bool)

    def allowed(self) -> np.ndarray:
        tokens = self._mask()
        if self._matcher.is_error():
            raise self._too_large()
        tokens[list(self._stop_ids)] = self._matcher.is_accepting() or self._matcher.is_stopped()
        return tokens

    def advance(self, token: int) -> None:
        if token not in self._stop_ids and not self._matcher.consume_token(token):
            raise self._too_large()

    def _too_large(self) -> QvlError:
        """Return the error of a grammar that reached a limit of llguidance, without the state that it adds."""
        reason = excerpt(self._matcher.get_error().partition("<state>")[0])
        return QvlError(f"the {self._kind} is too large ({reason:.100}); repeat less in it, or shorter parts")


def _built(kind: str, grammar: str) -> str:
    """Return a "regex", a "json_schema", or else Lark, in llguidance's form.

    Raises
    ------
    QvlError
        If llguidance does not take it.
    """
    import llguidance

    matcher = llguidance.LLMatcher
    try:
        if kind == "regex":
            built = matcher.grammar_from_regex(grammar)
        elif kind == "json_schema":
            built = matcher.grammar_from_json_schema(grammar, overrides=NOTATION)
        else:
            built = matcher.grammar_from_lark(grammar)
        problem = matcher.validate_grammar(built)
    except BaseException as error:  # a panic of llguidance is no Exception
        if not isinstance(error, TypeError | ValueError) and type(error).__name__ != "PanicException":
            raise
        raise QvlError(f"the {kind} cannot be used: {excerpt(error)}; correct it") from None
    if problem:
        raise QvlError(f"the {kind} cannot be used: {excerpt(problem)}; correct it")
    return built


@functools.lru_cache(maxsize=4)
def _ll_tokenizer(tokenizer: Tokenizer) -> Any:
    from llguidance.tiktoken import lltokenizer_from_encoding

    return lltokenizer_from_encoding(tokenizer.encoding, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eod_id)
