"""Videos, as the frames and times that somebody took from them. Video files are not opened."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import ImageSource

FRAMES_PER_SECOND = 2.0
"""Where a part says nothing: how the models were trained."""

SLOWEST, LATEST = 1e-6, 1e9
"""Frames a second, and seconds: limits that keep positions within what a number can hold."""


@dataclasses.dataclass(frozen=True, eq=False)
class FramePair:
    """Two frames of a video, which a vision tower sees as one picture.

    Attributes
    ----------
    first, second : image source
    count : int
        Frames of the whole video.
    size : tuple of int, optional
        Width and height to which they are resized; by default what the first one asks for.
    """

    first: ImageSource
    second: ImageSource
    count: int
    size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames, and when each of them is seen.

    Attributes
    ----------
    frames : tuple of image source
    times : tuple of float
        Seconds, ascending.
    """

    frames: tuple[ImageSource, ...]
    times: tuple[float, ...]

    @property
    def pairs(self) -> list[FramePair]:
        """The frames by two; an odd last one is doubled."""
        return [FramePair(*two, len(self.frames)) for two in _by_two(self.frames)]

    @property
    def pair_times(self) -> list[float]:
        """The middle of each pair's times in seconds."""
        return [(first + second) / 2 for first, second in _by_two(self.times)]

    @property
    def pair_seconds(self) -> float:
        """Seconds from one pair to the next, on average."""
        steps = len(self.times) - 1
        return 2 * (self.times[-1] - self.times[0]) / steps if steps else 2 / FRAMES_PER_SECOND

    def to_part(self) -> dict[str, Any]:
        """The inverse of `read_video`."""
        return {"type": "video", "video": list(self.frames), "times": list(self.times)}


def _by_two(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(values[i], values[min(i + 1, len(values) - 1)]) for i in range(0, len(values), 2)]


def is_video_part(part: Mapping[str, Any]) -> bool:
    """Whether a part of a message is a video."""
    return "video" in part or "video_url" in part or part.get("type") in ("video", "video_url")


def read_video(part: Mapping[str, Any]) -> Video:
    """The video of a part ``{"type": "video", "video": frames, "fps": 2.0}``, or with "times" instead of "fps".

    Raises
    ------
    QvlError
        When there are no frames, or the times do not fit them.
    """
    frames = part.get("video")
    if not isinstance(frames, Sequence | np.ndarray) or isinstance(frames, str | bytes) or not len(frames):
        raise QvlError(
            "a video is a list of its frames, {'type': 'video', 'video': [image, …], 'fps': 2.0}; video files are not "
            f"opened: take frames from it; found {frames!r:.60}"
        )
    times = part.get("times")
    if times is None:
        fps = part.get("fps", FRAMES_PER_SECOND)
        if not _is_number(fps) or fps < SLOWEST:
            raise QvlError(f"the 'fps' of a video is {fps!r:.40}; expected frames a second, above 0")
        times = [i / fps for i in range(len(frames))]
    elif "fps" in part:
        raise QvlError("a video has 'fps' and 'times'; give one of them")
    if not isinstance(times, Sequence | np.ndarray) or len(times) != len(frames) or not all(map(_is_number, times)):
        raise QvlError(f"the 'times' of a video must be {len(frames)} numbers, a second for each frame")
    times = [float(time) for time in times]
    if times[0] < 0 or any(a > b for a, b in itertools.pairwise(times)):
        raise QvlError("the 'times' of a video must be ascending and not below 0")
    return Video(tuple(frames), tuple(times))


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and abs(value) <= LATEST
