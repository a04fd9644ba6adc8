"""Helpers of conversion tests: write shards by hand, and change a copy of a checkpoint."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qvl_convert.checkpoint import Checkpoint
from qvl_runtime.file.tensorfile import CODES


def safetensors_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        header[name] = {"dtype": CODES[array.dtype], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    return with_header(header, b"".join(array.tobytes() for array in tensors.values()))


def with_header(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def text(value: str) -> bytes:
    """A string in a pickle."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def numbers(*values: int) -> bytes:
    """A tuple of integers in a pickle."""
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor_call(
    key: str, count: int, shape: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0, kind: str = "Float"
) -> bytes:
    """The instructions that rebuild a tensor over storage `key`."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu")
    storage += b"J" + struct.pack("<i", count) + b"tQ"
    sizes = b"J" + struct.pack("<i", offset) + numbers(*shape) + numbers(*strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + b"\x89ccollections\nOrderedDict\n)RtR"


def state_dict(tensors: dict[str, bytes]) -> bytes:
    """The pickle of a dictionary whose values are made by the given instructions."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in tensors.items()) + b"u."


def write_pickle_shard(
    path: Path, pickle: bytes, storages: dict[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED, **records
) -> Path:
    """A pickle shard; `records` are further records of the archive."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    checkpoint = Checkpoint(folder)
    return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}


def changed_copy(
    source: Path,
    folder: Path,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    **jsons: dict,
) -> Path:
    """A copy of a checkpoint in one safetensors shard, after `change`; `jsons` update its files ``NAME.json``."""
    folder.mkdir()
    tensors = all_tensors(source)
    change(tensors)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    for file in source.iterdir():
        if (file.suffix == ".json" and ".index." not in file.name) or file.suffix == ".tiktoken":
            shutil.copy(file, folder)
    for stem, values in jsons.items():
        file = folder / f"{stem}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | values))
    return folder
