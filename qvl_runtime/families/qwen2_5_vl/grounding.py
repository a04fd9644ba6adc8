"""The box notation of Qwen2.5-VL and Qwen3-VL: JSON objects with a `bbox_2d` and a `label`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Answer, Constraint, Regex
from qvl_runtime.errors import NoRoomError
from qvl_runtime.inputs.pictures import Picture
from qvl_runtime.inputs.tokenizer import Tokenizer

_PLAIN = r'[^{}"]|"(?:[^"\\]|\\.)*+"'
_FLAT = rf"\{{(?:{_PLAIN})*+\}}"
# An object, and the objects in its values. The enclosing list and fence may be truncated.
_OBJECT = re.compile(rf"\{{(?:{_PLAIN}|{_FLAT})*+\}}", re.DOTALL)
_INNER = re.compile(_FLAT, re.DOTALL)

LABEL = 20
"""Largest number of characters of a label in a constrained answer; each takes up to three bytes."""

HEAD, TAIL = "```json\n[\n\t", "\n]\n```"


class JsonGrounding:
    """`qvl_runtime.families.base.Grounding` for coordinates in pixels of the resized picture (Qwen2.5-VL)."""

    NUMBER = "(0|[1-9][0-9]{0,4})"
    LONGEST = "99999"

    def scale(self, pictures: Sequence[Picture]) -> tuple[int, int] | None:
        """Return the width and height that coordinates refer to; None without a picture."""
        return pictures[-1].resized if pictures else None

    def parse(self, text: str, pictures: Sequence[Picture]) -> list[Box]:
        """Return all objects with four corners, in order. They refer to the last picture."""
        scale = self.scale(pictures)
        if scale is None:
            return []
        return [box for data in _objects(text) if (box := self._box(data, scale)) is not None]

    def _box(self, data: Any, scale: tuple[int, int]) -> Box | None:
        corners, label = data.get("bbox_2d"), data.get("label")
        if not isinstance(corners, list) or len(corners) != 4 or not all(map(self._known, corners)):
            return None
        x1, y1, x2, y2 = corners
        return Box(label if isinstance(label, str) else None, x1, y1, x2, y2, scale)

    def _known(self, number: Any) -> bool:
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False
        return 0 <= number <= int(self.LONGEST)  # false for NaN

    def mark(self, corners: Sequence[float], picture: Picture) -> str:
        """Write a box for a question. `corners` are in pixels of the original picture."""
        return json.dumps({"bbox_2d": self._numbers(corners, picture)})

    def write(self, things: Sequence[tuple[str, Sequence[float]]], picture: Picture) -> str:
        """Write an answer with boxes."""
        items = [{"bbox_2d": self._numbers(corners, picture), "label": label} for label, corners in things]
        return HEAD + ",\n\t".join(json.dumps(item, ensure_ascii=False) for item in items) + TAIL

    def _numbers(self, corners: Sequence[float], picture: Picture) -> list[int]:
        scale = self.scale([picture])
        assert scale is not None
        sides = zip(corners, picture.size * 2, scale * 2)
        return [min(most, max(0, int(v / side * most))) for v, side, most in sides]

    def constraint(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        """Constrain the answer to a fenced list of boxes that is always complete within `limit` tokens.

        A label has at most `LABEL` characters.
        """
        corners = ", ".join([self.NUMBER] * 4)
        item = rf'\{{"bbox_2d": \[{corners}\], "label": "[^"\\\x00-\x1f\x{{10000}}-\x{{10FFFF}}]{{1,{LABEL}}}"\}}'
        # Every token has at least one byte, so that an answer has at most as many tokens as bytes.
        longest = len(f'{{"bbox_2d": [{", ".join([self.LONGEST] * 4)}], "label": ""}},\n\t') + 3 * LABEL
        needed = len(HEAD) + longest + len(TAIL) + 1
        if limit < needed:
            raise NoRoomError(limit, "a box with its label", needed)
        more = (limit - needed) // longest
        pattern = rf"{re.escape(HEAD)}{item}(,\n\t{item}){{0,{more}}}{re.escape(TAIL)}"
        return Regex(pattern).start(Answer(tokenizer, stop_ids, limit, "", self.constraint))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of an answer, each followed by those in its values, even if it is malformed itself."""
    for match in _OBJECT.finditer(text):
        yield _loaded(match[0])
        for inner in _INNER.finditer(match[0], 1):
            yield _loaded(inner[0])


def _loaded(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
