"""A bounding box in a picture."""

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
