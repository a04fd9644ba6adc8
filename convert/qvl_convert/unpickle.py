"""Reading PyTorch's pickle shards without executing them.

A pickle is a program for a stack machine. This module interprets the few instructions that `torch.save` writes for a
dictionary of tensors, on plain Python values. Names are looked up in a table of tensor builders and never imported;
other names and instructions are refused. The tensors' bytes are stored uncompressed in the zip file around the pickle,
so they are mapped, not copied.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import open_regular

STORAGES = {
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch HalfStorage": np.dtype(np.float16),
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch CharStorage": np.dtype(np.int8),
    "torch ShortStorage": np.dtype(np.int16),
    "torch IntStorage": np.dtype(np.int32),
    "torch LongStorage": np.dtype(np.int64),
}
DICTIONARY, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
# Limits of one shard's pickle. Qwen-VL's largest has 0.2 MB and 20,000 instructions.
MAX_PICKLE = 8 << 20
MAX_INSTRUCTIONS = 1 << 20
MAX_DIRECTORY = 8 << 20
REMEDY = "only files that hold nothing but tensors are read; take the model's safetensors files"


@dataclasses.dataclass(frozen=True)
class PickledTensor:
    """The location of a tensor in a shard.

    Attributes
    ----------
    start, stop : int
        Byte range of the storage in the file.
    offset : int
        Index of the first element from `start`.
    strides : tuple of int
        Strides in elements.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    strides: tuple[int, ...]


class PickleFile:
    """A pickle shard in the format of `torch.save` since PyTorch 1.6.

    Attributes
    ----------
    entries : dict of str to PickledTensor

    Raises
    ------
    QvlError
        If the file is missing, damaged, of the older format, or contains anything but tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_regular(path, remedy="finish the download") as file:
                if file.read(2) != b"PK":
                    raise QvlError(
                        f"{path}: is no zip file: truncated, or saved by PyTorch before 1.6; "
                        "download it again, or save it with a newer PyTorch"
                    )
                pickle, self._storages = _read_archive(file)
        except QvlError:
            raise
        # zipfile does not document all exceptions for damaged archives.
        except Exception as error:
            raise QvlError(f"{path}: cannot be read ({error!s:.300}); download it again") from None
        try:
            self.entries = _Interpreter(self._storages).run(pickle)
        except _Refused as error:
            raise QvlError(f"{path}: {error}; {REMEDY}") from None
        # Exceptions of the interpreter for a damaged pickle: an empty stack, a wrong operand.
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise QvlError(f"{path}: its pickle is malformed ({error!s:.300}); download it again") from None

    def array(self, name: str) -> np.ndarray:
        """Return a tensor, memory-mapped; it is only copied if it is not contiguous."""
        entry = self.entries[name]
        if 0 in entry.shape:
            return np.empty(entry.shape, entry.dtype)
        storage = map_bytes(self.path, entry.start, entry.stop, entry.dtype)
        strides = [s * entry.dtype.itemsize for s in entry.strides]
        view = np.lib.stride_tricks.as_strided(storage[entry.offset :], entry.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(entry.shape)


def map_bytes(path: Path, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
    """Map bytes ``[start, stop)`` of a file as a flat read-only array.

    Every array has its own mapping, which is released with it: mapped pages count as used memory, and a shard exceeds
    the memory limit of a conversion.
    """
    if start == stop:
        return np.empty(0, dtype)
    with open_regular(path) as file:
        try:
            raw = np.asarray(np.memmap(file, np.uint8, "r", start, (stop - start,)))
        except (OSError, ValueError) as error:  # ValueError: it was truncated meanwhile
            raise QvlError(f"{path}: cannot be read ({error}); download it again") from None
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return raw.view(dtype)


class _SmallReads:
    """Limits the reads of `zipfile`, which would parse a directory of any length into objects."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY:
            raise ValueError(f"its directory has {count} bytes")
        return self._read(MAX_DIRECTORY if count < 0 else count)


