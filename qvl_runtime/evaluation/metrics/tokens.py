"""Words of a caption as in Stanford's PTB tokenizer: with that program if Java is installed, else with our own rules.

The rules cover captions: contractions, hyphens, numbers, abbreviations, brackets. `docs/evaluation.md` lists measured
differences.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qvl_runtime.errors import QvlError

JAR = "stanford-corenlp-3.4.1.jar"
TIMEOUT = 600
"""Timeout of Java in seconds."""

PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens dropped by the published evaluation. It would also drop -LRB- and the like, but these are in lower case."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
TWO_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "lemme": "lem me",
    "gimme": "gim me",
}
_ABBREVIATION = (
    r"(?:mr|mrs|ms|dr|st|jr|sr|prof|rev|gen|gov|col|lt|sgt|capt|vs|ave|blvd|rd|mt|ft|co|inc|corp|ltd|etc)\."
    r"|no\.(?=\s*\d)"
)
_TOKEN = re.compile(
    rf"""
    n't\b | '(?:s|re|ve|ll|d|m)\b | 'n' | '\d0s\b        # cut off before by _PARTS; the '90s
    | \b(?:{_ABBREVIATION}) | (?:[a-z]\.){{2,}}          # dr., u.s., a.m.
    | \d+(?:[.,:/]\d+)*(?:\w*(?:[-_&/@]\w+)*)            # 3.5, 1,000, 10:30, 2nd, 747-400, 12,000-year-old
    | (?:\w|&(?=\w))+(?:[-_&/@.](?=\w)\w+)*              # t-shirt, at&t, black/white
    | \.{{2,}} | -{{2,}}
    | [^\s"]
    """,
    re.VERBOSE,
)
LETTER_APOSTROPHE = "\u02bc"
"""Matches an apostrophe that counts as a letter: o'clock is one word."""

_PARTS = re.compile(r"(?<=\w)(?=n't\b)|(?<=\w)(?='(?:s|re|ve|ll|d|m)\b)|(?<=\by')(?=all\b)")
_JOINED = re.compile(r"\b([oy])'(?=\w|\s*all\b)")


def java_tokens(texts: Sequence[str]) -> list[str] | None:
    """Tokenize texts with Stanford's tokenizer, to lower-case words with spaces; None if Java is not installed."""
    java, jar = shutil.which("java"), _jar()
    if java is None or jar is None:
        return None
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # The program begins a line at every separator of Unicode, also at a form feed or U+2028.
    given = "\n".join(" ".join(text.splitlines()) for text in texts)
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise QvlError(f"{java}: the PTB tokenizer failed ({error}); take java off the PATH to do without") from None
    lines = done.stdout.decode().split("\n")
    if len(lines) == len(texts) + 1 and not lines[-1]:
        lines.pop()  # a line end at the end of the output
    if len(lines) != len(texts):
        raise QvlError(
            f"{java}: the PTB tokenizer gave {len(lines)} lines for {len(texts)} captions; take java off the PATH to "
            "do without"
        )
    return [_kept(line.split(" ")) for line in lines]


def own_tokens(texts: Sequence[str]) -> list[str]:
    """Tokenize texts with the rules of this module; see `java_tokens`."""
    return [_kept(_cut(text)) for text in texts]


def _cut(text: str) -> list[str]:
    spaced = _PARTS.sub(" ", text.lower().replace("\u2019", "'"))
    words = []
    for token in _TOKEN.findall(_JOINED.sub(rf"\1{LETTER_APOSTROPHE}", spaced)):
        token = token.replace(LETTER_APOSTROPHE, "'")
        words += TWO_WORDS.get(token, BRACKETS.get(token, token)).split()
    return words


def _kept(words: Sequence[str]) -> str:
    return " ".join(word for word in words if word.strip() and word not in PUNCTUATION)


def _jar() -> Path | None:
    found = importlib.util.find_spec("pycocoevalcap")
    places = found.submodule_search_locations if found is not None else None
    jars = [Path(place) / "tokenizer" / JAR for place in places or ()]
    return next((jar for jar in jars if jar.is_file()), None)
