"""VQA accuracy (Antol et al. 2015), as in the published evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

ARTICLES = ("a", "an", "the")
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(i) for i, word in enumerate(_NUMBERS.split())}
NUMBERS["none"] = "0"

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32
"""The published code passes a flag with the value 32 as a count."""

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Return contractions by their spelling without one apostrophe."""
    found = {}
    for word in CONTRACTED.split():
        for place in (i for i, character in enumerate(word) if character == "'"):
            found[word[:place] + word[place + 1 :]] = word
    found["somebody'd"] = "somebodyd"  # reversed in the published code
    return found


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Replace punctuation by a space; remove it beside a space, or if the text has a number with a comma."""
    out = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text or DIGITS_COMMA.search(text) is not None
        out = out.replace(mark, "" if beside else " ")
    return PERIOD.sub("", out, count=MOST_PERIODS)


def without_articles(text: str) -> str:
    """Convert to lower case, number words to digits, remove articles, and restore apostrophes of contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[Mapping[str, Any]]) -> float:
    """Compute the agreement of an answer with human answers, from 0 to 1.

    For each human answer: a third for each other person who gave this answer, at most 1; then the mean. Punctuation of
    human answers is only removed if they differ, articles never.

    Parameters
    ----------
    answer : str
    people : sequence of mapping
        VQA's ``answers``, with the text under "answer". An entry equal to another in all its keys counts as the same.
    """
    said = without_articles(without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))
    differ = len({person["answer"] for person in people}) > 1
    entries = [{**person, "answer": without_punctuation(person["answer"])} if differ else person for person in people]
    total = 0.0  # one after another: sum() of Python 3.12 rounds otherwise than the published script
    for entry in entries:
        matching = sum(other["answer"] == said for other in entries if other != entry)
        total += min(1.0, matching / 3)
    return total / len(entries)
