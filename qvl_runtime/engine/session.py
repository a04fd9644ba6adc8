"""A session: the keys and values of one sequence, what they are of, and its next step."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from qvl_kernels.ops import FEW_ROWS, Array
from qvl_runtime.engine import kv_file
from qvl_runtime.engine.decoder import Decoder, DecodeStep, Outcome
from qvl_runtime.engine.prefill import Unread, compute_slices
from qvl_runtime.engine.sequence import SequenceState
from qvl_runtime.inputs.prompt import Key, Prompt, Slot
from qvl_runtime.trace import Trace, no_trace

PREFILL_ROWS = 512
"""Largest slice of a prompt in tokens: enough for efficient products, few enough to bound memory."""


class SliceLimits(NamedTuple):
    """The scheduler's limits for the next slice.

    Attributes
    ----------
    rows : int
        Largest number of prompt tokens.
    check : Trace
        Called after each layer; an exception from it ends the computation.
    """

    rows: int = PREFILL_ROWS
    check: Trace = no_trace


class Slice(NamedTuple):
    """A request for the next slice of a prompt or a picture.

    Attributes
    ----------
    picture : bool
    left : int
        Approximate number of tokens still to compute.
    behind : tuple or None
        Another session and the length it must reach first, because its prefix will be reused.
    prompt : Session or None
        The session whose prompt is to be computed; without one, nor a picture, it takes a session.
    """

    picture: bool
    left: int
    behind: tuple[Session, int] | None = None
    prompt: Session | None = None

    @property
    def ready(self) -> bool:
        """Whether the slice may be computed now."""
        return self.behind is None or not self.behind[0].busy or self.behind[0].length >= self.behind[1]

    @property
    def computes(self) -> bool:
        """Whether there is something to compute."""
        return self.picture or self.prompt is not None


T = TypeVar("T")

Sliced = Generator[Slice, SliceLimits | None, T]
"""A computation in slices; `T` is its result."""


class Session:
    """One cached sequence, and the tokens to feed next.

    Positions are compared by `Key`: pictures match by content, not by path. The key is stored before its position
    counts as filled, so that an error or an interrupt leaves a valid, shorter session.

    Attributes
    ----------
    state : SequenceState
    salt : str or None
        Partition of the prefix cache.
    busy : bool
        Whether an answer uses it.
    short_prompt : int
        If the decoder is `coarse`: length of the prompt of at most `FEW_ROWS` tokens that the session began with, whose
        positions have other arithmetic than those of a longer one; 0 if it began with a longer one.
    pending : tuple of int
        Tokens to feed in the next step.
    spare : int
        Rows of the next step that drafts may use.
    beside : int
        Other answers in the next step, about.
    unread : Unread or None
        The prompt that is being computed.
    """

    def __init__(self, decoder: Decoder, dtype: str, capacity: int, salt: str | None = None):
        self.decoder, self.salt = decoder, salt
        self.state: SequenceState = decoder.sequence(dtype, capacity)
        self.busy, self.short_prompt = False, 0
        self.pending, self.spare, self.beside = tuple[int, ...](), FEW_ROWS - 1, 0
        self.unread: Unread | None = None
        self._keys: list[Key] = []  # keys from `length` on are invalid
        self._prompt: Sequence[Key] = ()
        self._few_rows_end = 0  # positions before this one have the arithmetic of few rows, if `short_prompt`
        # Length of the last prompt, and the logits after it, for another answer to the same prompt.
        self._prompted: int | None = None
        self._prompt_logits = decoder.ops.empty((1, decoder.vocab_size))
        self._prompt_best = decoder.ops.empty((1,), np.int32)
        self._outcome, self._row = Outcome(decoder.ops, self._prompt_logits, self._prompt_best), 0

    @property
    def length(self) -> int:
        """Number of filled positions."""
        return self.state.length

    @property
    def room(self) -> int:
        """Number of positions left in the model's window."""
        return self.state.window - self.state.length

    def shared(self, keys: Sequence[Key]) -> int:
        """Return the length of the common prefix with a prompt, as far as the prompt may use it; see `keep`."""
        return self._usable(_common_prefix(self._keys[: self.length], keys), keys)

    def will_share(self, keys: Sequence[Key], alpha: int) -> int:
        """Return the length of the common prefix once this session's own prompt is computed."""
        fits = self.state.rotary.alpha == alpha and self._is_short(self._prompt) == self._is_short(keys)
        return self._usable(_common_prefix(self._prompt, keys), keys) if fits else 0

    def _usable(self, count: int, keys: Sequence[Key]) -> int:
        """Return how many of the first `count` positions, which are those of a prompt, it may use."""
        if self._is_short(keys):
            return min(count, self._few_rows_end)
        return count if count > self.short_prompt else 0

    def _is_short(self, keys: Sequence[Key]) -> bool:
        """Whether a prompt is computed with the arithmetic of few rows, and longer ones are not."""
        return self.decoder.coarse and len(keys) <= FEW_ROWS

    def keep(self, prompt: Prompt) -> int:
        """Truncate to the common prefix with a prompt; return the number of its positions that are cached.

        That is the whole prompt only if the logits after exactly this prompt are cached, and 0 if the prompt needs
        another scaling of the rotary base. If the decoder is `coarse`, all positions use the same arithmetic as without
        a cache, unless the prompt continues an earlier answer: those of a prompt of at most `FEW_ROWS` tokens are not
        kept for a longer one, nor the other way round, and of a longer one more than `FEW_ROWS` tokens remain to be
        computed.
        """
        keys = self._prompt = prompt.keys
        self.state.begin(len(keys), prompt.slots)
        kept = self.shared(keys)
        if self._prompted is not None and self._prompted > kept:
            self._prompted = None
        if kept == len(keys) and self._prompted != kept:
            kept -= 1
        is_short = self._is_short(keys)
        if self.decoder.coarse and not is_short and kept < len(keys):
            kept = self._usable(max(0, min(kept, len(keys) - FEW_ROWS - 1)), keys)
        self.truncate(kept)
        # not before: after an interrupt the old positions would count as the prompt's
        if is_short:
            self.short_prompt, self._few_rows_end = len(keys), sys.maxsize
        else:
            self.short_prompt, self._few_rows_end = self.short_prompt if kept else 0, min(self._few_rows_end, kept)
        return kept

    def copy(self, other: Session, count: int, capacity: int) -> None:
        """Copy the first `count` positions of another session."""
        self.truncate(0)
        self._prompted = None
        self._keys = other._keys[:count]
        self.short_prompt, self._few_rows_end = other.short_prompt, other._few_rows_end
        self.state.take_over(other.state, count, capacity)
        if other._prompted == count:
            self.decoder.ops.copy(other._prompt_logits, self._prompt_logits)
            self._prompted = count

    def prefill(self, prompt: Prompt, features: Sequence[tuple[Slot, Array]], capacity: int) -> Sliced[None]:
        """Compute the positions of a prompt that `keep` did not find; then row 0 of `logits` predicts the next token.

        Parameters
        ----------
        prompt : Prompt
        features : sequence of (Slot, Array)
            Features of the prompt's pictures. Pictures whose positions are all cached may be omitted.
        capacity : int
            Number of positions of prompt and answer.
        """
        ids, ops = prompt.ids, self.decoder.ops
        self._outcome, self._row = Outcome(ops, self._prompt_logits, self._prompt_best), 0
        if self._prompted == len(ids):
            ops.argmax(self._prompt_logits, out=self._prompt_best)
            return
        self._prompted = None
        self.unread = Unread(ids, prompt.keys, features, capacity)
        try:
            while (first := self.length) < len(ids):
                limits = (yield Slice(False, len(ids) - first, prompt=self)) or SliceLimits()
                if self.length == first:  # otherwise it was computed beside other prompts
                    compute_slices([self], limits.rows, limits.check)
        finally:
            self.unread = None

    def read(self, count: int, last: Array) -> None:
        """Mark `count` more positions of the prompt as computed; `last` is the decoder's output after them."""
        unread, first = self.unread, self.length
        assert unread is not None
        self._keys[first:] = unread.keys[first : first + count]
        self.state.advance(count)
        if self.length == len(unread.ids):
            self.decoder.logits(last, self._prompt_logits)
            self.decoder.ops.argmax(self._prompt_logits, out=self._prompt_best)
            self._prompted = self.length

    def feed(self, *tokens: int) -> None:
        """Append tokens in the next step; then row i of `logits` predicts the successor of ``tokens[i]``."""
        self._keys[self.length :] = tokens
        self.pending = tokens

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.state.truncate(length)

    def logits(self, row: int) -> np.ndarray:
        """Return a row of logits, float32 ``[vocab]``."""
        return self._outcome.logits(self._row + row)

    def best(self, row: int) -> int:
        """Return the token with the highest logit; -1 if a logit is not finite."""
        return self._outcome.best(self._row + row)

    def save(self, path: str | os.PathLike, length: int, identity: str) -> None:
        """Write the first `length` positions to a file; see `kv_file.write`."""
        kv_file.write(path, self.state, self._keys[:length], identity, self.short_prompt)

    def resume(self, found: kv_file.SavedKV) -> None:
        """Continue a saved session; see `kv_file.SavedKV.restore`."""
        found.restore(self.state)
        self.short_prompt, self._few_rows_end = found.short_prompt, 0
        self._keys, self._prompted = list(found.keys), None

    def fed(self, outcome: Outcome, row: int) -> None:
        """Store the result of a step, whose rows for this session begin at `row`."""
        self.pending, self._outcome, self._row = (), outcome, row


def step(run: DecodeStep, sessions: Sequence[Session]) -> None:
    """Run one step with the pending tokens of sessions, at most `FEW_ROWS` in total."""
    sessions = sorted(sessions, key=lambda session: -len(session.pending))  # fewer combinations to capture
    outcome, row = run([(session.state, session.pending) for session in sessions]), 0
    for session in sessions:
        count = len(session.pending)
        session.fed(outcome, row)
        row += count


def _common_prefix(a: Sequence[Key], b: Sequence[Key]) -> int:
    """Return the length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
