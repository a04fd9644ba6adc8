"""Generation: select tokens from logits, and turn them into pieces of text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qvl_runtime.engine.constraints import Constraint, mask
from qvl_runtime.engine.drafts import PromptLookup
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.engine.session import Session
from qvl_runtime.inputs.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass
class Timings:
    """Times and counts of an answer.

    Attributes
    ----------
    image, prefill, decode : float
        Seconds.
    prompt_tokens, cached_tokens : int
        Tokens of the prompt, and how many of them were in the prefix cache.
    images, cached_images : int
        Pictures of the prompt, and how many of them were not encoded again.
    new_tokens : int
        Tokens of the answer.
    draft_tokens, accepted_drafts : int
        See `qvl_runtime.engine.drafts`.
    """

    image: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    images: int = 0
    cached_images: int = 0
    new_tokens: int = 0
    draft_tokens: int = 0
    accepted_drafts: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of the tokens that were computed."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill if self.prefill else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of the tokens after the first, which the prefill computes."""
        return (self.new_tokens - 1) / self.decode if self.decode and self.new_tokens > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Logprob:
    """The log probability of a token.

    Attributes
    ----------
    token_id : int
    logprob : float
        Natural logarithm of the probability.
    top : list of (int, float)
        The most likely tokens and their log probabilities, in descending order.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Choice(NamedTuple):
    """A selected token of an answer."""

    token: int
    logprob: Logprob | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """An item of a stream: some text and its tokens.

    Attributes
    ----------
    text : str
        Whole characters.
    token_ids : tuple of int
    finish_reason : str or None
        "stop" or "length" in the last piece.
    timings : Timings or None
        Those of the whole answer, in the last piece.
    logprobs : tuple of Logprob
        One for each of `token_ids` if requested, else empty.
    reasoning : bool
        Whether the text is reasoning, which comes before the answer.
    stop_string : str or None
        The stop string that ended the answer, in the last piece.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    timings: Timings | None = None
    logprobs: tuple[Logprob, ...] = ()
    reasoning: bool = False
    stop_string: str | None = None


@dataclasses.dataclass
class TokenSelector:
    """Selects the tokens of one answer: constraint, then sampler, then log probabilities.

    Parameters
    ----------
    sampler : Sampler
    tokens : list of int
        The prompt; every selected token is appended.
    constraint : Constraint, optional
    logprobs : int, optional
        Compute the log probability of every token, with this many alternatives.
    """

    sampler: Sampler
    tokens: list[int]
    constraint: Constraint | None = None
    logprobs: int | None = None

    def __call__(self, session: Session, row: int) -> Choice:
        """Select a token from a row of a session's logits.

        Raises
        ------
        QvlError
            If a logit is not finite.
        """
        # Greedy selection does not download the logits. If it fails (-1), the sampler reports why.
        greedy = self.sampler.is_argmax and self.constraint is None and self.logprobs is None
        if greedy and (best := session.best(row)) >= 0:
            choice = Choice(best)
        else:
            logits = session.logits(row)
            possible = logits if self.constraint is None else mask(logits, self.constraint)
            token = self.sampler(possible, self.tokens)
            choice = Choice(token, None if self.logprobs is None else logprob(logits, token, self.logprobs))
        if self.constraint is not None:
            self.constraint.advance(choice.token)
        self.tokens.append(choice.token)
        return choice


def logprob(logits: np.ndarray, token: int, alternatives: int) -> Logprob:
    """Compute the log probability of a token, and those of the most likely tokens.

    They are those of the raw logits, before constraint, penalties, temperature and truncation.
    """
    shifted = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum(dtype=np.float64))
    count = min(alternatives, logits.size)
    likely = np.argpartition(-shifted, count - 1)[:count] if count else np.empty(0, int)
    likely = likely[np.lexsort((likely, -shifted[likely]))]
    return Logprob(token, float(shifted[token]), [(int(i), float(shifted[i])) for i in likely])


