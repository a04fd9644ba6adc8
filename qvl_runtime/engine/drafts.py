"""Prompt-lookup decoding: draft the next tokens from the text so far, and verify several in one step.

An answer often repeats its prompt: a quoted line, a name, a box. If the last few tokens occurred before, the tokens
that followed them are a free draft (Saxena 2023, "Prompt Lookup Decoding"). The model computes all of them in one step,
and the answer accepts them as far as they equal the sampler's own choices. Every token is chosen by the same sampler
from the same logits as without drafts, with one random draw each, so the answer is unchanged. This is rejection
sampling for a deterministic draft: accept it with its probability p, otherwise draw from p without it.
"""

from __future__ import annotations

from collections.abc import Iterable

from qvl_kernels.ops import FEW_ROWS

MAX_DRAFT = FEW_ROWS - 1
"""Largest draft: with the token before it, the rows of a step."""

MATCHED = 3
"""Number of last tokens that must have occurred before."""

PRIOR = 0.75
"""Prior acceptance rate. The estimate decays to it while nothing is drafted."""


class PromptLookup:
    """Drafts for one answer, while they save time at the observed acceptance rate.

    Parameters
    ----------
    tokens : iterable of int
        The prompt.
    row_cost : float
        `Ops.row_cost`.
    """

    def __init__(self, tokens: Iterable[int], row_cost: float):
        self._tokens = list(tokens)
        matches = zip(*(self._tokens[i:] for i in range(MATCHED)))
        self._followed_at = dict(zip(matches, range(MATCHED, len(self._tokens))))
        self._row_cost, self._rate = row_cost, PRIOR

    def append(self, token: int) -> None:
        """Append a token of the text."""
        if len(self._tokens) >= MATCHED:
            self._followed_at[tuple(self._tokens[-MATCHED:])] = len(self._tokens)
        self._tokens.append(token)
        self._rate += 0.01 * (PRIOR - self._rate)

    def draft(self, most: int, beside: int = 0) -> list[int]:
        """Draft at most `most` tokens; none if the text is new or drafting would not save time.

        `beside` is the number of other answers that get a token in the same step.
        """
        start = self._followed_at.get(tuple(self._tokens[-MATCHED:]))
        if start is None:
            return []
        drafted: list[int] = []
        period = len(self._tokens) - start
        for i in range(self._worthwhile(min(most, MAX_DRAFT), beside)):
            drafted.append(self._tokens[start + i] if i < period else drafted[i - period])
        return drafted

    def learn(self, drafted: int, accepted: int) -> None:
        """Update the acceptance rate."""
        for right in [True] * accepted + [False] * (accepted < drafted):
            self._rate += 0.15 * (right - self._rate)

    def _worthwhile(self, most: int, beside: int) -> int:
        """Return the draft length with the highest expected speed of a step at the observed acceptance rate."""
        tokens, seconds, best = 1.0 + beside, 1.0 + self._row_cost * beside, 0
        speed = tokens / seconds
        for count in range(1, most + 1):
            tokens += self._rate**count
            seconds += self._row_cost
            if tokens / seconds > speed:
                best, speed = count, tokens / seconds
        return best
