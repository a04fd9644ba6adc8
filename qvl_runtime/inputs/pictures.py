"""Reading and encoding pictures; each picture is encoded once while it is cached."""

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
from qvl_runtime.inputs.prepared import Prepared, PreparedPictures
from qvl_runtime.inputs.resolution import Resized
from qvl_runtime.inputs.video import FramePair
from qvl_runtime.trace import Trace, no_trace

KNOWN_FILES = 4096

SLICE_LAYERS = 4
"""Vision layers per slice; the engine may run other work between slices."""


@dataclasses.dataclass(frozen=True)
class Access:
    """The sources that a prompt may open.

    Attributes
    ----------
    paths : bool
        Allow local files, also in ``<img>`` tags. If False, these tags are plain text.
    urls : bool
        Allow http(s) URLs.
    salt : str or None
        Partition of the caches: pictures that were read with another salt are not reused.
    """

    paths: bool = True
    urls: bool = False
    salt: str | None = None


LOCAL = Access()
"""Files are allowed, URLs are not."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """A picture as input of the vision tower.

    Attributes
    ----------
    values : numpy.ndarray
        float32; the shape depends on the family.
    tokens : int
        Number of positions of the picture in a prompt.
    grid : tuple of int
        Rows and columns of these positions.
    size, resized : tuple of int
        Width and height of the original picture, and of the tower's input.
    """

    values: np.ndarray
    tokens: int
    grid: tuple[int, int]
    size: tuple[int, int]
    resized: tuple[int, int]


Source = ImageSource | Resized | FramePair
"""A picture, or two frames that are encoded as one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a prompt.

    Attributes
    ----------
    key : bytes
        A hash of the pixels, the salt, and everything else that the features depend on. It does not depend on the
        file's name, and it changes with the file's content.
    content : image source, Resized or FramePair
        The source for decoding the picture again.
    tokens, grid, size, resized
        As in `Pixels`.
    prepared : Prepared or None
        `Pixels.values`, if it was computed for this picture.
    """

    key: bytes
    content: Source
    tokens: int
    grid: tuple[int, int]
    size: tuple[int, int]
    resized: tuple[int, int]
    prepared: Prepared | None = None


Preprocess = Callable[..., Pixels]
"""A family's preprocessing of an RGB picture, ``preprocess(image, resolution=None)``, or of two frames of a video of
`count` frames: ``preprocess(first, second, count, size)``. Frames are resized to `size` unless it is None."""


class Vision(Protocol):
    """The vision part of a model."""

    ops: Ops

    def encode(self, pixels: np.ndarray, grid: tuple[int, int], trace: Trace = no_trace) -> Array:
        """Compute the features of `Pixels.values`: float32 ``[levels * tokens, hidden]``.

        The first `tokens` rows replace the embeddings of the picture's tokens. Further levels are inputs of decoder
        layers.
        """

    def encode_slowly(self, pixels: np.ndarray, grid: tuple[int, int]) -> Generator[None, None, Array]:
        """Encode in slices of a few layers. Other pictures may be encoded wherever it yields. See `encode`."""


class ArrayClaims:
    """Tracks which picture the arrays of a vision part hold; there is one set of arrays."""

    def __init__(self) -> None:
        self._last = 0

    def claim(self) -> Callable[[], bool]:
        """Claim the arrays. The returned function tells whether the claim is still the latest."""
        self._last = number = self._last + 1
        return lambda: self._last == number


class PictureReader:
    """Decodes pictures and identifies them by content.

    Parameters
    ----------
    preprocess : callable
        The family's preprocessing.
    identity : str
        Identifies the weights, preprocessing and arithmetic that features depend on.
    upright : bool
        Apply the EXIF orientation.

    Attributes
    ----------
    max_pixels : int or None
        The largest size of a picture that asks for none; None if all have one size.
    """

    def __init__(self, preprocess: Preprocess, identity: str = "", *, upright: bool = False):
        self._preprocess, self._identity, self.upright = preprocess, identity, upright
        self.max_pixels: int | None = getattr(preprocess, "max_pixels", None)
        self._known: OrderedDict[bytes, Picture] = OrderedDict()
        self._prepared = PreparedPictures()
        self._lock = make_lock()

    def read(self, source: Source | Picture, access: Access = LOCAL) -> Picture:
        """Read a picture or two frames; decode them unless the same bytes were decoded before.

        The result of an earlier call is returned as it is.

        Raises
        ------
        QvlError
            If the source cannot be read, or `access` does not allow it.
        """
        if isinstance(source, Picture):
            return source
        content = _content(source, access)
        salt = access.salt
        salted = b"" if salt is None else hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
        digest = _digest(content, salted)
        with self._lock:
            if digest is not None and digest in self._known:
                self._known.move_to_end(digest)
                return dataclasses.replace(self._known[digest], content=content)
        pixels = self._prepare(content, source)
        facts = {f.name: getattr(pixels, f.name) for f in dataclasses.fields(pixels) if f.name != "values"}
        told = salted + self._identity.encode() + str(pixels.grid).encode()
        hashed = hashlib.sha256(told)
        hashed.update(np.ascontiguousarray(pixels.values).data)  # without a copy
        key = hashed.digest()
        if digest is not None:
            with self._lock:
                self._known[digest] = Picture(key, b"", **facts)
                while len(self._known) > KNOWN_FILES:
                    self._known.popitem(last=False)
        return Picture(key, content, **facts, prepared=self._prepared.hold(pixels.values))

    def decode(self, source: Source, access: Access = LOCAL) -> Pixels:
        """Decode and preprocess a picture or two frames."""
        return self._prepare(_content(source, access), source)

    def _prepare(self, content: Content, source: Source) -> Pixels:
        """Preprocess the content of `source`; errors name the source."""
        if isinstance(content, FramePair) and isinstance(source, FramePair):
            names = map(image_label, (source.first, source.second))
            first, second = (decode_image(f, name, exif=self.upright) for f, name in zip(_frames(content), names))
            return self._preprocess(first, second, content.count, content.size)
        assert not isinstance(content, FramePair) and not isinstance(source, FramePair)
        if isinstance(content, Resized) and isinstance(source, Resized):
            decoded = decode_image(cast(Loaded, content.image), image_label(source.image), exif=self.upright)
            return self._preprocess(decoded, resolution=content.resolution)
        assert not isinstance(content, Resized) and not isinstance(source, Resized)
        return self._preprocess(decode_image(content, image_label(source), exif=self.upright))


Loaded = bytes | Image.Image | np.ndarray
Content = Loaded | Resized | FramePair
"""Content that was read and can be decoded; a `Resized` or the two frames have `Loaded`."""


def _content(source: Source, access: Access) -> Content:
    def read(image: ImageSource) -> Loaded:
        return read_image(image, allow_urls=access.urls, allow_paths=access.paths)

    if isinstance(source, FramePair):
        return dataclasses.replace(source, first=read(source.first), second=read(source.second))
    if isinstance(source, Resized):
        return dataclasses.replace(source, image=read(source.image))
    return read(source)


def _frames(content: FramePair) -> tuple[Loaded, Loaded]:
    return cast(Loaded, content.first), cast(Loaded, content.second)


def _digest(content: Content, salted: bytes) -> bytes | None:
    """Hash file contents; None for sources that are already decoded."""
    if isinstance(content, FramePair):
        first, second = (_digest(frame, salted) for frame in _frames(content))
        told = f"{content.count} {content.size}".encode()
        return None if first is None or second is None else hashlib.sha256(first + second + told).digest()
    if isinstance(content, Resized):
        digest = _digest(cast(Loaded, content.image), salted)
        return None if digest is None else hashlib.sha256(digest + repr(content.resolution).encode()).digest()
    return hashlib.sha256(salted + content).digest() if isinstance(content, bytes) else None


class PictureEncoder:
    """Encodes pictures; each once while the cache holds its features.

    Parameters
    ----------
    reader : PictureReader
    vision : Vision
    target : Ops
        The backend that uses the features.
    cache : PictureCache
    """

    def __init__(self, reader: PictureReader, vision: Vision, target: Ops, cache: PictureCache):
        self.reader, self.vision, self.cache, self._target = reader, vision, cache, target

    def features(self, picture: Picture) -> Generator[None, None, tuple[Array, bool]]:
        """Return the features (see `Vision.encode`), and whether they were cached.

        The generator yields before each slice of the computation. Closing it stops the computation.
        """
        known = self.cache.get(picture.key)
        if known is not None:
            return self._target.upload(known), True
        yield
        known = self.cache.get(picture.key)  # another answer may have computed it meanwhile
        if known is not None:
            return self._target.upload(known), True
        # The content is in memory: permission was checked when it was read.
        pixels = None if picture.prepared is None else picture.prepared.take()
        if pixels is None:
            pixels = self.reader.decode(picture.content).values
        features = yield from self.vision.encode_slowly(pixels, picture.grid)
        values = self.vision.ops.download(features)
        self.cache.put(picture.key, values)
        return features if self._target is self.vision.ops else self._target.upload(values), False

    def encode(self, source: ImageSource, access: Access, trace: Trace) -> np.ndarray:
        """Compute the features of a picture without the cache: float32 ``[tokens, hidden]``."""
        pixels = self.reader.decode(source, access)
        features = self.vision.encode(pixels.values, pixels.grid, trace)
        return self.vision.ops.download(features[: pixels.tokens])
