"""A box on a picture: what an answer points at."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle on a picture.

    Attributes
    ----------
    ref : str or None
        What the box shows, if the answer says so.
    x1, y1, x2, y2 : int
        Left, top, right, bottom, as the model writes them.
    scale : tuple of int
        Width and height of the picture in these numbers: thousandths, or the size to which it was resized.
    """

    ref: str | None
    x1: int
    y1: int
    x2: int
    y2: int
    scale: tuple[int, int] = (1000, 1000)

    def to_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The corners in pixels of a picture of this size: left, top, right, bottom."""
        across, down = self.scale
        return (
            int(self.x1 / across * width),
            int(self.y1 / down * height),
            int(self.x2 / across * width),
            int(self.y2 / down * height),
        )
