"""A box on a picture: what an answer points at."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle on a picture that counts as 1000 wide and 1000 high.

    Attributes
    ----------
    ref : str or None
        What the box shows, if the answer says so.
    x1, y1, x2, y2 : int
        Left, top, right, bottom, in thousandths of the width and height.
    """

    ref: str | None
    x1: int
    y1: int
    x2: int
    y2: int

    def to_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The corners in pixels of a picture of this size: left, top, right, bottom."""
        return (
            int(self.x1 / 1000 * width),
            int(self.y1 / 1000 * height),
            int(self.x2 / 1000 * width),
            int(self.y2 / 1000 * height),
        )
