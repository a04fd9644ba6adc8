"""From a picture to what the decoder sees of it, computed once for each picture."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Generator
from typing import Protocol, cast

import numpy as np
from PIL import Image

from qvl_kernels.locks import make_lock
from qvl_kernels.ops import Array, Ops
from qvl_runtime.inputs.images import ImageSource, decode_image, image_label, read_image
from qvl_runtime.inputs.picture_cache import PictureCache
from qvl_runtime.inputs.video import FramePair
from qvl_runtime.trace import Trace, no_trace

KNOWN_FILES = 4096

SLICE_LAYERS = 4
"""Layers of a vision part that are computed at a time, while others wait."""


@dataclasses.dataclass(frozen=True)
class Access:
    """What a prompt may open.

    Attributes
    ----------
    paths : bool
        Files of this machine, also by an ``<img>`` tag. Without it such tags are plain text.
    urls : bool
        http(s) URLs.
    salt : str or None
        Whose prompt it is: pictures that were read with another salt count as unknown.
    """

    paths: bool = True
    urls: bool = False
    salt: str | None = None


LOCAL = Access()
"""Files, but no URLs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """A picture as the vision tower reads it.

    Attributes
    ----------
    values : numpy.ndarray
        float32, in the family's own shape.
    tokens : int
        Positions that the picture takes in a prompt.
    grid : tuple of int
        Rows and columns of these positions.
    size, resized : tuple of int
        Width and height of the picture as it was given, and as the tower reads it.
    """

    values: np.ndarray
    tokens: int
    grid: tuple[int, int]
    size: tuple[int, int]
    resized: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a prompt.

    Attributes
    ----------
    key : bytes
        A hash of its pixels, the salt, and everything else that its features depend on. The same picture under two
        names has one key, and a changed file another.
    content : image source or FramePair
        What it can be decoded from again.
    tokens, grid, size, resized
        As in `Pixels`.
    pixels : numpy.ndarray or None
        `Pixels.values` if they were computed already.
    """

    key: bytes
    content: ImageSource | FramePair
    tokens: int
    grid: tuple[int, int]
    size: tuple[int, int]
    resized: tuple[int, int]
    pixels: np.ndarray | None = None


Preprocess = Callable[..., Pixels]
"""How a family prepares an RGB picture, ``preprocess(image)``, or two frames of a video of `count` frames, resized to
`size` if that is not None: ``preprocess(first, second, count, size)``."""


class Vision(Protocol):
    """The vision part of a model."""

    ops: Ops

    def encode(self, pixels: np.ndarray, grid: tuple[int, int], trace: Trace = no_trace) -> Array:
        """What the decoder sees of `Pixels.values`: float32 ``[levels * tokens, hidden]``.

        The first `tokens` rows stand in place of the picture's tokens; further levels are for the decoder's layers.
        """

    def encode_slowly(self, pixels: np.ndarray, grid: tuple[int, int]) -> Generator[None, None, Array]:
        """As `encode`, a few layers at a time: other pictures may be encoded wherever it yields."""


class Turns:
    """Whose picture the arrays of a vision part hold, which has one set of them."""

    def __init__(self) -> None:
        self._last = 0

    def begin(self) -> Callable[[], bool]:
        """Take them; the result tells whether nobody else has done so since."""
        self._last = turn = self._last + 1
        return lambda: self._last == turn


class PictureReader:
    """Decodes pictures and finds out which ones they are.

    Parameters
    ----------
    preprocess : callable
        The family's.
    identity : str
        Names the weights, preprocessing and arithmetic that features depend on.
    upright : bool
        Turn pictures as their EXIF orientation says.
    """

    def __init__(self, preprocess: Preprocess, identity: str = "", *, upright: bool = False):
        self._preprocess, self._identity, self.upright = preprocess, identity, upright
        self._known: OrderedDict[bytes, Picture] = OrderedDict()
        self._lock = make_lock()

    def read(self, source: ImageSource | FramePair, access: Access = LOCAL) -> Picture:
        """Decode a picture or two frames, unless the same bytes were decoded before.

        Raises
        ------
        QvlError
            When it cannot be read, or `access` does not allow it.
        """
        content = _content(source, access)
        salted = b"" if access.salt is None else hashlib.sha256(access.salt.encode()).digest()
        digest = _digest(content, salted)
        with self._lock:
            if digest is not None and digest in self._known:
                self._known.move_to_end(digest)
                return dataclasses.replace(self._known[digest], content=content)
        pixels = self._prepare(content, source)
        facts = {f.name: getattr(pixels, f.name) for f in dataclasses.fields(pixels) if f.name != "values"}
        told = salted + self._identity.encode() + str(pixels.grid).encode()
        key = hashlib.sha256(told + pixels.values.tobytes()).digest()
        if digest is not None:
            with self._lock:
                self._known[digest] = Picture(key, b"", **facts)
                while len(self._known) > KNOWN_FILES:
                    self._known.popitem(last=False)
        return Picture(key, content, **facts, pixels=pixels.values)

    def decode(self, source: ImageSource | FramePair, access: Access = LOCAL) -> Pixels:
        """Decode a picture or two frames and prepare them for the vision tower."""
        return self._prepare(_content(source, access), source)

    def _prepare(self, content: Content, source: ImageSource | FramePair) -> Pixels:
        """Prepare what was read from `source`, which errors name."""
        if isinstance(content, FramePair) and isinstance(source, FramePair):
            names = map(image_label, (source.first, source.second))
            first, second = (decode_image(f, name, exif=self.upright) for f, name in zip(_frames(content), names))
            return self._preprocess(first, second, content.count, content.size)
        assert not isinstance(content, FramePair) and not isinstance(source, FramePair)
        return self._preprocess(decode_image(content, image_label(source), exif=self.upright))


Loaded = bytes | Image.Image | np.ndarray
Content = Loaded | FramePair
"""What was read and can be decoded; of two frames, each was."""


def _content(source: ImageSource | FramePair, access: Access) -> Content:
    def read(image: ImageSource) -> Loaded:
        return read_image(image, allow_urls=access.urls, allow_paths=access.paths)

    if isinstance(source, FramePair):
        return dataclasses.replace(source, first=read(source.first), second=read(source.second))
    return read(source)


def _frames(content: FramePair) -> tuple[Loaded, Loaded]:
    return cast(Loaded, content.first), cast(Loaded, content.second)


def _digest(content: Content, salted: bytes) -> bytes | None:
    """Tells files apart; None for what is decoded already."""
    if isinstance(content, FramePair):
        first, second = (_digest(frame, salted) for frame in _frames(content))
        told = f"{content.count} {content.size}".encode()
        return None if first is None or second is None else hashlib.sha256(first + second + told).digest()
    return hashlib.sha256(salted + content).digest() if isinstance(content, bytes) else None


class PictureEncoder:
    """Encodes pictures, each once as long as the cache holds it.

    Parameters
    ----------
    reader : PictureReader
    vision : Vision
    target : Ops
        The backend the features are for.
    cache : PictureCache
    """

    def __init__(self, reader: PictureReader, vision: Vision, target: Ops, cache: PictureCache):
        self.reader, self.vision, self.cache, self._target = reader, vision, cache, target

    def features(self, picture: Picture) -> Generator[None, None, tuple[Array, bool]]:
        """What the decoder sees (see `Vision.encode`), and whether it was known.

        It yields before each slice of the computation, and stops there if it is closed.
        """
        known = self.cache.get(picture.key)
        if known is not None:
            return self._target.upload(known), True
        yield
        known = self.cache.get(picture.key)  # another may have computed it meanwhile
        if known is not None:
            return self._target.upload(known), True
        # What was read once may be read again: permission was checked then.
        pixels = self.reader.decode(picture.content).values if picture.pixels is None else picture.pixels
        features = yield from self.vision.encode_slowly(pixels, picture.grid)
        values = self.vision.ops.download(features)
        self.cache.put(picture.key, values)
        return features if self._target is self.vision.ops else self._target.upload(values), False

    def encode(self, source: ImageSource, access: Access, trace: Trace) -> np.ndarray:
        """Features of a picture, computed in any case: float32 ``[tokens, hidden]``."""
        pixels = self.reader.decode(source, access)
        features = self.vision.encode(pixels.values, pixels.grid, trace)
        return self.vision.ops.download(features[: pixels.tokens])
