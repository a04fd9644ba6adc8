"""Preprocessing of pictures for Qwen-VL: one square size, CLIP's mean and standard deviation."""

from __future__ import annotations

import numpy as np
from PIL import Image

from qvl_runtime.errors import QvlError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(image: Image.Image, image_size: int, mean: np.ndarray = MEAN, std: np.ndarray = STD) -> np.ndarray:
    """Resize and normalize a picture for the vision tower.

    Parameters
    ----------
    image : PIL.Image.Image
        Mode RGB.
    image_size : int
        Side S in pixels; the aspect ratio is not preserved.
    mean, std : numpy.ndarray
        float32 [3]: mean and standard deviation of red, green and blue in 0..1; by default those of CLIP.

    Returns
    -------
    numpy.ndarray
        float32 [3, S, S]: bicubic (antialiased, rounded to uint8 as Pillow does), divided by 255, less the mean,
        divided by the standard deviation.
    """
    resized = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def patches(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut a picture into patches, so that the first convolution is a matrix product.

    Parameters
    ----------
    pixels : numpy.ndarray
        float32 [3, S, S], S a multiple of `patch_size`.
    patch_size : int
        Side p of a patch in pixels.

    Returns
    -------
    numpy.ndarray
        float32 [(S/p)**2, 3*p*p]: patches in row-major order; values as in ``conv1.weight.reshape(width, -1)``.
    """
    channels, side, _ = pixels.shape
    if side % patch_size:
        raise QvlError(f"image_size {side} is no multiple of patch_size {patch_size}")
    grid = side // patch_size
    cut = pixels.reshape(channels, grid, patch_size, grid, patch_size).transpose(1, 3, 0, 2, 4)
    return cut.reshape(grid * grid, channels * patch_size * patch_size)
