"""The parts of an answer, and its boxes and calls, in the client's format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qvl_runtime.boxes import Box
from qvl_runtime.engine.generation import Piece
from qvl_runtime.inputs.tools import CallReader
from qvl_runtime.model import Model
from qvl_runtime.openai.pictures import Sent
from qvl_runtime.openai.requests import Asked
from qvl_runtime.results import Result


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the answer with this index."""

    index: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class Whole:
    """The answer with this index is complete; the boxes are in the client's format."""

    index: int
    result: Result
    boxes: list[dict[str, Any]]


def call_reader(model: Model, asked: Asked) -> Callable[[], CallReader] | None:
    """Return what creates the reader of an answer's calls, if the request has tools and the model takes them."""
    calling = model.blob.family.calling
    return None if calling is None or asked.options["tools"] is None else calling.reader


def described(boxes: Sequence[Box], pictures: Sequence[Sent]) -> list[dict[str, Any]]:
    """Return boxes in the client's format. They refer to the last picture; without one they have no pixels."""
    size = (pictures[-1].width, pictures[-1].height) if pictures else None
    image = len(pictures) - 1 if pictures else None
    return [{**box_fields(box, size), "image": image} for box in boxes]


def box_fields(box: Box, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return a box as JSON types: the model's coordinates, and pixels of a picture of `size`, if there is one."""
    pixels = None if size is None else list(box.to_pixels(*size))
    return {"ref": box.ref, "numbers": [box.x1, box.y1, box.x2, box.y2], "pixels": pixels}
