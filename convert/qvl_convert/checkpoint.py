"""A published checkpoint: a folder with config, tokenizer, and weight shards, read tensor by tensor."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qvl_convert.unpickle import PickledTensor, PickleFile, map_bytes
from qvl_runtime.errors import QvlError
from qvl_runtime.families import family_of
from qvl_runtime.families.base import Config, Family, Prompts
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.specs import MatrixSpec, VectorSpec
from qvl_runtime.file.json_text import MAX_JSON, parse_object
from qvl_runtime.file.opening import as_path, open_regular, read_regular, shown
from qvl_runtime.file.tensorfile import Entry, TensorFile
from qvl_runtime.inputs.pictures import PictureReader
from qvl_runtime.inputs.tokenizer import Tokenizer

FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
INDEXES = {"model.safetensors.index.json": ".safetensors", "pytorch_model.bin.index.json": ".bin"}
# Buffers that some published checkpoints carry and that this runtime computes by itself.
BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(bias|masked_bias)|\.logn_tensor|position_ids)$")


def published_shapes(family: Family, config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published, unquantised checkpoint of a model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in family.tensors(config):
        if isinstance(spec, VectorSpec):
            shapes[spec.name] = spec.shape
            continue
        rows = spec.first_row + spec.n
        shapes[spec.source] = (spec.k, rows) if spec.transposed else (rows, *(spec.columns or (spec.k,)))
        if spec.bias is not None:
            shapes[spec.bias] = (rows,)
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that nobody vouches for.

    Raises
    ------
    QvlError
        When it is missing, or holds something else.
    """
    content = read_regular(path, limit=MAX_JSON, remedy=f"is {shown(path.parent)} the folder of a Hugging Face model?")
    return parse_object(content, f"{path}:", "download it again")


def open_weights(path: Path) -> TensorFile | PickleFile:
    """A weight file of either kind, by its ending."""
    if path.suffix == ".safetensors":
        return TensorFile(path, remedy="finish the download")
    return PickleFile(path)


def read_tensor(shard: TensorFile | PickleFile, name: str) -> np.ndarray:
    """A tensor of a weight file, read-only, mapped for as long as the array lives."""
    if isinstance(shard, PickleFile):
        return shard.array(name)
    entry = shard.entries[name]
    return map_bytes(shard.path, entry.start, entry.stop, entry.dtype).reshape(entry.shape)