def generate_step(
    session: Session, select: TokenSelector, drafts: PromptLookup | None, limit: int, timings: Timings
) -> Iterator[Choice | Session]:
    """Generate up to `limit` tokens from a prefilled session. When it yields the session, a step must feed it next.

    With `drafts` several tokens are computed in one step; rejected drafts are discarded.
    """
    draft: list[int] = []
    row = 0
    for made in range(1, limit + 1):
        choice = select(session, row)
        yield choice
        if made == limit:
            return
        if drafts is not None:
            drafts.append(choice.token)
        if row < len(draft) and draft[row] == choice.token:
            row += 1
            timings.accepted_drafts += 1
            continue
        if drafts is not None:
            if draft:
                session.truncate(session.length - len(draft) + row)
                drafts.learn(len(draft), row)
            most = min(session.room - 1, limit - made - 1, session.spare)
            draft = drafts.draft(most, session.beside)
            timings.draft_tokens += len(draft)
        row = 0
        session.feed(choice.token, *draft)
        yield session


def stream_generate(
    choices: Iterator[Choice | Session],
    tokenizer: Tokenizer,
    *,
    stop_ids: frozenset[int],
    stop: Sequence[str],
    timings: Timings,
    reasoning_end: int | None = None,
) -> Iterator[Piece | Session]:
    """Turn tokens into pieces of text, until a stop token, a stop string, or the end of `choices`.

    Sessions in `choices` are passed on.

    With `reasoning_end` the answer begins with reasoning, up to that token. Stop strings apply after it, and line ends
    that follow it are dropped.
    """
    decoder, watch = StreamDecoder(tokenizer), StopStrings(stop)
    started = time.perf_counter()
    reason, pending = "length", []
    reasoning = leading = reasoning_end is not None
    for choice in choices:
        if not isinstance(choice, Choice):
            yield choice
            continue
        if choice.token in stop_ids:
            reason = "stop"
            break
        timings.new_tokens += 1
        pending.append(choice)
        if reasoning:
            ended = choice.token == reasoning_end
            text = decoder.finish() if ended else decoder.push(choice.token)
            if text or ended:
                yield _piece(text, pending, reasoning=True)
                pending = []
            if ended:
                reasoning, decoder = False, StreamDecoder(tokenizer)
            continue
        text = decoder.push(choice.token)
        if leading:
            text = text.lstrip("\n")
            leading = not text
        text = watch.push(text)
        if watch.found is not None:
            yield _piece(text, pending)
            pending = []
            break
        if text:
            yield _piece(text, pending)
            pending = []
    timings.decode = time.perf_counter() - started
    rest = "" if watch.found is not None else watch.push(decoder.finish()) + watch.flush()
    if watch.found is not None:  # it may be in what is left of a character
        reason = "stop"
    last = _piece(rest, pending, reasoning)
    yield dataclasses.replace(last, finish_reason=reason, timings=timings, stop_string=watch.found)


def _piece(text: str, choices: Sequence[Choice], reasoning: bool = False) -> Piece:
    logprobs = tuple([choice.logprob for choice in choices if choice.logprob is not None])
    return Piece(text, tuple([choice.token for choice in choices]), logprobs=logprobs, reasoning=reasoning)


def overlap(text: str, form: str) -> int:
    """Return how many characters at the end of a text may begin `form`, which is longer."""
    return next((n for n in range(min(len(form) - 1, len(text)), 0, -1) if text.endswith(form[:n])), 0)


class StopStrings:
    """Ends a stream of text before the first stop string, which may arrive in parts.

    Attributes
    ----------
    found : str or None
        The stop string that ended the text.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that cannot be part of a stop string."""
        if not self.stops:
            return text
        self.held += text
        # The string that is complete first ends the text, so the result does not depend on the parts.
        spans = [(i + len(stop), i, stop) for stop in self.stops if (i := self.held.find(stop)) >= 0]
        if spans:
            _, begin, self.found = min(spans)
            return self._release(begin)
        return self._release(len(self.held) - max((overlap(self.held, stop) for stop in self.stops), default=0))

    def _release(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        return text

    def flush(self) -> str:
        """Return the held text at the end of the stream."""
        return "" if self.found is not None else self._release(len(self.held))
