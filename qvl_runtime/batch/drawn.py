"""Draw the boxes of answers on the pictures of a job."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_runtime.batch.answers import LIMITS, Record, located
from qvl_runtime.batch.options import Options
from qvl_runtime.batch.rows import RESPONSES, Row
from qvl_runtime.boxes import Box
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import load_image
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.openai.items import read_items
from qvl_runtime.openai.messages import read_messages

log = logging.getLogger(__name__)

LONGEST_NAME = 200
"""Largest number of bytes of an id in a file name; file systems allow 255 for the whole name."""


def draw(
    rows: Sequence[Row],
    records: Sequence[Record],
    root: Path,
    folder: Path,
    options: Options,
    *,
    exif: bool,
    again: bool = True,
) -> None:
    """Save the last picture of each row with boxes as ``NUMBER-ID.png``; log a picture that cannot be drawn.

    Without `again` only missing ones are drawn.
    """
    for row, record in zip(rows, records):
        path = folder / f"{row.number:06d}-{_safe(row.id or '')}.png"
        if (boxes := _boxes(record)) and (again or not path.exists()):
            try:
                source = located(_last_picture(row, options), root)
                picture = load_image(source, allow_urls=options.allow_urls, exif=exif)
                draw_boxes(picture, [_on_picture(box, picture.size) for box in boxes], path)
            except (QvlError, ApiError) as error:
                log.warning("row %d is not drawn: %s", row.number, error)


def _on_picture(box: Mapping[str, Any], size: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = box["pixels"]
    return Box(box["ref"], x1, y1, x2, y2, scale=size)


def _boxes(record: Record) -> list[Mapping[str, Any]]:
    boxes: list[Mapping[str, Any]] = []
    if record.get("response") is None:
        boxes = record["boxes"] or []
    else:
        body = record["response"]["body"]
        for choice in body.get("choices", ())[:1]:
            boxes += choice.get("message", {}).get("boxes") or []
        for item in body.get("output", ()):
            for part in item.get("content", ()):
                boxes += part.get("boxes") or []
    return [box for box in boxes if box["pixels"] is not None]


def _last_picture(row: Row, options: Options) -> str | bytes:
    """Return the picture that the boxes of a row's answer lie on; it may be a frame of a video."""
    if row.body is None:
        return row.pictures[-1]
    if row.url == RESPONSES:
        return read_items(row.body["input"], None, LIMITS, options.allow_urls).sources[-1]
    return read_messages(row.body["messages"], LIMITS, options.allow_urls).sources[-1]


def _safe(row_id: str) -> str:
    """Convert an id to a part of a file name."""
    return re.sub(r"[^\w.-]+", "_", row_id).encode()[-LONGEST_NAME:].decode(errors="ignore")
