"""Overlap of boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

SIDE = 999
"""Divisor of coordinates in Qwen-VL's evaluation; its chat code divides by 1000."""

LEAST = 0.5
_CORNERS = re.compile(r"\((.*?)\),\((.*?)\)")

Corners = Sequence[float]
"""Left, top, right, bottom."""


def first_box(text: str, width: float, height: float) -> list[float]:
    """Return the first box of a Qwen-VL answer in pixels; zeros if there is none or it is malformed."""
    found = _CORNERS.search(text)
    try:
        if found is None or "," not in found[1] or "," not in found[2]:
            return [0.0] * 4
        (x1, y1), (x2, y2) = ([float(value) for value in corner.split(",")] for corner in found.groups())
    except ValueError:
        return [0.0] * 4
    box = np.array([x1, y1, x2, y2], np.float32) / np.float32(SIDE)
    return [float(v) for v in box * np.array([width, height, width, height], np.float32)]


def iou(a: Corners, b: Corners) -> float:
    """Compute the intersection over union, in float32 as in the published evaluation."""
    first, second = np.asarray(a, np.float32), np.asarray(b, np.float32)
    sides = np.clip(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0, None)
    shared = sides[0] * sides[1]
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return float(shared / (areas - shared))


def hit(found: Corners, true: Corners) -> float:
    """Return 1 if the IoU with the reference is at least 0.5, else 0."""
    return float(iou(found, true) >= LEAST)
