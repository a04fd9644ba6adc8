"""Preprocessing of pictures for Qwen2-VL and its successors: any size, cut into patches.

The EXIF orientation is applied and transparency is dropped, for every kind of source.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.config import FRAMES, MERGE, VisionConfig, refuse, section
from qvl_runtime.families.reading import LARGEST, check, take, three
from qvl_runtime.inputs.pictures import Pixels
from qvl_runtime.inputs.resolution import LOW_PIXELS, MOST_PIXELS, Resolution

MAX_ASPECT_RATIO = 200
MAX_TOKENS = 1280
"""Default limit of tokens per picture. `max_pixels` overrides it. The published limits are up to 16384."""

LEAST_TOKENS, MOST_TOKENS = 4, 16384
"""Limits of a picture whose size is given, as in `qwen_vl_utils`."""


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float, frames: int = 1
) -> tuple[int, int]:
    """Compute the size to resize a picture to: multiples of `factor`, close to its size and aspect ratio.

    Parameters
    ----------
    height, width : int
        Size of the picture in pixels.
    factor : int
        Side of a token's cell in pixels.
    min_pixels, max_pixels : float
        Limits of the result. It can be slightly larger if a side would become 0.
    frames : int
        Number of frames that have the limits together.

    Returns
    -------
    tuple of int
        Height and width.

    Raises
    ------
    QvlError
        If one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise QvlError(
            f"a picture of {width} x {height} pixels has one side more than {MAX_ASPECT_RATIO} times the other; crop it"
        )
    rows, columns = round(height / factor), round(width / factor)
    # An odd number of frames is rounded here, half to even, but not below: so it is in the published code.
    counted = 1 if frames == 1 else round(frames / FRAMES) * FRAMES
    pixels = counted * rows * columns * factor**2
    if pixels > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize a picture with Pillow's antialiased bicubic filter; the result is that of Pillow 12.3 in every version.

    Pillow filters one axis after the other and rounds to whole grey levels in between, so their order matters. Up to
    version 12 a row's pixels are filtered first; since 12.3 not in a picture that is more than 100 times as high as
    wide and becomes lower. Version 13 filters columns first more often (python-pillow/Pillow#9524 and #9549), which
    changes pixels by up to 10 grey levels. The models were trained with the older order. A call for each axis has the
    same order in all versions.

    Parameters
    ----------
    image : PIL.Image.Image
        Mode RGB.
    width, height : int
        Size of the result in pixels.
    """
    columns_first = image.height > 100 * image.width and height < image.height
    between = (image.width, height) if columns_first else (width, image.height)
    return image.resize(between, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)


def patch_rows(frames: Sequence[np.ndarray], patch_size: int) -> np.ndarray:
    """Cut frames into patches; the four patches of a token are adjacent.

    Parameters
    ----------
    frames : sequence of ndarray
        Frames of one size, float32 ``[height, width, 3]``; both sides are multiples of twice the patch size. A patch
        spans all frames.
    patch_size : int
        Side p of a patch in pixels.

    Returns
    -------
    ndarray
        float32 ``[patches, 3 * frames * p * p]``: tokens and the patches of a token are row-major; the values of a
        patch have the order channel, frame, row, column.
    """
    stacked = np.stack(frames)
    count, height, width, channels = stacked.shape
    rows, columns = height // patch_size, width // patch_size
    cells = stacked.reshape(count, rows // MERGE, MERGE, patch_size, columns // MERGE, MERGE, patch_size, channels)
    ordered = cells.transpose(1, 4, 2, 5, 7, 0, 3, 6)
    return ordered.reshape(rows * columns, channels * count * patch_size**2)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing settings of a checkpoint.

    Attributes
    ----------
    min_pixels, max_pixels : int
        Limits of the resized picture.
    mean, std : tuple of float
        Mean and standard deviation of the red, green and blue values in 0..1.
    """

    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], vision: VisionConfig, where: str) -> Self:
        """Parse a published `preprocessor_config.json`, or the result of `to_dict`.

        The limits are `min_pixels` and `max_pixels`, or in `size`, whose "edges" are numbers of pixels, too.

        Raises
        ------
        QvlError
            For a missing key, or an unsupported value.
        """
        known = {"patch_size": vision.patch_size, "merge_size": MERGE, "temporal_patch_size": FRAMES, "resample": 3}
        known |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
        refuse(data, where, known)
        factor = 1 / 255 if data.get("rescale_factor") is None else take(data, "rescale_factor", float, where)
        check(abs(factor * 255 - 1) < 1e-6, where, f"'rescale_factor' is {factor!r}, expected 1/255")
        limits = _limits(data, where)
        return cls(*limits, three(data, "image_mean", where), three(data, "image_std", where, 1 / LARGEST))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return {
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def limited(self, min_pixels: int | None, max_pixels: int | None, factor: int) -> Preprocessing:
        """Return these settings with the requested limits.

        Without `max_pixels` a picture has at most `MAX_TOKENS` tokens of `factor` x `factor` pixels.

        Raises
        ------
        QvlError
            If they contradict each other, or allow less than one token.
        """
        highest = min(self.max_pixels, MAX_TOKENS * factor**2) if max_pixels is None else max_pixels
        lowest = min(self.min_pixels, highest) if min_pixels is None else min_pixels
        if highest < factor**2:
            raise QvlError(f"max_pixels is {highest}; one token takes {factor**2} pixels")
        if highest > MOST_PIXELS:
            raise QvlError(f"max_pixels is {highest}; at most {MOST_PIXELS} are computed")
        if not 0 < lowest <= highest:
            raise QvlError(f"min_pixels is {lowest}, expected 1 to max_pixels, {highest}")
        return dataclasses.replace(self, min_pixels=lowest, max_pixels=highest)

    def wanted(self, resolution: Resolution | None, factor: int) -> Preprocessing:
        """Return these settings with the limits of a picture's own resolution.

        Raises
        ------
        QvlError
            As for `limited`.
        """
        if resolution is None:
            return self
        lowest, highest = resolution.min_pixels, resolution.max_pixels
        if resolution.low:
            highest = min(LOW_PIXELS, self.max_pixels if highest is None else highest)
        if lowest is None and highest is None:
            return self
        return self.limited(lowest, self.max_pixels if highest is None else highest, factor)

    def normalized(self, image: Image.Image) -> np.ndarray:
        """Return pixels float32 ``[height, width, 3]``, rounded in each step as in the published code.

        A value depends only on the channel and its grey level, of which there are 256.
        """
        scaled = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
        pixels = np.asarray(image)
        normal = np.empty(pixels.shape, np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std)):
            levels = (scaled - np.float32(mean)) / np.float32(std)
            normal[..., channel] = levels[pixels[..., channel]]
        return normal

    def patches(
        self, image: Image.Image, patch_size: int, resolution: Resolution | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Resize a picture and cut it into patches.

        Parameters
        ----------
        image : PIL.Image.Image
            Mode RGB.
        patch_size : int
            Side of a patch in pixels.
        resolution : Resolution, optional
            The picture's own resolution.

        Returns
        -------
        values : ndarray
            float32 ``[patches, 3 * 2 * p * p]``; the picture is used for both frames; see `patch_rows`.
        size : tuple of int
            Width and height of the resized picture.
        """
        factor = patch_size * MERGE
        limits, height, width = self.wanted(resolution, factor), image.height, image.width
        if resolution is not None and resolution.resized_height and resolution.resized_width:
            height, width = resolution.resized_height, resolution.resized_width
            limits = dataclasses.replace(self, min_pixels=LEAST_TOKENS * factor**2, max_pixels=MOST_TOKENS * factor**2)
        height, width = smart_resize(height, width, factor, limits.min_pixels, limits.max_pixels)
        return self.frame_patches([image] * FRAMES, patch_size, (width, height)), (width, height)

    def frame_patches(self, frames: Sequence[Image.Image], patch_size: int, size: tuple[int, int]) -> np.ndarray:
        """Resize frames to a width and height, and cut them into patches; see `patch_rows`."""
        first, last = frames[0], frames[-1]
        values = self.normalized(resize(first, *size))
        again = values if last is first else self.normalized(resize(last, *size))
        return patch_rows([values, again], patch_size)


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """Limits of the resized frames of a video.

    Attributes
    ----------
    min_pixels, max_pixels : int
        Limits of one frame, or of all together.
    whole : bool
        Whether the limits apply to all frames together (Qwen3-VL).
    """

    min_pixels: int
    max_pixels: int
    whole: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], default: Self, where: str) -> Self:
        """Parse a published `video_preprocessor_config.json`, or the result of `to_dict`; by default `default`."""
        given = data.get("size") or data.get("min_pixels") or data.get("max_pixels")
        low, high = _limits(data, where) if given else (default.min_pixels, default.max_pixels)
        return cls(low, high, default.whole)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}

    def size(self, image: Image.Image, count: int, factor: int, highest: int) -> tuple[int, int]:
        """Return width and height for `count` frames like `image`; no frame has more than `highest` pixels."""
        frames = max(FRAMES, count) if self.whole else 1
        height, width = image.height, image.width
        if self.whole and min(height, width) < factor:  # first enlarged, as in the published code
            height, width = (int(side * (factor / min(height, width))) for side in (height, width))
        size = smart_resize(height, width, factor, self.min_pixels, self.max_pixels, frames)
        if size[0] * size[1] > highest:
            size = smart_resize(height, width, factor, min(self.min_pixels / frames, highest), highest)
        height, width = size
        return width, height


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Preprocessing of pictures and frames: `qvl_runtime.inputs.pictures.Preprocess`."""

    settings: Preprocessing
    video: VideoLimits
    vision: VisionConfig

    @property
    def max_pixels(self) -> int:
        """Limit of a resized picture without a resolution of its own."""
        return self.settings.max_pixels

    def __call__(
        self,
        image: Image.Image,
        second: Image.Image | None = None,
        count: int = 0,
        size: tuple[int, int] | None = None,
        *,
        resolution: Resolution | None = None,
    ) -> Pixels:
        """Preprocess a picture, or two frames of a video of `count` frames."""
        factor = self.vision.factor
        if second is None:
            values, size = self.settings.patches(image, self.vision.patch_size, resolution)
        else:
            size = size or self.video.size(image, count, factor, self.settings.max_pixels)
            values = self.settings.frame_patches([image, second], self.vision.patch_size, size)
        return Pixels(values, len(values) // MERGE**2, (size[1] // factor, size[0] // factor), image.size, size)


def _limits(data: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return `min_pixels` and `max_pixels`, or the values of `size`, where they are called edges."""
    size = data.get("size")
    size = size if isinstance(size, Mapping) else {}
    low, high = (
        take({key: data.get(key) or size.get(edge)}, key, int, where)
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    check(high <= MOST_PIXELS, where, f"'max_pixels' is {high}, expected at most {MOST_PIXELS}")
    check(0 < low <= high, where, f"'min_pixels' {low} and 'max_pixels' {high} contradict")
    return low, high


FILES = ("preprocessor_config.json", "processor_config.json")
"""Files with the preprocessing settings of a published checkpoint; the second has them in sections."""


def find_settings(folder: Path) -> Path:
    """Return the file with the preprocessing settings of pictures.

    Raises
    ------
    QvlError
        If there is none.
    """
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise QvlError(f"{folder / FILES[0]}: no such file; finish the download")
    return found


def find_video_settings(folder: Path) -> Path | None:
    """Return the file that may have preprocessing settings of videos; None if there is none."""
    names = "video_preprocessor_config.json", FILES[1]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def settings_in(data: Mapping[str, Any], part: str, path: Path) -> Mapping[str, Any]:
    """Return the settings of `part`, "image_processor" or "video_processor", in the contents of a file; {} if none."""
    if part in data:
        return section(data, part, str(path))
    return {} if path.name == FILES[1] else data
