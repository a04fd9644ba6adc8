"""Writing a `.qvl` file: the layout is planned first, then tensors are written in any order.

The file has a temporary name until it is complete. Its header has a hash of fixed length per tensor, which is set when
the tensor is written: the header of an unfinished file lists the finished tensors, and `resume` needs no other journal.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from qvl_kernels.packing import Matrix
from qvl_runtime.blob import METADATA, metadata_hash
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_object
from qvl_runtime.file.locking import lock
from qvl_runtime.file.tensorfile import CODES, TensorFile

DATA_ALIGNMENT = 4096
PIECE = 16 << 20
NO_HASH = "0" * 64
OPEN_FILES_STAY = os.name == "nt"
"""Whether an open file can be neither renamed nor removed. There no file is locked, either."""
# Wide and even sizes first, so that every tensor is aligned without gaps, which safetensors forbids.
SUFFIX_ORDER = ("qweight", "scales")
DTYPE_ORDER = ("float32", "int32", "float16", "uint8")

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


def _order(name: str, dtype: np.dtype) -> int:
    suffix = name.rpartition(".")[2]
    if suffix in SUFFIX_ORDER:
        return SUFFIX_ORDER.index(suffix)
    return len(SUFFIX_ORDER) + DTYPE_ORDER.index(dtype.name)


def partial_path(path: Path) -> Path:
    """Return the temporary name of an unfinished file, also for a path without a name, such as ``.``."""
    return path.parent / f"{path.name}.partial"


class BlobWriter:
    """Writes the tensors of one file.

    Parameters
    ----------
    path : Path
        The finished file; its temporary name is ``path.partial``.
    layout : dict
        Shape and dtype of every tensor, in the model's order of use.
    metadata : dict of str to str
        The header's metadata, without `hashes`.
    resume : bool
        Resume an unfinished file, if there is one.
    force : bool
        Replace a finished file, and discard an unfinished one.

    Raises
    ------
    QvlError
        If the file exists, the unfinished file has other settings or is being written, or the disk is full.

    Notes
    -----
    As a context manager: invalid input (`QvlError`) removes the unfinished file; other exceptions leave it, and a
    complete one stays.
    """

    def __init__(self, path: Path, layout: Layout, metadata: dict[str, str], *, resume: bool, force: bool):
        self.path = path
        self.partial = partial_path(path)
        self._busy = f"{self.partial}: another conversion is writing it; wait for it, or name another file"
        self._force, self._complete = force, False
        self._refuse_existing()
        self._plan(layout, metadata)
        if self.partial.exists() and not (resume or force):
            raise QvlError(f"{self.partial}: is unfinished; --resume continues it, --force begins anew")
        resume = resume and self.partial.exists()
        if not resume:
            self._check_space()
        try:
            if not resume:
                self._remove_unfinished()
            self._file = open(self.partial, "r+b" if resume else "x+b")  # noqa: SIM115
        except FileExistsError:
            raise QvlError(self._busy) from None
        except (FileNotFoundError, NotADirectoryError):
            raise QvlError(f"{path}: its folder does not exist; create it first") from None
        self._lock(self._file)
        self._done: set[str] = set()
        if resume:
            self._take_up()
        else:
            self._begin()

    def _lock(self, file: IO[bytes]) -> None:
        """Refuse what another conversion writes: it would end with a file that holds something else."""
        lock(file.fileno(), self._busy)
        # Before it was locked, another one may have removed it or finished it.
        if not self.partial.exists() or not os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
            raise QvlError(self._busy)

    def _remove_unfinished(self) -> None:
        if self.partial.is_file() and not OPEN_FILES_STAY:
            with open(self.partial, "rb") as file:
                self._lock(file)
                self.partial.unlink()
        elif os.path.lexists(self.partial):  # open() would empty the file that a link names
            self.partial.unlink()

    def _begin(self) -> None:
        """Write the header, and give the file its size."""
        try:
            self._file.write(self._header)
            self._file.truncate(self.size)
        except OSError as error:  # such as a file system that holds no file of this size
            self._discard()
            raise QvlError(
                f"{self.path}: cannot be written with {self.size:,} bytes ({error.strerror}); name a file elsewhere"
            ) from None

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses the rest of the buffer again
            self._file.close()

    def _discard(self) -> None:
        """Remove the unfinished file while it is locked: another conversion could resume it."""
        if OPEN_FILES_STAY:
            self._close()
        self.partial.unlink(missing_ok=True)
        self._close()

    def _refuse_existing(self) -> None:
        if self.path.is_dir():
            raise QvlError(f"{self.path}: is a folder; name a file, such as {self.path / 'model.qvl'}")
        if self.path.exists() and not self.path.is_file():  # such as /dev/null, for which root needs no permission
            raise QvlError(f"{self.path}: is no regular file and is not replaced; choose another name")
        if self.path.exists() and not self._force:
            raise QvlError(f"{self.path}: exists already; choose another name, or --force to replace it")

    def _plan(self, layout: Layout, metadata: dict[str, str]) -> None:
        names = sorted(layout, key=lambda name: _order(name, layout[name][1]))
        hashes = json.dumps({METADATA: metadata_hash(metadata)} | dict.fromkeys(names, NO_HASH))
        header: dict[str, object] = {"__metadata__": {**metadata, "hashes": hashes}}
        spans, end = {}, 0
        for name in names:
            shape, dtype = layout[name]
            start, end = end, end + int(np.prod(shape, dtype=object)) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            spans[name] = (start, end)
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % DATA_ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self._layout, self._metadata = layout, metadata
        self._spans = {name: (len(self._header) + a, len(self._header) + b) for name, (a, b) in spans.items()}
        self.size = len(self._header) + end
        # The hashes are JSON inside a JSON string, so their quotes are escaped.
        position = self._header.index(b'"hashes": ')
        self._hash_at = {}
        for name in names:
            key = json.dumps(json.dumps(name) + ': "')[1:-1].encode()
            position = self._header.index(key, position) + len(key)
            self._hash_at[name] = position

    def _check_space(self) -> None:
        folder = self.path.parent
        if folder.is_dir():
            free = shutil.disk_usage(folder).free
            if self.partial.exists():
                free += self.partial.stat().st_blocks * 512
            if free < self.size:
                raise QvlError(
                    f"{self.path}: needs {self.size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room"
                )

    def _take_up(self) -> None:
        header = bytearray(self._file.read(len(self._header)))
        found = {}
        for name, at in self._hash_at.items():
            found[name] = header[at : at + 64].decode("ascii", "replace")
            header[at : at + 64] = NO_HASH.encode()
        if bytes(header) != self._header or os.fstat(self._file.fileno()).st_size != self.size:
            self._file.close()
            raise QvlError(f"{self._why_not()}convert with --force instead of --resume to begin anew")
        self._done = {name for name, value in found.items() if value != NO_HASH and self._hash(name) == value}

    def _why_not(self) -> str:
        """Say why an unfinished file is not taken up."""
        found = {}
        with contextlib.suppress(QvlError):  # no such file at all
            found = TensorFile(self.partial).metadata
        other, mine = (_program(metadata) for metadata in (found, self._metadata))
        if other in (None, mine):
            return f"{self.partial}: was begun with other settings or from another model; "
        return f"{self.partial}: was begun by {other!r:.40}, and {mine} may round otherwise; finish it with that, or "

    def _hash(self, name: str) -> str:
        start, stop = self._spans[name]
        digest = hashlib.sha256()
        self._file.seek(start)
        for at in range(start, stop, PIECE):
            digest.update(self._file.read(min(PIECE, stop - at)))
        return digest.hexdigest()

    def done(self, name: str) -> bool:
        """Whether a tensor is finished."""
        return name in self._done

    @property
    def written(self) -> int:
        """Number of finished bytes of the file."""
        return len(self._header) + sum(stop - start for start, stop in (self._spans[name] for name in self._done))

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a tensor at its offset."""
        shape, dtype = self._layout[name]
        if array.shape != shape or array.dtype != dtype:
            raise RuntimeError(f"{name}: planned {dtype} {shape}, made {array.dtype} {array.shape}")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._file.seek(self._spans[name][0])
        self._file.write(data)
        # The tensor must be written before its hash.
        self._file.flush()
        self._file.seek(self._hash_at[name])
        self._file.write(hashlib.sha256(data).hexdigest().encode())
        self._file.flush()
        self._done.add(name)

    def write_matrix(self, name: str, matrix: Matrix) -> None:
        """Write the arrays of a matrix."""
        for suffix, array in matrix_arrays(matrix).items():
            self.write(f"{name}.{suffix}", array)

    def read(self, name: str) -> np.ndarray:
        """Read a finished tensor."""
        array = np.empty(*self._layout[name])
        self._file.seek(self._spans[name][0])
        self._file.readinto(array.reshape(-1).view(np.uint8).data)
        return array

    def finish(self) -> None:
        """Rename the complete file."""
        if missing := [name for name in self._layout if name not in self._done]:
            raise RuntimeError(f"{self.path}: {missing[0]} was never written")
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            # out of the page cache, so that it comes back in large pages when it is mapped
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._complete = True
        try:
            self._refuse_existing()
        except QvlError as error:  # another program has made it meanwhile
            raise QvlError(f"{error}; the conversion is complete in {self.partial}") from None
        if OPEN_FILES_STAY:
            self._file.close()
        os.replace(self.partial, self.path)
        self._file.close()  # not before: another conversion could begin where this one is

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            return
        if isinstance(error, QvlError) and not self._complete:
            self._discard()
            return
        self._close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = error.filename or self.path  # a file of a calibration is on another disk
            raise QvlError(f"{full}: the disk is full; make room and continue with --resume") from None


def _program(metadata: Mapping[str, str]) -> object:
    """Return the program that made a file, as its metadata says."""
    try:
        return parse_object(metadata.get("source", ""), "", "").get("made_by")
    except QvlError:
        return None


def matrix_arrays(matrix: Matrix) -> dict[str, np.ndarray]:
    """Return the arrays of a matrix by suffix in the file."""
    arrays = {
        "weight" if matrix.bits == 16 else "qweight": matrix.weight,
        "scales": matrix.scales,
        "zeros": matrix.zeros,
        "perm": matrix.perm,
        "bias": matrix.bias,
    }
    return {suffix: array for suffix, array in arrays.items() if array is not None}