class Checkpoint:
    """A folder in Hugging Face layout.

    Attributes
    ----------
    folder : Path
    family : Family
    config : Config
    raw_config : dict
        `config.json` as it is.
    generation_config : GenerationConfig
        Defaults when the folder has none.
    ranks : bytes
        The tokenizer's rank file.

    Raises
    ------
    QvlError
        When a file is missing or damaged, or config and tokenizer do not belong together.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = as_path(folder)
        if not os.path.isdir(self.folder):
            raise QvlError(f"{shown(self.folder)}: is no folder; give the folder of a Hugging Face model")
        self.raw_config = read_json(self.folder / "config.json")
        where = str(self.folder / "config.json")
        self.family = family_of(self.raw_config, where)
        self.config: Config = self.family.read_config(self.raw_config, where)
        generation = self.folder / "generation_config.json"
        self.generation_config = GenerationConfig.from_dict(
            read_json(generation) if os.path.lexists(generation) else {}, str(generation)
        )
        self.ranks = self.family.read_ranks(self.folder, self.config)
        self._shards = self._open_shards()
        self._owners: dict[str, TensorFile | PickleFile] = {}
        for shard in self._shards:
            for name in shard.entries:
                if name in self._owners:
                    raise QvlError(
                        f"{shard.path}: tensor {name!r:.100} stands in {self._owners[name].path.name} too; "
                        "remove the shards of another model"
                    )
                self._owners[name] = shard
        self._check_index()

    def _open_shards(self) -> list[TensorFile | PickleFile]:
        self._index: dict[str, str] = {}
        found = [self.folder / name for name in INDEXES if os.path.lexists(self.folder / name)]
        self._index_path = found[0] if found else None
        if self._index_path is not None:
            self._index = self._read_index(self._index_path, INDEXES[self._index_path.name])
            names = sorted(set(self._index.values()))
        else:
            names = sorted(p.name for p in self.folder.glob("*.safetensors")) or sorted(
                p.name for p in self.folder.glob("pytorch_model*.bin")
            )
        if not names:
            raise QvlError(f"{self.folder}: holds no weights: neither *.safetensors nor pytorch_model*.bin")
        paths = [self.folder / name for name in names]
        return [open_weights(path) for path in paths]

    @staticmethod
    def _read_index(path: Path, suffix: str) -> dict[str, str]:
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise QvlError(f"{path}: has no 'weight_map'; download it again")
        for shard in index.values():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+", shard) or not shard.endswith(suffix):
                raise QvlError(f"{path}: names the shard {str(shard)[:100]!r}, expected a {suffix} file beside it")
        return index

    def _check_index(self) -> None:
        for name, shard in self._index.items():
            owner = self._owners.get(name)
            if owner is None or owner.path.name != shard:
                raise QvlError(
                    f"{self.folder / shard}: has no tensor {name!r:.100}, but {self._index_path.name} says so"
                )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.family.tokenizer(self.ranks, self.config)

    @functools.cached_property
    def reader(self) -> PictureReader | None:
        """Decodes pictures for this model; None if it takes none."""
        if not self.config.sees:
            return None
        preprocessing = self.family.read_preprocessing(self.folder, self.config)
        return PictureReader(self.family.preprocess(self.config, preprocessing))

    @functools.cached_property
    def prompts(self) -> Prompts:
        read = None if self.reader is None else self.reader.read
        return self.family.prompts(self.tokenizer, self.config, self.generation_config, read)

    @property
    def is_chat(self) -> bool:
        return self.generation_config.is_chat

    @property
    def names(self) -> list[str]:
        """All tensors, in file order."""
        return list(self._owners)

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def entry(self, name: str) -> Entry | PickledTensor:
        """Dtype and shape of a tensor, without reading it."""
        return self._owners[name].entries[name]

    def path(self, name: str) -> Path:
        """The shard a tensor lies in."""
        return self._owners[name].path

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, read-only, mapped for as long as the array lives.

        Raises
        ------
        QvlError
            When there is no such tensor.
        """
        shard = self._owners.get(name)
        if shard is None:
            raise QvlError(f"{self.folder}: has no tensor {name!r}; is the download complete?")
        return read_tensor(shard, name)

    def vector(self, name: str) -> np.ndarray:
        """A tensor as float32, in memory.

        Raises
        ------
        QvlError
            When there is no such tensor, or a value is not finite.
        """
        vector = self.tensor(name).astype(np.float32)
        if not np.isfinite(vector).all():
            raise QvlError(f"{self.path(name)}: {name!r} holds a value that is not finite; download the model again")
        return vector

    def check(self, wanted: dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]]) -> None:
        """Compare the folder's tensors with those that a config asks for.

        Parameters
        ----------
        wanted : dict
            Shape and possible dtypes of every tensor.

        Raises
        ------
        QvlError
            For the first tensor that is missing, has another shape or dtype, or does not belong here.
        """
        for name, (shape, dtypes) in wanted.items():
            if name not in self:
                raise QvlError(f"{self.folder}: has no tensor {name!r}, which its config asks for; finish the download")
            entry = self.entry(name)
            if entry.shape != shape:
                raise QvlError(
                    f"{self.path(name)}: {name!r} has the shape {list(entry.shape)}, "
                    f"config.json asks for {list(shape)}; do they belong together?"
                )
            if entry.dtype not in dtypes:
                known = " or ".join(dtype.name for dtype in dtypes)
                raise QvlError(f"{self.path(name)}: {name!r} is {entry.dtype}, expected {known}; download it again")
        for name in self.names:
            if name not in wanted and not BUFFERS.search(name):
                raise QvlError(
                    f"{self.path(name)}: {name!r:.100} is a tensor which config.json does not describe; "
                    "do they belong together?"
                )

    def fingerprint(self) -> dict[str, str]:
        """A short hash per weight file, of its size and of bytes all over it: enough to tell two sources apart."""
        return {shard.path.name: _fingerprint(shard.path) for shard in self._shards}


def _fingerprint(path: Path, samples: int = 64, length: int = 4096) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open_regular(path) as file:
        for i in range(samples):
            file.seek(max(size - length, 0) * i // (samples - 1))
            digest.update(file.read(length))
    return digest.hexdigest()[:32]


def matrix(checkpoint: Checkpoint, spec: MatrixSpec) -> np.ndarray:
    """The published weight of a matrix as ``[n, k]``, in the dtype it has."""
    weight = checkpoint.tensor(spec.source)
    if spec.transposed:
        return np.ascontiguousarray(weight.T)[spec.first_row : spec.first_row + spec.n]
    return weight.reshape(len(weight), -1)[spec.first_row : spec.first_row + spec.n]


def bias(checkpoint: Checkpoint, spec: MatrixSpec) -> np.ndarray | None:
    """The published bias of a matrix as float32 ``[n]``, or None."""
    if spec.bias is None:
        return None
    return checkpoint.vector(spec.bias)[spec.first_row : spec.first_row + spec.n]
