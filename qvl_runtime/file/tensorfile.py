"""Reading untrusted safetensors files: the header is checked before anything is allocated."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_object
from qvl_runtime.file.opening import open_regular

# A thousand times that of a model. The parsed header takes up to 30 times as much memory.
MAX_HEADER = 16 << 20
MAX_DIMS = 8
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
"""The name of each dtype in a header."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The place of a tensor: bytes ``[start, stop)`` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A memory-mapped safetensors file.

    Parameters
    ----------
    path : path
    remedy : str
        Ends the error message if the file cannot be opened.

    Attributes
    ----------
    entries : dict of str to Entry
        In file order.
    metadata : dict of str to str
        The header's `__metadata__`.

    Raises
    ------
    QvlError
        If the file is missing, not a safetensors file or truncated, or its offsets overlap or leave gaps.
    """

    def __init__(self, path: str | os.PathLike, *, remedy: str = "check the path"):
        with open_regular(path, remedy=remedy) as file:
            self.path, size = Path(path), os.fstat(file.fileno()).st_size
            if size < 8:
                raise QvlError(f"{self.path}: {size} bytes are not a safetensors file; download it again")
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: it was truncated meanwhile
                raise QvlError(f"{self.path}: cannot be read ({error}); check the path") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Linux then reads the file in pages of 2 MB: a thread gets a third more bandwidth.
            with contextlib.suppress(OSError):  # the system may have no huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.entries, self.metadata = self._read_header(size)

    def _read_header(self, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
        if self._map[:4] == b"GGUF":
            raise QvlError(
                f"{self.path}: is a GGUF file; convert the model's original folder with: qvl convert FOLDER OUT.qvl"
            )
        length = int.from_bytes(self._map[:8], "little")
        if MAX_HEADER < length <= size - 8:
            raise QvlError(
                f"{self.path}: its header has {length} bytes, more than {MAX_HEADER}; get the file from its publisher"
            )
        if length > max(MAX_HEADER, size - 8):  # the first bytes of a text or a picture
            raise QvlError(
                f"{self.path}: is not a safetensors file (as .qvl files are), or its beginning is damaged; "
                "check the path, or get the file again"
            )
        if length > size - 8:
            raise QvlError(
                f"{self.path}: its header claims {length} bytes of a {size}-byte file; "
                "it is truncated: download it again"
            )
        header = parse_object(self._map[8 : 8 + length], f"{self.path}: its header", "download it again")
        try:
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(v, str) for v in metadata.values()):
                raise ValueError("its metadata holds a value that is not text")
            entries = {name: _entry(name, fields, 8 + length) for name, fields in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise QvlError(f"{self.path}: its header is malformed ({error!s:.300}); download it again") from None
        end = 8 + length
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        for name, entry in entries.items():
            if entry.start != end:
                raise QvlError(f"{self.path}: tensor {name!r:.100} overlaps another or leaves a gap; download it again")
            end = entry.stop
        if end != size:
            wrong = "it is truncated" if size < end else "something else follows"
            raise QvlError(
                f"{self.path}: holds {size} bytes where its header describes {end}; {wrong}: download it again"
            )
        return entries, metadata

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of the mapped file.

        Raises
        ------
        QvlError
            If there is no such tensor.
        """
        try:
            entry = self.entries[name]
        except KeyError:
            raise QvlError(
                f"{self.path}: has no tensor {name!r:.100}; is it complete, and of this model family?"
            ) from None
        flat = np.frombuffer(self._map, np.uint8, entry.stop - entry.start, entry.start)
        if flat.ctypes.data % entry.dtype.itemsize:
            flat = flat.copy()
        return flat.view(entry.dtype).reshape(entry.shape)

    def bytes(self, name: str) -> memoryview:
        """Return the raw bytes of a tensor."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.stop]

    def before(self, name: str) -> memoryview:
        """Return all bytes of the file before a tensor."""
        return memoryview(self._map)[: self.entries[name].start]


def _entry(name: str, fields: dict, base: int) -> Entry:
    """Parse the header entry of a tensor; its offsets are relative to `base`."""
    label = f"tensor {name!r:.100}"
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"{label} has the unknown dtype {fields['dtype']!r}")
    dtype, shape = DTYPES[fields["dtype"]], tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{label} has {len(shape)} dimensions")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{label} has a negative or fractional size")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{label} of shape {list(shape)} does not fill its {end - begin} bytes")
    return Entry(dtype, shape, base + begin, base + end)
