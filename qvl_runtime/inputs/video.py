"""Videos as lists of frames with times. Video files are not opened."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import ImageSource

FRAMES_PER_SECOND = 2.0
"""Default rate, with which the models were trained."""

SLOWEST, LATEST = 1e-6, 1e9
"""Smallest frame rate and largest time in seconds; they keep positions in range."""


@dataclasses.dataclass(frozen=True, eq=False)
class FramePair:
    """Two frames of a video, which the vision tower encodes as one picture.

    Attributes
    ----------
    first, second : image source
    count : int
        Number of frames of the whole video.
    size : tuple of int, optional
        Width and height to resize to; by default derived from the first frame.
    """

    first: ImageSource
    second: ImageSource
    count: int
    size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames with their times.

    Attributes
    ----------
    frames : tuple of image source
    times : tuple of float
        Seconds, in ascending order.
    """

    frames: tuple[ImageSource, ...]
    times: tuple[float, ...]

    @property
    def pairs(self) -> list[FramePair]:
        """Pairs of frames; an odd last frame is repeated."""
        return [FramePair(*two, len(self.frames)) for two in _by_two(self.frames)]

    @property
    def pair_times(self) -> list[float]:
        """The mean time of each pair in seconds."""
        return [(first + second) / 2 for first, second in _by_two(self.times)]

    @property
    def pair_seconds(self) -> float:
        """Mean seconds between pairs."""
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
    """Parse a part ``{"type": "video", "video": frames, "fps": 2.0}``, or with "times" instead of "fps".

    The frames are a list of image sources, or an array ``[frames, height, width, channels]``.

    Raises
    ------
    QvlError
        If there are no frames, or the times do not match them.
    """
    frames = part.get("video")
    if not isinstance(frames, Sequence | np.ndarray) or isinstance(frames, str | bytes) or not len(frames):
        raise QvlError(
            "a video is a list of its frames, {'type': 'video', 'video': [image, …], 'fps': 2.0}; video files are not "
            f"opened: take frames from it; found {frames!r:.60}"
        )
    if isinstance(frames, np.ndarray) and frames.ndim != 4:  # [height, width, 3] is one picture
        raise QvlError(
            f"a video as an array has the shape [frames, height, width, 3], not {list(frames.shape)}; pass a list of "
            "pictures, or stack them"
        )
    times = part.get("times")
    if times is None:
        fps = part.get("fps", FRAMES_PER_SECOND)
        if not is_number(fps) or fps < SLOWEST:
            raise QvlError(f"the 'fps' of a video is {fps!r:.40}; expected frames a second, above 0")
        times = [i / fps for i in range(len(frames))]
    elif "fps" in part:
        raise QvlError("a video has 'fps' and 'times'; give one of them")
    if not isinstance(times, Sequence | np.ndarray) or len(times) != len(frames) or not all(map(is_number, times)):
        raise QvlError(f"the 'times' of a video must be {len(frames)} numbers, a second for each frame")
    times = [float(time) for time in times]
    if times[0] < 0 or any(a > b for a, b in itertools.pairwise(times)):
        raise QvlError("the 'times' of a video must be ascending and not below 0")
    return Video(tuple(frames), tuple(times))


def is_number(value: Any) -> bool:
    """Whether a value is a number that a time in seconds or a rate of frames may be."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and abs(value) <= LATEST
