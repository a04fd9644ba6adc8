"""What the decoder sees of a picture, kept by what the picture is: never by its path."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from qvl_runtime.errors import QvlError
from qvl_runtime.file.atomic import replacing
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.inputs.images import ImageSource, is_url

MEMORY_BYTES = 256 << 20
"""Default limit: 64 pictures of Qwen-VL."""

FOLDER_BYTES = 2 << 30
"""Limit of a folder: 512 pictures of Qwen-VL."""

MAX_FILE_BYTES = 64 << 20
KNOWN_FILES = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a prompt.

    Attributes
    ----------
    key : bytes
        See `ImageCache`.
    content : image source
        What it can be decoded from.
    pixels : numpy.ndarray or None
        float32 [3, S, S], where it was decoded already.
    """

    key: bytes
    content: ImageSource
    pixels: np.ndarray | None = None


class ImageCache:
    """Features of pictures, in memory and perhaps on disk.

    The key of a picture is a hash of its pixels as the vision tower gets them, and of everything else its features
    depend on: so the same picture under two names is computed once, and a changed file is another picture.

    Parameters
    ----------
    shape : tuple of int
        Of the features: (n_queries, hidden).
    identity : str
        Names weights, preprocessing and arithmetic.
    limit : int
        Bytes of features in memory; those used longest ago leave first. 0 keeps none.
    folder : Path, optional
        Where features are also kept as ``KEY.safetensors``, which only this user may read. A file that is damaged
        or of another kind counts as absent. The folder is kept below `FOLDER_BYTES`: files used longest ago leave.

    Raises
    ------
    QvlError
        When the folder cannot be made.
    """

    def __init__(self, shape: tuple[int, int], identity: str, limit: int, folder: str | os.PathLike | None = None):
        self.shape, self.identity, self.limit = shape, identity, limit
        self.folder = None if folder is None else Path(folder)
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._known: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()
        if self.folder is not None:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise QvlError(f"cache_dir {str(folder)!r} cannot be made ({error.strerror}); name a folder") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the features in memory."""
        return sum(features.nbytes for features in self._features.values())

    def picture(self, source: ImageSource, decode: Callable[[ImageSource], np.ndarray]) -> Picture:
        """Find out which picture a source is.

        `decode` makes pixels of it, float32 [3, S, S]; it is not called for the bytes of a file that were seen before.
        """
        content = _content(source)
        digest = hashlib.sha256(content).digest() if isinstance(content, bytes) else None
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
                return Picture(self._known[digest], content)
        try:
            pixels = decode(content)
        except QvlError:
            if content is source:
                raise
            pixels, digest = decode(source), None  # its message names the path
        key = hashlib.sha256(self.identity.encode() + pixels.tobytes()).digest()
        if digest is not None:
            with self._lock:
                self._known[digest] = key
                while len(self._known) > KNOWN_FILES:
                    self._known.popitem(last=False)
        return Picture(key, content, pixels)

    def get(self, key: bytes) -> np.ndarray | None:
        """Features float32 [n_queries, hidden], or None."""
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
                return self._features[key]
        features = None if self.folder is None else self._read(key)
        if features is not None:
            self._remember(key, features)
        return features

    def put(self, key: bytes, features: np.ndarray) -> None:
        """Keep the features of a picture."""
        self._remember(key, features)
        if self.folder is not None:
            self._write(key, features)

    def _remember(self, key: bytes, features: np.ndarray) -> None:
        with self._lock:
            self._features[key] = features
            self._features.move_to_end(key)
            while self.nbytes > self.limit:
                self._features.popitem(last=False)

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.safetensors"

    def _read(self, key: bytes) -> np.ndarray | None:
        try:
            file = TensorFile(self._path(key))
            features = np.array(file.array("features"))
        except QvlError:
            return None
        with contextlib.suppress(OSError):
            os.utime(self._path(key))  # the time of its last use
        if features.shape != self.shape or features.dtype != np.float32 or _seal(key, features) != file.metadata:
            return None
        return features

    def _write(self, key: bytes, features: np.ndarray) -> None:
        data = save({"features": np.ascontiguousarray(features)}, _seal(key, features))
        try:
            with replacing(self._path(key)) as file:
                file.write(data)
            self._tidy()
        except OSError as error:
            warnings.warn(f"cache_dir {str(self.folder)!r} cannot be written ({error.strerror})", stacklevel=2)

    def _tidy(self) -> None:
        """Remove the files used longest ago until the folder is below its limit; another process may do the same."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found)[:-1]:
            if total <= FOLDER_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= size


def _content(source: ImageSource) -> ImageSource:
    """A picture's bytes in place of a path, so that what is hashed is what is decoded."""
    if not isinstance(source, str | Path) or is_url(source) or str(source).startswith("data:"):
        return source
    try:
        with open(source, "rb") as file:
            # A longer file is no picture: someone passed a model by mistake.
            return file.read() if os.fstat(file.fileno()).st_size <= MAX_FILE_BYTES else source
    except (OSError, ValueError):
        return source  # decoding it says what is wrong


def _seal(key: bytes, features: np.ndarray) -> dict[str, str]:
    return {"key": key.hex(), "sha256": hashlib.sha256(features.tobytes()).hexdigest()}
