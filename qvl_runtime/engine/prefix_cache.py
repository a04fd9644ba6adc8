"""The prefix cache: sessions of earlier prompts and answers, continued by prompts with the same prefix."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qvl_kernels.locks import make_lock
from qvl_runtime.engine import kv_file
from qvl_runtime.engine.decoder import Decoder
from qvl_runtime.engine.sequence import PAGE
from qvl_runtime.engine.session import Session, Slice, Sliced
from qvl_runtime.inputs.prompt import Key, Prompt

WORTH_COPYING = 16
"""Minimum number of additional positions for which copying another session is worthwhile."""


class PrefixCache:
    """The sessions of one model. An answer takes one and returns it at its end; concurrent answers use different ones.

    Parameters
    ----------
    limit : int
        Largest number of idle sessions; the most recent are cached. 0 disables the prefix cache.
    """

    def __init__(self, decoder: Decoder, dtype: str, limit: int):
        self.decoder, self._dtype, self._limit = decoder, dtype, limit
        self._idle: list[Session] = []
        self._busy: list[Session] = []
        self._lock = make_lock()

    def page_bytes(self) -> int:
        """Return the bytes of `PAGE` positions, the unit of allocation."""
        return self.decoder.sequence(self._dtype, PAGE).store.nbytes

    def begin(self, prompt: Prompt, capacity: int, salt: str | None = None) -> Sliced[tuple[Session, int]]:
        """Return a session for a prompt, and the number of cached positions.

        If the session of a running answer will share a much longer prefix than any idle one, wait for it and copy it.
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
            if found is not None:
                count = min(found[1], found[0].length)  # fewer if it was not waited for
                if _pays(count, session.shared(keys), len(keys)):
                    session.copy(found[0], count, capacity)
            return session, session.keep(prompt)
        except BaseException:
            self.give(session)
            raise

    def _neighbour(self, keys: Sequence[Key], salt: str | None) -> tuple[Session, int] | None:
        """Return the busy session that will share the longest prefix, and its length."""
        own = [session for session in self._busy if session.salt == salt]
        if not own:
            return None
        alpha = own[0].state.rotary.scaling(len(keys))
        return max(((session, session.will_share(keys, alpha)) for session in own), key=lambda found: found[1])

    def take(self, keys: Sequence[Key], capacity: int, salt: str | None = None) -> Session:
        """Return the idle session of this salt with the longest common prefix, or a new one.

        A session of which the prompt would discard the greater part stays cached while the limit allows another.
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
        """Return a session after use."""
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

    def load(self, path: str | os.PathLike, identity: str, window: int) -> int:
        """Add a session from a file of `save`; return its number of positions, 0 if the prefix cache is disabled."""
        found = kv_file.read(path, identity, window)
        if not self._limit:
            return 0
        session = Session(self.decoder, self._dtype, len(found.keys))
        session.resume(found)
        self.give(session)
        return len(found.keys)

    def release(self) -> None:
        """Drop the busy sessions: their answers were interrupted, or belong to the parent process of a fork."""
        with self._lock:
            self._busy.clear()

    def clear(self) -> None:
        """Free all idle sessions."""
        with self._lock:
            self._idle.clear()


def _pays(count: int, own: int, length: int) -> bool:
    """Whether to copy `count` positions of a prompt of `length` tokens if `own` are cached already."""
    return count >= own + WORTH_COPYING or own < count == length
