"""Prompt-lookup decoding: guess the next tokens from the text so far, and check several in one pass.

An answer often repeats its prompt: a quoted line, a name, a box. Where the last few tokens occurred before, those
that followed are a free guess (Saxena 2023, "Prompt Lookup Decoding"). The model computes all of them at once, and
the answer goes on only as far as its own choice at each position is the guess. Every token is thus chosen by the
same sampler from the same logits as without guessing, one draw each, so the answer's distribution is unchanged.
This is rejection sampling for a guess that is certain: accept it with the probability p it has, and otherwise draw
from p without it.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_GUESSED = 15
"""Tokens guessed at a time: with the one before them a batch of 16, which on the CPU is the largest whose rows are
computed as one row alone would be."""

MATCHED = 3
"""Tokens that must have occurred before, in this order."""

ROW_COST = {"cpu": 0.4, "cuda": 0.1}
"""What each further row of a small batch costs, in passes of one row. On two cores 2, 8 and 16 rows were measured to
take 1.4, 4.4 and 6.4 times as long as one; more cores wait for memory more, and a GPU, not measured, should most."""

HOPE = 0.75
"""The rate of acceptance that is assumed before there is one, and returned to when nothing is tried."""


class PromptLookup:
    """Guesses for one answer, as many at a time as have paid so far.

    Parameters
    ----------
    tokens : iterable of int
        The prompt.
    row_cost : float
        See `ROW_COST`.
    """

    def __init__(self, tokens: Iterable[int], row_cost: float):
        self._tokens: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}
        self._row_cost, self._rate = row_cost, HOPE
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token of the text."""
        if len(self._tokens) >= MATCHED:
            self._followed_at[tuple(self._tokens[-MATCHED:])] = len(self._tokens)
        self._tokens.append(token)
        self._rate += 0.01 * (HOPE - self._rate)

    def guess(self, most: int) -> list[int]:
        """What may come next, `most` tokens or fewer; nothing where the text is new or guessing does not pay."""
        start = self._followed_at.get(tuple(self._tokens[-MATCHED:]))
        if start is None:
            return []
        guessed: list[int] = []
        period = len(self._tokens) - start
        for i in range(self._worthwhile(min(most, MOST_GUESSED))):
            guessed.append(self._tokens[start + i] if i < period else guessed[i - period])
        return guessed

    def learn(self, guessed: int, accepted: int) -> None:
        """Take note that of so many guesses so many were right."""
        for right in [True] * accepted + [False] * (accepted < guessed):
            self._rate += 0.15 * (right - self._rate)

    def _worthwhile(self, most: int) -> int:
        """How many guesses give the most tokens per time, each being right with the rate seen so far."""
        tokens, best, speed = 1.0, 0, 1.0
        for count in range(1, most + 1):
            tokens += self._rate**count
            if tokens / (1 + self._row_cost * count) > speed:
                best, speed = count, tokens / (1 + self._row_cost * count)
        return best
