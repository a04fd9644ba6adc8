"""From a picture to what the decoder sees of it, computed once for each picture."""

from __future__ import annotations

import json
import os
import threading
from functools import partial

import numpy as np

from qvl_kernels.ops import Array, Ops
from qvl_runtime.families.qwen_vl.adapter import Adapter
from qvl_runtime.families.qwen_vl.vision import VisionTower
from qvl_runtime.families.weights import Trace, Weights, no_trace
from qvl_runtime.file.blob import Blob
from qvl_runtime.inputs.image_cache import ImageCache, Picture
from qvl_runtime.inputs.images import ImageSource, load_image, preprocess

FEATURES_VERSION = 3
"""To be raised where preprocessing or the vision tower's arithmetic changes: what is on disk is then void."""


class PictureEncoder:
    """The vision tower and the adapter, with a cache of what they computed.

    Parameters
    ----------
    weights : Weights
        Of a model with a vision part, on the backend that encodes.
    target : Ops
        The backend the features are for.
    activations : str
        See `load`; part of what features depend on.
    memory, folder
        See `ImageCache`.
    device : threading.RLock
        Held while something is computed.
    """

    def __init__(
        self,
        weights: Weights,
        target: Ops,
        *,
        activations: str,
        memory: int,
        folder: str | os.PathLike | None,
        device: threading.RLock,
    ):
        config = weights.blob.config
        self._target = target
        self._ops, self._device, self._size = weights.ops, device, config.visual.image_size
        self._tower, self._adapter = VisionTower(weights), Adapter(weights)
        identity = _identity(weights.blob, weights.ops.name, activations)
        self.cache = ImageCache((config.visual.n_queries, config.hidden_size), identity, memory, folder)

    def read(self, image: ImageSource, *, allow_urls: bool = False) -> Picture:
        """Decode a picture if it is new, so that nothing but arithmetic is left to fail."""
        return self.cache.picture(image, partial(self._pixels, allow_urls=allow_urls))

    def features(self, picture: Picture) -> tuple[Array, bool]:
        """What the decoder sees, float32 ``[n_queries, hidden]``, and whether it was known."""
        known = self.cache.get(picture.key)
        if known is not None:
            return self._target.upload(known), True
        pixels = self._pixels(picture.content) if picture.pixels is None else picture.pixels
        features = self._encode(pixels, no_trace)
        values = self._ops.download(features)
        self.cache.put(picture.key, values)
        return features if self._target is self._ops else self._target.upload(values), False

    def encode(self, image: ImageSource, *, allow_urls: bool, trace: Trace) -> np.ndarray:
        """Features of a picture, computed in any case."""
        return self._ops.download(self._encode(self._pixels(image, allow_urls=allow_urls), trace))

    def _pixels(self, image: ImageSource, *, allow_urls: bool = False) -> np.ndarray:
        return preprocess(load_image(image, allow_urls=allow_urls), self._size)

    def _encode(self, pixels: np.ndarray, trace: Trace) -> Array:
        with self._device:
            return self._adapter(self._tower(pixels, trace), trace)


def _identity(blob: Blob, backend: str, activations: str) -> str:
    """What the features of a picture depend on besides its pixels."""
    weights, config = blob.hashes("transformer.visual."), vars(blob.config.visual)
    return json.dumps([FEATURES_VERSION, weights, config, backend, activations], sort_keys=True)
