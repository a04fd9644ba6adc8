"""Cache of picture features, keyed by the picture's content, never by its path."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from qvl_kernels.atomic import remove_stale, replacing
from qvl_kernels.cache_folder import foreign
from qvl_kernels.locks import make_lock
from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import as_path, reason_of
from qvl_runtime.file.tensorfile import TensorFile

MEMORY_BYTES = 256 << 20
"""Default limit in memory: 64 pictures of Qwen-VL."""

FOLDER_BYTES = 2 << 30
"""Limit on disk: 512 pictures of Qwen-VL."""

OURS = re.compile(r"[0-9a-f]{64}\.safetensors")
"""Names of the files in the folder."""


class PictureCache:
    """Features of pictures, in memory and optionally on disk.

    Parameters
    ----------
    hidden : int
        Width of the features.
    limit : int
        Bytes of features in memory; the least recently used are evicted. 0 disables the cache.
    folder : path, optional
        Folder for ``KEY.safetensors`` files, which only this user may read. Damaged or unrelated files, and those that
        others may have written, are ignored. Beyond `FOLDER_BYTES` the least recently used files are removed.

    Raises
    ------
    QvlError
        If the folder cannot be created.
    """

    def __init__(self, hidden: int, limit: int, folder: str | os.PathLike | None = None):
        self.hidden, self.limit = hidden, limit
        self.folder = None if folder is None else as_path(folder)
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = make_lock()
        if self.folder is not None:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except (OSError, ValueError) as error:  # ValueError: no name of a file
                raise QvlError(
                    f"cache_dir {str(folder)!r:.200} cannot be made ({reason_of(error)}); name a folder"
                ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of features in memory."""
        return sum(features.nbytes for features in self._features.values())

    def get(self, key: bytes) -> np.ndarray | None:
        """Return cached features, float32 ``[rows, hidden]``, or None."""
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
                return self._features[key]
        features = None if self.folder is None else self._read(_path(self.folder, key), key)
        if features is not None:
            self._remember(key, features)
        return features

    def put(self, key: bytes, features: np.ndarray) -> None:
        """Cache the features of a picture."""
        self._remember(key, features)
        if self.folder is not None:
            self._write(_path(self.folder, key), key, features)

    def _remember(self, key: bytes, features: np.ndarray) -> None:
        with self._lock:
            self._features[key] = features
            self._features.move_to_end(key)
            while self.nbytes > self.limit:
                self._features.popitem(last=False)

    def _read(self, path: Path, key: bytes) -> np.ndarray | None:
        try:
            if foreign(path, path.stat()):
                return None
            file = TensorFile(path)
            features = np.array(file.array("features"))
        except (OSError, QvlError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # records the last use
        wanted = features.ndim == 2 and features.shape[1] == self.hidden and features.dtype == np.float32
        if not wanted or _seal(key, features) != file.metadata:
            return None
        return features

    def _write(self, path: Path, key: bytes, features: np.ndarray) -> None:
        data = save({"features": np.ascontiguousarray(features)}, _seal(key, features))
        try:
            with replacing(path) as file:
                file.write(data)
            _tidy(path.parent)
        except OSError as error:
            warnings.warn(f"cache_dir {str(path.parent)!r} cannot be written ({error.strerror})", stacklevel=2)


def _path(folder: Path, key: bytes) -> Path:
    return folder / f"{key.hex()}.safetensors"


def _tidy(folder: Path) -> None:
    """Remove least recently used files until the folder is below its limit. Another process may do so concurrently."""
    paths = list(folder.iterdir())
    remove_stale(paths)
    found = []
    for path in paths:
        if not OURS.fullmatch(path.name):  # such as a checkpoint in the same folder
            continue
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found)[:-1]:
        if total <= FOLDER_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size


def _seal(key: bytes, features: np.ndarray) -> dict[str, str]:
    return {"key": key.hex(), "sha256": hashlib.sha256(features.tobytes()).hexdigest()}
