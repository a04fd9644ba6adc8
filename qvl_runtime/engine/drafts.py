"""Prompt-lookup decoding: draft the next tokens from the text so far, and check several in one pass.

An answer often repeats its prompt: a quoted line, a name, a box. Where the last few tokens occurred before, those
that followed are a free draft (Saxena 2023, "Prompt Lookup Decoding"). The model computes all of them at once, and
the answer goes on only as far as its own choice at each position is the draft. Every token is thus chosen by the
same sampler from the same logits as without drafts, one draw each, so the answer's distribution is unchanged.
This is rejection sampling for a draft that is certain: accept it with the probability p it has, and otherwise draw
from p without it.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_DRAFT = 15
"""Most tokens drafted at a time: with the one before them a batch of 16, which on the CPU is the largest whose rows are
computed as one row alone would be."""

MATCHED = 3
"""Tokens that must have occurred before, in this order."""

PRIOR = 0.75
"""Prior acceptance rate. The estimate returns to it while nothing is drafted."""


class PromptLookup:
    """Drafts for one answer, as long as pays at the acceptance rate seen so far.

    Parameters
    ----------
    tokens : iterable of int
        The prompt.
    row_cost : float
        `Ops.row_cost`.
    """

    def __init__(self, tokens: Iterable[int], row_cost: float):
        self._tokens: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}
        self._row_cost, self._rate = row_cost, PRIOR
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token of the text."""
        if len(self._tokens) >= MATCHED:
            self._followed_at[tuple(self._tokens[-MATCHED:])] = len(self._tokens)
        self._tokens.append(token)
        self._rate += 0.01 * (PRIOR - self._rate)

    def draft(self, most: int) -> list[int]:
        """What may come next, `most` tokens or fewer; nothing where the text is new or drafting does not pay."""
        start = self._followed_at.get(tuple(self._tokens[-MATCHED:]))
        if start is None:
            return []
        drafted: list[int] = []
        period = len(self._tokens) - start
        for i in range(self._worthwhile(min(most, MAX_DRAFT))):
            drafted.append(self._tokens[start + i] if i < period else drafted[i - period])
        return drafted

    def learn(self, drafted: int, accepted: int) -> None:
        """Note how many drafted tokens were accepted."""
        for right in [True] * accepted + [False] * (accepted < drafted):
            self._rate += 0.15 * (right - self._rate)

    def _worthwhile(self, most: int) -> int:
        """The draft length that gives the most tokens per time at the acceptance rate seen so far."""
        tokens, best, speed = 1.0, 0, 1.0
        for count in range(1, most + 1):
            tokens += self._rate**count
            if tokens / (1 + self._row_cost * count) > speed:
                best, speed = count, tokens / (1 + self._row_cost * count)
        return best
