"""Boxes: how much of them overlaps."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

SIDE = 999
"""What Qwen-VL's evaluation divides coordinates by; its chat code divides by 1000."""

LEAST = 0.5
_CORNERS = re.compile(r"\((.*?)\),\((.*?)\)")

Corners = Sequence[float]
"""Left, top, right, bottom."""


def first_box(text: str, width: float, height: float) -> list[float]:
    """The first box of a Qwen-VL answer in pixels; zeros where there is none, or a number of it is none."""
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
    """Intersection over union, in float32 as the published evaluation computes it."""
    first, second = np.asarray(a, np.float32), np.asarray(b, np.float32)
    sides = np.clip(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0, None)
    shared = sides[0] * sides[1]
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return float(shared / (areas - shared))


def hit(found: Corners, true: Corners) -> float:
    """1 for a box that overlaps the true one by at least a half, else 0."""
    return float(iou(found, true) >= LEAST)
