"""Bounding boxes in a picture, and their overlap."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Box:
    """A bounding box in a picture.

    Attributes
    ----------
    ref : str or None
        The label of the box, if the answer has one.
    x1, y1, x2, y2 : int or float
        Left, top, right, bottom, as written by the model. Whole numbers as a rule; a JSON answer may have fractions.
    scale : tuple of int
        Width and height of the picture in the units of these coordinates: 1000, or the resized size in pixels.
    """

    ref: str | None
    x1: float
    y1: float
    x2: float
    y2: float
    scale: tuple[int, int] = (1000, 1000)

    def to_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Convert to pixels of a picture of this size: left, top, right, bottom."""
        across, down = self.scale
        return (
            int(self.x1 / across * width),
            int(self.y1 / down * height),
            int(self.x2 / across * width),
            int(self.y2 / down * height),
        )


def iou(a: Box, b: Box) -> float:
    """Compute the intersection over union of two boxes, for any order of corners; 1 for equal boxes."""
    if (a.x1, a.y1, a.x2, a.y2) == (b.x1, b.y1, b.x2, b.y2):
        return 1.0
    (ax1, ax2), (ay1, ay2) = sorted((a.x1, a.x2)), sorted((a.y1, a.y2))
    (bx1, bx2), (by1, by2) = sorted((b.x1, b.x2)), sorted((b.y1, b.y2))
    shared = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared
    return shared / union if union else 0.0
