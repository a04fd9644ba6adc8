"""The prefix cache: keys and values of earlier prompts and answers, reused by a prompt that begins alike."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qvl_kernels.locks import make_lock
from qvl_kernels.ops import Array
from qvl_runtime.engine import kv_file
from qvl_runtime.engine.decoder import FEW_ROWS, Decoder, DecodeStep, Features, Outcome, Span
from qvl_runtime.engine.sequence import PAGE, SequenceState
from qvl_runtime.inputs.prompt import Key, Prompt, Slot
from qvl_runtime.trace import Trace, no_trace

PREFILL_ROWS = 512
"""Tokens of a prompt computed at a time: enough to keep the products busy, few enough to bound memory."""

WORTH_COPYING = 16
"""Positions that another session must have more than the best idle one, for copying them to pay."""


class Leave(NamedTuple):
    """What a computation may do before it yields again.

    Attributes
    ----------
    rows : int
        Tokens of a prompt.
    check : Trace
        Called after each layer; what it raises ends the computation.
    """

    rows: int = PREFILL_ROWS
    check: Trace = no_trace


class Slice(NamedTuple):
    """What a computation that wants to go on yields: a part of a prompt or of a picture is next.

    Attributes
    ----------
    picture : bool
    left : int
        Tokens that are still to be computed, about.
    behind : tuple or None
        A session, and the length it must have first: what it computes is of use here.
    """

    picture: bool
    left: int
    behind: tuple[Session, int] | None = None

    @property
    def ready(self) -> bool:
        """Whether it may go on."""
        return self.behind is None or not self.behind[0].busy or self.behind[0].length >= self.behind[1]


Turns = Generator[Slice, Leave | None, None]
"""A computation in slices."""


def slice_end(first: int, length: int, rows: int) -> int:
    """Where the slice of a prompt of `length` tokens ends that begins at `first` and has about `rows` tokens.

    Slices end at multiples of `rows`, and none has `FEW_ROWS` tokens or fewer unless no more are left in all: a few
    may be computed otherwise than many, and how a prompt is cut must not show in its answer.
    """
    end = (first // rows + 1) * rows
    if end - first <= FEW_ROWS:
        end += rows
    return length if length - end <= FEW_ROWS else end


class Session:
    """One cached sequence, and what is to be fed to it.

    Positions are described by their `Key`, so that a prompt finds what it shares with an earlier one even if a
    picture's path changed, and never takes another picture's features for its own. Keys are noted before a position
    counts as filled: an error or an interrupt at any point leaves a session that is merely shorter.

    Attributes
    ----------
    state : SequenceState
    salt : str or None
        Whose prompts it is for.
    busy : bool
        Whether an answer has it.
    pending : tuple of int
        Tokens that the next step feeds.
    spare : int
        Further tokens, at most, that the next step has room for.
    """

    def __init__(self, decoder: Decoder, dtype: str, capacity: int, salt: str | None = None):
        self.decoder, self.salt = decoder, salt
        self.state: SequenceState = decoder.sequence(dtype, capacity)
        self.busy, self.pending, self.spare = False, tuple[int, ...](), FEW_ROWS - 1
        self._keys: list[Key] = []  # those from `length` on mean nothing
        self._prompt: Sequence[Key] = ()
        # The length of the last prompt, and the logits after it, for another answer to the same prompt.
        self._prompted: int | None = None
        self._prompt_logits = decoder.ops.empty((1, decoder.vocab_size))
        self._prompt_best = decoder.ops.empty((1,), np.int32)
        self._outcome, self._row = Outcome(decoder.ops, self._prompt_logits, self._prompt_best), 0

    @property
    def length(self) -> int:
        """Positions filled."""
        return self.state.length

    @property
    def room(self) -> int:
        """Positions left in the model's window."""
        return self.state.window - self.state.length

    def shared(self, keys: Sequence[Key]) -> int:
        """How many of the first positions of a prompt are those of this session."""
        return _alike(self._keys[: self.length], keys)

    def will_share(self, keys: Sequence[Key], alpha: int) -> int:
        """How many it will have in common once its own prompt is computed."""
        return _alike(self._prompt, keys) if self.state.rotary.alpha == alpha else 0

    def keep(self, prompt: Prompt) -> int:
        """Forget what a prompt does not share; returns how many of its positions need no computing.

        All of them only if the logits after exactly this prompt are known: it is asked again, or for another answer.
        None if the prompt's length asks for another scaling of the rotary base. Where a few tokens are computed
        otherwise than many, more than a few are left to compute, as there are without a cache.
        """
        keys = self._prompt = prompt.keys
        self.state.begin(len(keys), prompt.slots)
        kept = self.shared(keys)
        if self._prompted is not None and self._prompted > kept:
            self._prompted = None
        if kept == len(keys) and self._prompted != kept:
            kept -= 1
        if self.decoder.coarse and kept < len(keys):
            kept = max(0, min(kept, len(keys) - FEW_ROWS - 1)) if len(keys) > FEW_ROWS else kept
        self.truncate(kept)
        return kept

    def copy(self, other: Session, count: int, capacity: int) -> None:
        """Become a copy of the first `count` positions of another session."""
        self.truncate(0)
        self._prompted = None
        self.state.take_over(other.state, count, capacity)
        self._keys = other._keys[:count]
        if other._prompted == count:
            self.decoder.ops.copy(other._prompt_logits, self._prompt_logits)
            self._prompted = count

    def prefill(self, prompt: Prompt, features: Sequence[tuple[Slot, Array]], capacity: int) -> Turns:
        """Compute what `keep` left of a prompt; afterwards row 0 of `logits` is for the token that follows.

        Parameters
        ----------
        prompt : Prompt
        features : sequence of (Slot, Array)
            Of the prompt's pictures. Those whose positions are all kept may be left out.
        capacity : int
            Positions to make room for: prompt and answer.
        """
        ids, keys, ops = prompt.ids, prompt.keys, self.decoder.ops
        self._outcome, self._row = Outcome(ops, self._prompt_logits, self._prompt_best), 0
        if self._prompted == len(ids):
            ops.argmax(self._prompt_logits, out=self._prompt_best)
            return
        self._prompted = None
        work: Any = None
        size = 0
        while self.length < len(ids):
            leave = (yield Slice(False, len(ids) - self.length)) or Leave()
            self.state.reserve(capacity)
            first = self.length
            chunk = ids[first : slice_end(first, len(ids), leave.rows)]
            if len(chunk) > size:
                work, size = self.decoder.workspace(len(chunk)), len(chunk)
            rows = work.rows(len(chunk))
            self.decoder.embed(ops.upload(np.asarray(chunk, np.int32)), rows.x)
            pictures = [Features(slot.start - first, slot.picture.tokens, values) for slot, values in features]
            self.decoder.forward(rows, [Span(self.state, len(chunk))], pictures, leave.check)
            self._keys[first:] = keys[first : first + len(chunk)]
            self.state.advance(len(chunk))
        self.decoder.logits(rows.x[len(chunk) - 1 : len(chunk)], self._prompt_logits)
        ops.argmax(self._prompt_logits, out=self._prompt_best)
        self._prompted = len(ids)

    def feed(self, *tokens: int) -> None:
        """Append tokens at the next step; then row i of `logits` is for the token that follows ``tokens[i]``."""
        self._keys[self.length :] = tokens
        self.pending = tokens

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.state.truncate(length)

    def logits(self, row: int) -> np.ndarray:
        """float32 ``[vocab]``."""
        return self._outcome.logits(self._row + row)

    def best(self, row: int) -> int:
        """The token with the highest logit; -1 where one is not finite."""
        return self._outcome.best(self._row + row)

    def save(self, path: str | os.PathLike, length: int, identity: str) -> None:
        """Write the first `length` positions to a file; see `kv_file.write`."""
        kv_file.write(path, self.state, self._keys[:length], identity)

    def resume(self, found: kv_file.SavedKV) -> None:
        """Continue a saved session; see `kv_file.SavedKV.restore`."""
        found.restore(self.state)
        self._keys, self._prompted = list(found.keys), None

    def fed(self, outcome: Outcome, row: int) -> None:
        """Note what a step has given, from a row of it on."""
        self.pending, self._outcome, self._row = (), outcome, row


