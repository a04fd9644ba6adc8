"""Metrics of short answers: ANLS, relaxed and exact match, and yes or no."""

from __future__ import annotations

from collections.abc import Sequence

ANLS_LEAST = 0.5
RELAXED = 0.05


def edit_distance(first: str, second: str) -> int:
    """Compute the Levenshtein distance in characters."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def anls(answer: str, right: Sequence[str]) -> float:
    """Compute the normalized Levenshtein similarity of one question (Biten et al. 2019), as in DocVQA's judge.

    The distance is that of lower-case texts with collapsed white space. It is divided by the length of the longer
    original text in upper case.
    """

    def similarity(true: str) -> float:
        longer = max(len(true.upper()), len(answer.upper()))
        return 1 - edit_distance(_collapsed(true), _collapsed(answer)) / longer if longer else 1.0

    best = max(similarity(true) for true in right)
    return best if best >= ANLS_LEAST else 0.0


def _collapsed(text: str) -> str:
    return " ".join(text.strip().lower().split())


def relaxed_match(answer: str, right: Sequence[str]) -> float:
    """Compute ChartQA's accuracy of one question: within 5% of a number, or the same text."""
    return float(max(_relaxed(answer.strip(), true) for true in right))


def _relaxed(given: str, true: str) -> bool:
    # The published code swaps answer and target: the 5% refer to the answer.
    number, target = _number(true), _number(given)
    if number is not None and target:
        return abs(number - target) / abs(target) <= RELAXED
    return given.lower() == true.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_match(answer: str, right: Sequence[str]) -> float:
    """Return 1 if the answer is one of the references, ignoring case and outer white space."""
    return float(any(answer.strip().lower() == true.strip().lower() for true in right))


def short_answer(answer: str) -> str:
    """Shorten an answer as the published evaluation of GQA does: the core of its first clause."""
    core = answer.strip()
    for mark in ".,!":
        core = core.split(mark)[0]
    core = core.lower()
    for before in ("is ", "are ", "a ", "an ", "the "):
        if before in core:
            core = core.split(before)[1]
    return core.split(" of")[0].strip()


def says(answer: str) -> str:
    """Classify an answer as "yes", "no" or "other" by its first four characters, as MME's judge does."""
    head = answer.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"
