"""Boxes between tags, in thousandths of the picture: the notation of Qwen-VL and Qwen2-VL, with different tags."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Constraint
from qvl_runtime.errors import NoRoomError, QvlError
from qvl_runtime.inputs.pictures import Picture
from qvl_runtime.inputs.tokenizer import Tokenizer

_CORNERS = re.compile(r"\s*,\s*".join([r"(\d{1,4})"] * 4), re.ASCII)

CORNERS = "(999,999),(999,999)"
"""The longest content of a box; every token has at least one of its characters."""


def box_can_become(text: str) -> bool:
    """Whether `text` is a prefix of the content of a box: "(x1,y1),(x2,y2)" with 0 <= x1 < x2 <= 999, likewise y.

    Examples
    --------
    >>> box_can_become("(12,7),(12,"), box_can_become("(12,7),(13,"), box_can_become("(12,7),(12")
    (False, True, True)
    """
    corners: list[int] = []
    for before in ("(", ",", "),(", ","):
        if len(text) <= len(before):
            return before.startswith(text)
        if not text.startswith(before):
            return False
        text = text.removeprefix(before)
        digits = text[: len(text) - len(text.lstrip("0123456789"))]
        text = text.removeprefix(digits)
        low, high = (0, 998) if len(corners) < 2 else (corners[len(corners) - 2] + 1, 999)
        if not text:
            return _number_can_become(digits, low, high)
        if not digits or str(int(digits)) != digits or not low <= int(digits) <= high:
            return False
        corners.append(int(digits))
    return text == ")"


def _number_can_become(digits: str, low: int, high: int) -> bool:
    if not digits:
        return True
    if digits.startswith("0"):
        return digits == "0" and low == 0
    value = int(digits)
    spans = ((value * 10**more, (value + 1) * 10**more - 1) for more in range(3))
    return any(first <= high and last >= low for first, last in spans)


@dataclasses.dataclass(frozen=True)
class TaggedGrounding:
    """`qvl_runtime.families.base.Grounding` for a phrase and a box between tags.

    Attributes
    ----------
    ref_start, ref_end, box_start, box_end : str
    spans : re.Pattern
        Matches the text between tags as its second group. Tags do not nest: if one opens twice, the span begins at the
        second.
    """

    ref_start: str
    ref_end: str
    box_start: str
    box_end: str
    spans: re.Pattern[str]

    @property
    def tags(self) -> frozenset[str]:
        """The tags around a phrase and a box."""
        return frozenset((self.ref_start, self.ref_end, self.box_start, self.box_end))

    def parse(self, text: str, pictures: Sequence[Picture] = ()) -> list[Box]:
        """Find the boxes of an answer.

        A phrase belongs to the box directly after it. A box that is not four integers up to 1000 is skipped.
        """
        boxes = []
        ref, ref_end = None, -1
        for span in self.spans.finditer(text):
            if span[0].startswith(self.ref_start):
                ref, ref_end = span[2].strip(), span.end()
            elif span[0].startswith(self.box_start):
                corners = _CORNERS.fullmatch(span[2].replace("(", "").replace(")", "").strip())
                values = [int(v) for v in corners.groups()] if corners else []
                if values and max(values) <= 1000:
                    x1, y1, x2, y2 = values
                    boxes.append(Box(ref if span.start() == ref_end else None, x1, y1, x2, y2))
        return boxes

    def opened(self, prompt: str) -> str:
        """Return the incomplete box at the end of a prompt, with its phrase; "" if there is none."""
        ref = f"{re.escape(self.ref_start)}[^<]*{re.escape(self.ref_end)}"
        found = re.search(rf"(?:{ref})?{re.escape(self.box_start)}[^<]*\Z", prompt)
        return found[0] if found else ""

    def mark(self, corners: Sequence[float], picture: Picture) -> str:
        """Write a box for a question. `corners` are in pixels of the original picture."""
        x1, y1, x2, y2 = (min(999, max(0, int(v / side * 1000))) for v, side in zip(corners, picture.size * 2))
        return f"{self.box_start}({x1},{y1}),({x2},{y2}){self.box_end}"

    def write(self, things: Sequence[tuple[str, Sequence[float]]], picture: Picture) -> str:
        """Write an answer with boxes."""
        return "".join(f"{self.ref_start}{ref}{self.ref_end}{self.mark(corners, picture)}" for ref, corners in things)

    def constraint(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        """Constrain the answer to one or more phrases with their boxes, always complete.

        Corners are 0..999 with x1 < x2 and y1 < y2. Every phrase ends early enough for its box; `limit` must suffice
        for one.
        """
        if self.box_start not in tokenizer.special:
            raise QvlError("this model has no box tokens; grounding needs a vision-language model")
        return _GroundingConstraint(self, tokenizer, stop_ids, limit, opened)


class _GroundingConstraint:
    """A finite automaton over tokens, with the corners of the current box."""

    def __init__(self, tags: TaggedGrounding, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str):
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        named = (tags.ref_start, tags.ref_end, tags.box_start, tags.box_end)
        self._ref_start, self._ref_end, self._box_start, self._box_end = (tokenizer.special[tag] for tag in named)
        self._left, self._corners = limit, ""
        self._state = "begin"
        if opened:
            self._state, self._corners = "box", opened.rpartition(tags.box_start)[2]
            if not box_can_become(self._corners):
                raise QvlError(
                    f"the prompt opens the box {self._corners!r}, which no box completes; end it with {tags.box_start}"
                )
        needed = self._cost() if opened else self._cost() + 1
        if limit < needed:
            raise NoRoomError(limit, "a box with its ref", needed)

    def _cost(self) -> int:
        """Return the largest number of tokens to complete the open phrase and box."""
        box = len(CORNERS) - len(self._corners) + 1
        return box if self._state == "box" else box + {"begin": 3, "ref": 2, "text": 2, "after ref": 1}[self._state]

    def allowed(self) -> np.ndarray:
        ids, tokens = self._tokenizer, np.zeros(self._tokenizer.vocab_size, bool)
        if self._state == "begin":
            tokens[self._ref_start] = True
        elif self._state in ("ref", "text"):
            tokens[self._ref_end] = self._state == "text"
            if self._state == "ref" or self._left > self._cost():
                tokens |= _texts(ids)
        elif self._state == "after ref":
            tokens[self._box_start] = True
        elif self._state == "box":
            for token, text in _corner_tokens(ids):
                tokens[token] = box_can_become(self._corners + text)
            tokens[self._box_end] = self._corners.endswith(")") and self._corners.count(")") == 2
        else:
            tokens[list(self._stop_ids)] = True
            tokens[self._ref_start] = self._left > len(CORNERS) + 4
        return tokens

    def advance(self, token: int) -> None:
        self._left -= 1
        following = {
            self._ref_start: "ref",
            self._ref_end: "after ref",
            self._box_start: "box",
            self._box_end: "after box",
        }
        if token in following:
            self._state, self._corners = following[token], ""
        elif self._state == "box":
            self._corners += self._tokenizer.token_bytes(token).decode()
        elif self._state == "ref":
            self._state = "text"


@functools.lru_cache(maxsize=4)
def _texts(tokenizer: Tokenizer) -> np.ndarray:
    """Return the ordinary tokens that cannot be part of a tag."""
    ordinary = range(tokenizer.eod_id)
    plain = [b"<" not in tokenizer.token_bytes(token) for token in ordinary]
    return np.array(plain + [False] * (tokenizer.vocab_size - len(plain)))


@functools.lru_cache(maxsize=4)
def _corner_tokens(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Return the ordinary tokens that may occur in a box."""
    pairs = ((token, tokenizer.token_bytes(token)) for token in range(tokenizer.eod_id))
    return [(token, text.decode()) for token, text in pairs if text and not text.translate(None, b"0123456789(),")]