def step(run: DecodeStep, sessions: Sequence[Session]) -> None:
    """Feed their pending tokens to sessions, `FEW_ROWS` in all at most."""
    outcome, row = run([(session.state, session.pending) for session in sessions]), 0
    for session in sessions:
        count = len(session.pending)
        session.fed(outcome, row)
        row += count


def _pays(count: int, own: int, length: int) -> bool:
    """Whether to copy `count` positions where `own` are there already, of a prompt of `length` tokens."""
    return count >= own + WORTH_COPYING or own < count == length


def _alike(a: Sequence[Key], b: Sequence[Key]) -> int:
    """How many of the first keys are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Sessions:
    """The sessions of one model: each answer takes one, and puts it back when it ends.

    An answer that begins while another is not finished gets a session of its own.

    Parameters
    ----------
    limit : int
        Sessions that are kept when nobody uses them, the latest. 0 keeps nothing between calls.
    """

    def __init__(self, decoder: Decoder, dtype: str, limit: int):
        self.decoder, self._dtype, self._limit = decoder, dtype, limit
        self._idle: list[Session] = []
        self._busy: list[Session] = []
        self._lock = make_lock()

    def page_bytes(self) -> int:
        """Bytes of the keys and values of `PAGE` positions, in which memory is taken."""
        return self.decoder.sequence(self._dtype, PAGE).store.nbytes

    def begin(
        self, prompt: Prompt, capacity: int, salt: str | None = None
    ) -> Generator[Slice, Leave | None, tuple[Session, int]]:
        """The session for a prompt, and how many positions of the prompt it has.

        If another answer's session is going to have far more of the prompt than any idle one, that is waited for, and
        copied.
        """
        keys = prompt.keys
        while True:
            with self._lock:
                own = [session for session in self._idle if session.salt == salt]
                idle = max((session.shared(keys) for session in own), default=0)
                found = self._neighbour(keys, salt)
            if found is None or found[0].length >= found[1] or not _pays(found[1], idle, len(keys)):
                break
            yield Slice(False, len(keys), found)
        session = self.take(keys, capacity, salt)
        try:
            if found is not None and _pays(found[1], session.shared(keys), len(keys)):
                session.copy(*found, capacity)
            return session, session.keep(prompt)
        except BaseException:
            self.give(session)
            raise

    def _neighbour(self, keys: Sequence[Key], salt: str | None) -> tuple[Session, int] | None:
        """The busy session that will share most with a prompt, and how much."""
        own = [session for session in self._busy if session.salt == salt]
        if not own:
            return None
        alpha = own[0].state.rotary.scaling(len(keys))
        return max(((session, session.will_share(keys, alpha)) for session in own), key=lambda found: found[1])

    def take(self, keys: Sequence[Key], capacity: int, salt: str | None = None) -> Session:
        """The idle session of this salt that shares most with a prompt, or a new one.

        One whose greater part the prompt would throw away goes on waiting for its own conversation as long as
        there may be another.
        """
        with self._lock:
            own = [session for session in self._idle if session.salt == salt]
            best = max(own, key=lambda session: session.shared(keys), default=None)
            if best is None or 2 * best.shared(keys) < best.length:
                best = self._idle[0] if self._idle and len(self._idle) >= self._limit else None
            if best is not None:
                self._idle.remove(best)
        if best is None:
            best = Session(self.decoder, self._dtype, capacity, salt)
        elif best.salt != salt:
            best.truncate(0)
            best.salt = salt
        best.busy = True
        with self._lock:
            self._busy.append(best)
        return best

    def give(self, session: Session) -> None:
        """Put a session back."""
        with self._lock:
            session.busy = False
            if session in self._busy:
                self._busy.remove(session)
            self._idle.append(session)
            del self._idle[: max(0, len(self._idle) - self._limit)]

    def save(self, path: str | os.PathLike, keys: Sequence[Key], identity: str) -> int:
        """Write what the idle sessions know of a prompt to a file; returns how many positions (0: no file)."""
        with self._lock:
            own = [session for session in self._idle if session.salt is None]
            session = max(own, key=lambda session: session.shared(keys), default=None)
            length = 0 if session is None else session.shared(keys)
            if session is None or not length:
                return 0
            self._idle.remove(session)
        try:
            session.save(path, length, identity)
        finally:
            self.give(session)
        return length

    def load(self, path: str | os.PathLike, identity: str) -> int:
        """Make a session of what `save` wrote; returns how many positions it has: none where nothing is kept."""
        found = kv_file.read(path, identity)
        if not self._limit:
            return 0
        session = Session(self.decoder, self._dtype, len(found.keys))
        session.resume(found)
        self.give(session)
        return len(found.keys)

    def release(self) -> None:
        """Forget the sessions of answers that are computed in another process."""
        self._busy.clear()

    def clear(self) -> None:
        """Let go of all sessions that nobody uses, and their memory."""
        with self._lock:
            self._idle.clear()
