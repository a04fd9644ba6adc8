"""Metrics of short answers: ANLS, relaxed and exact match, and yes or no."""

from __future__ import annotations

from collections.abc import Sequence

ANLS_LEAST = 0.5
RELAXED = 0.05


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements of a character."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def anls(answer: str, right: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one question (Biten et al. 2019), as DocVQA's judge computes it.

    The distance is that of the texts in lower case with white space collapsed; the length it is divided by, that of
    the longer one in upper case as it was given.
    """

    def similarity(true: str) -> float:
        longer = max(len(true.upper()), len(answer.upper()))
        return 1 - edit_distance(_collapsed(true), _collapsed(answer)) / longer if longer else 1.0

    best = max(similarity(true) for true in right)
    return best if best >= ANLS_LEAST else 0.0


def _collapsed(text: str) -> str:
    return " ".join(text.strip().lower().split())


def relaxed_match(answer: str, right: Sequence[str]) -> float:
    """ChartQA's accuracy of one question: within 5% of a number, or else the same text."""
    return float(max(_relaxed(answer.strip(), true) for true in right))


def _relaxed(given: str, true: str) -> bool:
    # The published code passes the answer for the target, and the target for the answer: 5% are of the answer.
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
    """1 where the answer is one of the right ones, but for case and white space around."""
    return float(any(answer.strip().lower() == true.strip().lower() for true in right))


def short_answer(answer: str) -> str:
    """What the published evaluation of GQA keeps of an answer: the core of its first clause."""
    core = answer.strip()
    for mark in ".,!":
        core = core.split(mark)[0]
    core = core.lower()
    for before in ("is ", "are ", "a ", "an ", "the "):
        if before in core:
            core = core.split(before)[1]
    return core.split(" of")[0].strip()


def says(answer: str) -> str:
    """ "yes", "no" or "other", as MME's judge reads the first four characters of an answer."""
    head = answer.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"