def _read_archive(file: BinaryIO) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the pickle of a shard, and the location of each storage: ``{key: (start, stop)}``."""
    with zipfile.ZipFile(_SmallReads(file)) as archive:
        records = archive.infolist()
        names = [r.filename for r in records]
        if len(set(names)) != len(names):
            raise ValueError("a record appears in it twice")
        pickles = [name for name in names if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickles) != 1:
            raise ValueError("it holds no data.pkl")
        size = file.seek(0, 2)
        spans = {r.filename: _span(file, r, size) for r in records}
    root = pickles[0].removesuffix("data.pkl")
    start, stop = spans[pickles[0]]
    if stop - start > MAX_PICKLE:
        raise ValueError(f"its data.pkl has {stop - start} bytes")
    file.seek(start)
    pickle = file.read(stop - start)
    if f"{root}byteorder" in spans:
        start, stop = spans[f"{root}byteorder"]
        file.seek(start)
        if file.read(min(stop - start, 16)) != b"little":
            raise ValueError("it was saved on a big-endian machine")
    prefix = f"{root}data/"
    return pickle, {name.removeprefix(prefix): span for name, span in spans.items() if name.startswith(prefix)}


def _span(file: BinaryIO, record: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Return the byte range of an uncompressed record."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 or record.compress_size != record.file_size:
        raise ValueError(f"its record {record.filename!r} is compressed or encrypted")
    file.seek(record.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ValueError(f"its record {record.filename!r} has no header")
    # The local header's extra field may be longer than in the directory: PyTorch pads it.
    start = (
        record.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    )
    if start + record.file_size > size:
        raise ValueError(f"its record {record.filename!r} reaches past the end")
    return start, start + record.file_size


class _Refused(Exception):
    """The pickle contains something other than tensors."""


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    start: int
    stop: int


class _Mark:
    pass


def _program(pickle: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the instructions of a pickle with operands. A list of them would take 100 bytes per byte of the file."""
    for count, (instruction, operand, _) in enumerate(pickletools.genops(pickle), 1):
        if count > MAX_INSTRUCTIONS:
            raise ValueError(f"it has more than {MAX_INSTRUCTIONS} instructions")
        yield instruction.name, operand


class _Interpreter:
    """Interprets the instructions of one pickle; the only values are types of this module and plain data."""

    def __init__(self, storages: dict[str, tuple[int, int]]):
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> dict[str, PickledTensor]:
        # Check names first: the error should show what a hostile file tries to call.
        for name, operand in _program(pickle):
            if name in ("GLOBAL", "INST"):
                _known(operand)
        for name, operand in _program(pickle):
            self._step(name, operand)
        (result,) = self.stack
        if not isinstance(result, dict):
            raise _Refused("holds no dictionary of tensors")
        for name, value in result.items():
            if not isinstance(value, PickledTensor):
                raise _Refused(f"{name!r:.100} in it is no tensor")
        return result

    def _step(self, name: str, operand: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_Mark)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                stack.append(operand)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self._pop_to_mark()
                stack[-1].extend(items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[operand] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[operand])
            case "GLOBAL":
                stack.append(_known(operand))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known(f"{module:s} {attribute:s}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_build(function, arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set(key, value)
            case "SETITEMS":
                items = self._pop_to_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    self._set(key, value)
            case "BUILD":
                # A state dict has version numbers as its state; they are not needed.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise _Refused("its pickle sets the state of an object")
            case _:
                raise _Refused(f"its pickle uses the instruction {name}")

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        return items[::-1]

    def _set(self, key: Any, value: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not isinstance(key, str):
            raise ValueError("an item outside a dictionary")
        if key in target:
            raise ValueError(f"the key {key!r} appears twice")
        target[key] = value

    def _storage(self, identity: Any) -> _Storage:
        kind, storage_type, key, _, count = identity
        if kind != "storage" or not isinstance(storage_type, _Global) or storage_type.name not in STORAGES:
            raise ValueError("a storage of no known type")
        dtype = STORAGES[storage_type.name]
        if type(key) is not str:  # hashing a deeply nested tuple would overflow the stack
            raise ValueError("a storage without a name")
        start, stop = self.storages[key]
        if type(count) is not int:  # tuples in tuples, shared by the memo, would have a text without end
            raise ValueError(f"storage {key!r} claims no number of values")
        if count < 0 or count * dtype.itemsize > stop - start:
            raise ValueError(f"storage {key!r} claims {count} values, its record holds {stop - start} bytes")
        return _Storage(dtype, start, start + count * dtype.itemsize)


def _known(name: str) -> _Global:
    if name not in STORAGES and name not in (DICTIONARY, TENSOR, PARAMETER):
        raise _Refused(f"its pickle calls {name.replace(' ', '.')[:100]!r}, which builds no tensor: it was not run")
    return _Global(name)


def _build(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of no function")
    if function.name == DICTIONARY and not arguments:
        return {}
    if function.name == PARAMETER and isinstance(arguments[0], PickledTensor):
        return arguments[0]
    if function.name == TENSOR and isinstance(arguments[0], _Storage):
        return _tensor(*arguments[:4])
    raise ValueError(f"{function.name} called with the wrong operands")


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> PickledTensor:
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("a tensor without shape and strides")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with a negative or fractional size")
    count = (storage.stop - storage.start) // storage.dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides) if size > 1)
    if math.prod(shape) and last >= count:
        raise ValueError(f"a tensor of shape {list(shape)} reaches past its storage of {count} values")
    if math.prod(shape) > count:  # a copy would take more memory than the file has bytes
        raise ValueError("a tensor that repeats its values")
    return PickledTensor(storage.dtype, shape, storage.start, storage.stop, offset, strides)
