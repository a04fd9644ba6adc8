"""The resolution that a message asks for one of its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import ImageSource

LOW_PIXELS = 512 * 512
"""Largest number of pixels of a picture whose `detail` is "low", as in OpenAI's API."""
MOST_PIXELS = 1 << 40
"""Largest number of pixels that may be asked for, far beyond any memory; their ratios stay in the range of a float."""
KEYS = ("min_pixels", "max_pixels", "resized_width", "resized_height")
"""The keys of a part, as in the model cards and `qwen_vl_utils`."""


@dataclasses.dataclass(frozen=True)
class Resolution:
    """The resolution of one picture, instead of the limits of all.

    Attributes
    ----------
    min_pixels, max_pixels : int or None
        Limits of the resized picture.
    resized_width, resized_height : int or None
        Its size in pixels, both or none; it is rounded to whole tokens.
    low : bool
        At most `LOW_PIXELS`, where the other limits allow more.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_width: int | None = None
    resized_height: int | None = None
    low: bool = False

    @classmethod
    def of_part(cls, part: Mapping[str, Any]) -> Resolution | None:
        """Read the resolution of a part of a message; None if it has none.

        Raises
        ------
        QvlError
            A value has a wrong type or is out of range, or a width is without a height.
        """
        found = {key: part[key] for key in KEYS if part.get(key) is not None}
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST_PIXELS:
                raise QvlError(f"the {key!r} of a picture is {value!r:.40}; expected a number of pixels")
        if ("resized_width" in found) != ("resized_height" in found):
            raise QvlError("a picture has one of 'resized_width' and 'resized_height': give both")
        url = part.get("image_url")
        detail = url.get("detail") if isinstance(url, Mapping) else None
        low = "low" in (detail, part.get("detail"))
        return cls(**found, low=low) if found or low else None

    def to_part(self) -> dict[str, Any]:
        """Return the keys of a part: the inverse of `of_part`."""
        found = {key: getattr(self, key) for key in KEYS if getattr(self, key) is not None}
        return found | ({"detail": "low"} if self.low else {})

    @property
    def largest(self) -> int | None:
        """Number of pixels that are asked for, if any."""
        if self.resized_width is not None and self.resized_height is not None:
            return self.resized_width * self.resized_height
        return self.max_pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Resized:
    """A picture with its own resolution."""

    image: ImageSource
    resolution: Resolution
