"""Draw the boxes of answers on the pictures of a job."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from qvl_runtime.batch.answers import LIMITS, located
from qvl_runtime.batch.options import Options
from qvl_runtime.batch.records import Corners, Record, boxes_of
from qvl_runtime.batch.rows import RESPONSES, Row, Source, rows_at
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
    source: Source,
    numbers: Sequence[int],
    records: Sequence[Record],
    folder: Path,
    options: Options,
    *,
    exif: bool,
    again: bool = True,
) -> None:
    """Save the last picture of each row with boxes as ``NUMBER-ID.png``; log a picture that cannot be drawn.

    Without `again` only missing ones are drawn. Other rows are not read, which may hold gigabytes of pictures.
    """
    left = {}
    for number, record in zip(numbers, records):
        path = folder / f"{number:06d}-{_safe(str(record.get('custom_id') or record.get('id')))}.png"
        if (boxes := boxes_of(record)) and (again or not path.exists()):
            left[number] = path, boxes
    if not left:
        return
    for row in rows_at(source, list(left)):
        path, boxes = left[row.number]
        try:
            place = located(_last_picture(row, options), source.root)
            picture = load_image(place, allow_urls=options.allow_urls, exif=exif)
            draw_boxes(picture, [_on_picture(label, pixels, picture.size) for label, pixels in boxes], path)
        except (QvlError, ApiError) as error:
            log.warning("row %d is not drawn: %s", row.number, error)


def _on_picture(label: str | None, pixels: Corners, size: tuple[int, int]) -> Box:
    # `Box.to_pixels` truncates, and 15 / 22 * 22 is less than 15: with half a pixel more it gives these pixels.
    left, top, right, bottom = (pixel + 0.5 for pixel in pixels)
    return Box(label, left, top, right, bottom, scale=size)


def _last_picture(row: Row, options: Options) -> str | bytes:
    """Return the picture that the boxes of a row's answer lie on; it may be a frame of a video."""
    sources: Sequence[str | bytes] = row.pictures
    if row.url == RESPONSES and row.body is not None:
        sources = read_items(row.body.get("input"), None, LIMITS, options.allow_urls).sources
    elif row.body is not None:
        sources = read_messages(row.body.get("messages"), LIMITS, options.allow_urls).sources
    if not sources:
        raise QvlError("it has no picture")
    return sources[-1]


def _safe(row_id: str) -> str:
    """Convert an id to a part of a file name."""
    return re.sub(r"[^\w.-]+", "_", row_id).encode()[-LONGEST_NAME:].decode(errors="ignore")
