"""The prefix cache: keys and values of earlier prompts and answers, reused by a prompt that begins alike."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np

from qvl_kernels.locks import make_lock
from qvl_kernels.ops import Array
from qvl_runtime.engine import kv_file
from qvl_runtime.engine.decoder import Decoder, DecodeStep, Features
from qvl_runtime.engine.drafts import MAX_DRAFT
from qvl_runtime.engine.sequence import SequenceState
from qvl_runtime.inputs.prompt import Key, Prompt, Slot

PREFILL_ROWS = 512
"""Tokens of a prompt computed at a time: enough to keep the products busy, few enough to bound memory."""


class Session:
    """One cached sequence, and the decoder that extends it.

    Positions are described by their `Key`, so that a prompt finds what it shares with an earlier one even if a
    picture's path changed, and never takes another picture's features for its own. Keys are noted before a position
    counts as filled: an error or an interrupt at any point leaves a session that is merely shorter.

    Attributes
    ----------
    state : SequenceState
    salt : str or None
        Whose prompts it is for.
    """

    def __init__(self, decoder: Decoder, dtype: str, capacity: int, device: threading.RLock, salt: str | None = None):
        self.decoder, self._device, self.salt = decoder, device, salt
        self.state: SequenceState = decoder.sequence(dtype, capacity)
        self._step = DecodeStep(decoder, self.state, 1 + MAX_DRAFT)
        self._keys: list[Key] = []  # those from `length` on mean nothing
        # The length of the last prompt, and the logits after it, for another answer to the same prompt.
        self._prompted: int | None = None
        self._prompt_logits = decoder.ops.empty((1, decoder.vocab_size))

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
        differing = (i for i, (a, b) in enumerate(zip(self._keys[: self.length], keys)) if a != b)
        return next(differing, min(self.length, len(keys)))

    def keep(self, prompt: Prompt) -> int:
        """Forget what a prompt does not share; returns how many of its positions need no computing.

        All of them only if the logits after exactly this prompt are known: it is asked again, or for another answer.
        None if the prompt's length asks for another scaling of the rotary base.
        """
        keys = prompt.keys
        with self._device:
            self.state.begin(len(keys), prompt.slots)
            kept = self.shared(keys)
            if self._prompted is not None and self._prompted > kept:
                self._prompted = None
            if kept == len(keys) and self._prompted != kept:
                kept -= 1
            self.truncate(kept)
        return kept

    def prefill(self, prompt: Prompt, features: Sequence[tuple[Slot, Array]], capacity: int) -> None:
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
        if self._prompted == len(ids):
            with self._device:
                ops.copy(self._prompt_logits, self._step.logits[:1])
                ops.argmax(self._step.logits[:1], out=self._step.best[:1])
            return
        work = self.decoder.workspace(min(len(ids) - self.length, PREFILL_ROWS))
        self._prompted = None
        while self.length < len(ids):
            with self._device:
                self.state.reserve(capacity)
                first = self.length
                chunk = ids[first : first + PREFILL_ROWS]
                rows = work.rows(len(chunk))
                self.decoder.embed(ops.upload(np.asarray(chunk, np.int32)), rows.x)
                pictures = [Features(slot.start - first, slot.picture.tokens, values) for slot, values in features]
                self.decoder.forward(rows, self.state, pictures)
                self._fill(keys[first : first + len(chunk)])
        with self._device:
            logits = self._step.logits[:1]
            self.decoder.logits(rows.x[len(chunk) - 1 : len(chunk)], logits)
            ops.argmax(logits, out=self._step.best[:1])
            ops.copy(logits, self._prompt_logits)
            self._prompted = len(ids)

    def feed(self, *tokens: int) -> None:
        """Append tokens; afterwards row i of `logits` is for the token that follows ``tokens[i]``."""
        with self._device:
            self._keys[self.length :] = tokens
            self._step(*tokens)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        with self._device:
            self.state.truncate(length)

    def logits(self, row: int) -> np.ndarray:
        """float32 ``[vocab]``."""
        with self._device:
            return self.decoder.ops.download(self._step.logits[row : row + 1])[0]

    def best(self, row: int) -> int:
        """The token with the highest logit; -1 where one is not finite."""
        with self._device:
            return int(self.decoder.ops.download(self._step.best[row : row + 1])[0])

    def save(self, path: str | os.PathLike, length: int, identity: str) -> None:
        """Write the first `length` positions to a file; see `kv_file.write`."""
        with self._device:
            kv_file.write(path, self.state, self._keys[:length], identity)

    def resume(self, found: kv_file.SavedKV) -> None:
        """Continue a saved session; see `kv_file.SavedKV.restore`."""
        with self._device:
            found.restore(self.state)
            self._keys, self._prompted = list(found.keys), None

    def _fill(self, keys: Sequence[Key]) -> None:
        self._keys[self.length :] = keys
        self.state.advance(len(keys))


class Sessions:
    """The sessions of one model: each answer takes one, and puts it back when it ends.

    An answer that begins while another is not finished (in a second thread, or between two pieces of a stream)
    gets a session of its own.

    Parameters
    ----------
    limit : int
        Sessions that are kept when nobody uses them, the latest. 0 keeps nothing between calls.
    device : threading.RLock
        Held while something is computed.
    """

    def __init__(self, decoder: Decoder, dtype: str, limit: int, device: threading.RLock):
        self.decoder, self._dtype, self._limit, self._device = decoder, dtype, limit, device
        self._idle: list[Session] = []
        self._lock = make_lock()

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
                if best.salt != salt:
                    best.truncate(0)
                    best.salt = salt
                return best
        with self._device:
            return Session(self.decoder, self._dtype, capacity, self._device, salt)

    def give(self, session: Session) -> None:
        """Put a session back."""
        with self._lock:
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
        with self._device:
            session = Session(self.decoder, self._dtype, len(found.keys), self._device)
        session.resume(found)
        self.give(session)
        return len(found.keys)

    def clear(self) -> None:
        """Let go of all sessions that nobody uses, and their memory."""
        with self._lock:
            self._idle.clear()
