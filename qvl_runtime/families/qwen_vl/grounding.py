"""Boxes as Qwen-VL writes them: ``<ref>dog</ref><box>(10,20),(300,400)</box>``, in thousandths of the picture."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Constraint
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.pictures import Picture
from qvl_runtime.inputs.tokenizer import Tokenizer

# A tag that opens twice was not closed the first time: the span begins at the later one.
_SPAN = re.compile(r"<(ref|box|quad|img)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)
_OPENED = re.compile(r"(?:<ref>[^<]*</ref>)?<box>[^<]*\Z")
_CORNERS = re.compile(r"\s*,\s*".join([r"(\d{1,4})"] * 4), re.ASCII)


def parse_boxes(text: str) -> list[Box]:
    """Find the boxes of an answer.

    A ``<ref>`` names the one box that follows it directly. Tags do not nest, and what is not four whole numbers
    up to 1000 is skipped.

    Parameters
    ----------
    text : str
        Any text; this never raises.

    Returns
    -------
    list of Box
        In the order of the text.

    Examples
    --------
    >>> parse_boxes("<ref>dog</ref><box>(10,20),(300,400)</box> and <box>(1,2)</box>")
    [Box(ref='dog', x1=10, y1=20, x2=300, y2=400)]
    """
    boxes = []
    ref, ref_end = None, -1
    for span in _SPAN.finditer(text):
        kind, content = span.groups()
        if kind == "ref":
            ref, ref_end = content.strip(), span.end()
        elif kind == "box":
            corners = _CORNERS.fullmatch(content.replace("(", "").replace(")", "").strip())
            if corners and max(values := [int(v) for v in corners.groups()]) <= 1000:
                boxes.append(Box(ref if span.start() == ref_end else None, *values))
    return boxes


def opened_box(prompt: str) -> str:
    """The box a prompt leaves for its answer to complete, with its ref: "" if it ends outside of one.

    Examples
    --------
    >>> opened_box("<img>a.png</img><ref>the dog</ref><box>")
    '<ref>the dog</ref><box>'
    """
    found = _OPENED.search(prompt)
    return found[0] if found else ""


def format_box(box: Box) -> str:
    """Write a box as the model does: ``<ref>dog</ref><box>(10,20),(300,400)</box>``."""
    ref = "" if box.ref is None else f"<ref>{box.ref}</ref>"
    return f"{ref}<box>({box.x1},{box.y1}),({box.x2},{box.y2})</box>"


CORNERS = "(999,999),(999,999)"
"""The longest content of a box; no token is shorter than one of its characters."""


def box_can_become(text: str) -> bool:
    """Whether `text` begins the content of a box: "(x1,y1),(x2,y2)" with 0 <= x1 < x2 <= 999 and so for y.

    Examples
    --------
    >>> box_can_become("(12,7),(12"), box_can_become("(12,7),(13"), box_can_become("(12,7),(1")
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


class QwenGrounding:
    """`qvl_runtime.families.base.Grounding`."""

    def parse(self, text: str, pictures: Sequence[Picture]) -> list[Box]:
        return parse_boxes(text)

    def constraint(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        """``<ref>…</ref><box>(x1,y1),(x2,y2)</box>``, once or more, always complete.

        Corners are 0..999 with x1 < x2 and y1 < y2. Every ref is closed in time for its box, so `limit` must leave
        room for one.
        """
        if tokenizer.box_start_id is None:
            raise QvlError("this model has no box tokens; grounding needs a Qwen-VL model")
        return _GroundingConstraint(tokenizer, stop_ids, limit, opened)


class _GroundingConstraint:
    """A small automaton over tokens: where it is, and what stands in the box so far."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str):
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._left, self._corners = limit, ""
        self._state = "begin"
        if opened:
            self._state, self._corners = "box", opened.rpartition("<box>")[2]
            if not box_can_become(self._corners):
                raise QvlError(f"the prompt opens the box {self._corners!r}, which no box completes; end it with <box>")
        needed = self._cost() if opened else self._cost() + 1
        if limit < needed:
            raise QvlError(f"max_new_tokens is {limit}; a box with its ref needs {needed}")

    def _cost(self) -> int:
        """Tokens that finish what is open, at worst: ref, its end, box, corners, its end."""
        box = len(CORNERS) - len(self._corners) + 1
        return box if self._state == "box" else box + {"begin": 3, "ref": 2, "text": 2, "after ref": 1}[self._state]

    def allowed(self) -> np.ndarray:
        ids, tokens = self._tokenizer, np.zeros(self._tokenizer.vocab_size, bool)
        if self._state == "begin":
            tokens[ids.ref_start_id] = True
        elif self._state in ("ref", "text"):
            tokens[ids.ref_end_id] = self._state == "text"
            if self._state == "ref" or self._left > self._cost():
                tokens |= _texts(ids)
        elif self._state == "after ref":
            tokens[ids.box_start_id] = True
        elif self._state == "box":
            for token, text in _corner_tokens(ids):
                tokens[token] = box_can_become(self._corners + text)
            tokens[ids.box_end_id] = self._corners.endswith(")") and self._corners.count(")") == 2
        else:
            tokens[list(self._stop_ids)] = True
            tokens[ids.ref_start_id] = self._left > len(CORNERS) + 4
        return tokens

    def advance(self, token: int) -> None:
        ids = self._tokenizer
        self._left -= 1
        following = {
            ids.ref_start_id: "ref",
            ids.ref_end_id: "after ref",
            ids.box_start_id: "box",
            ids.box_end_id: "after box",
        }
        if token in following:
            self._state, self._corners = following[token], ""
        elif self._state == "box":
            self._corners += ids.token_bytes(token).decode()
        elif self._state == "ref":
            self._state = "text"


@functools.lru_cache(maxsize=4)
def _texts(tokenizer: Tokenizer) -> np.ndarray:
    """Ordinary tokens that cannot be taken for a part of a tag."""
    ordinary = range(tokenizer.eod_id)
    plain = [b"<" not in tokenizer.token_bytes(token) for token in ordinary]
    return np.array(plain + [False] * (tokenizer.vocab_size - len(plain)))


@functools.lru_cache(maxsize=4)
def _corner_tokens(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Ordinary tokens of which a box's content may be made."""
    pairs = ((token, tokenizer.token_bytes(token)) for token in range(tokenizer.eod_id))
    return [(token, text.decode()) for token, text in pairs if text and not text.translate(None, b"0123456789(),")]
