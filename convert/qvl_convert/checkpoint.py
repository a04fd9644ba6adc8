"""A published checkpoint: a folder with config, tokenizer, and weight shards; tensors are read one by one."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from qvl_convert import fp8
from qvl_convert.unpickle import PickledTensor, PickleFile, map_bytes
from qvl_runtime.errors import QvlError
from qvl_runtime.families import family_of
from qvl_runtime.families.base import Grounding, Prompts
from qvl_runtime.families.config import Config
from qvl_runtime.families.reading import read_json
from qvl_runtime.file.opening import as_path, open_regular, shown
from qvl_runtime.file.tensorfile import Entry, TensorFile
from qvl_runtime.inputs.pictures import PictureReader
from qvl_runtime.inputs.tokenizer import Tokenizer

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), FP8)
INDEXES = {"model.safetensors.index.json": ".safetensors", "pytorch_model.bin.index.json": ".bin"}
# Buffers of some published checkpoints, which this runtime computes itself.
BUFFERS = re.compile(r"(\.rotary_(pos_)?emb\.inv_freq|\.attn\.(bias|masked_bias)|\.logn_tensor|position_ids)$")


def open_weights(path: Path) -> TensorFile | PickleFile:
    """Open a weight file of either format, by extension."""
    if path.suffix == ".safetensors":
        return TensorFile(path, remedy="finish the download")
    return PickleFile(path)


def read_tensor(shard: TensorFile | PickleFile, name: str) -> np.ndarray:
    """Return a tensor of a weight file, read-only and memory-mapped."""
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
        The content of `config.json`.
    generation_config : GenerationConfig
        Defaults if the folder has no file.
    ranks : bytes
        The tokenizer's vocabulary in the format of the blob.
    preprocessing : dict
        The preprocessing settings in the format of the blob.

    Raises
    ------
    QvlError
        If a file is missing or damaged, or config and tokenizer do not match.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = as_path(folder)
        if not os.path.isdir(self.folder):
            wrong = "is no folder" if os.path.exists(self.folder) else "no such folder"
            raise QvlError(
                f"{shown(self.folder)}: {wrong}; give the folder of a Hugging Face model: none is downloaded"
            )
        self.raw_config = read_json(self.folder / "config.json")
        where = str(self.folder / "config.json")
        self.family = family_of(self.raw_config, where)
        self.config: Config = self.family.read_config(self.raw_config, where)
        self.generation_config = self.family.read_generation(self.folder)
        self.generation_config.check_tokens(self.config.vocab_size, str(self.folder / "generation_config.json"))
        self.ranks = self.family.read_ranks(self.folder, self.config)
        self.preprocessing = self.family.read_preprocessing(self.folder, self.config)
        self._shards = self._open_shards()
        self._owners: dict[str, tuple[TensorFile | PickleFile, str]] = {}
        for shard in self._shards:
            for published in shard.entries:
                name = self._name(published)
                if name is None:
                    continue
                if name in self._owners:
                    raise QvlError(
                        f"{shard.path}: tensor {published!r:.100} stands in {self._owners[name][0].path.name} too; "
                        "remove the shards of another model"
                    )
                self._owners[name] = (shard, published)
        self._fp8_block = fp8.block_size(self.raw_config, where)
        self._check_index()

    def _name(self, published: str) -> str | None:
        """What a tensor is called in the family's list; None if it is not used."""
        return self.family.published_name(published, self.config)

    def _open_shards(self) -> list[TensorFile | PickleFile]:
        self._index: dict[str, str] = {}
        found = [self.folder / name for name in INDEXES if os.path.lexists(self.folder / name)]
        self._index_name = found[0].name if found else ""
        if found:
            self._index = self._read_index(found[0], INDEXES[found[0].name])
            names = sorted(set(self._index.values()))
        else:
            names = sorted(p.name for p in self.folder.glob("*.safetensors")) or sorted(
                p.name for p in self.folder.glob("pytorch_model*.bin")
            )
        if not names:
            raise QvlError(
                f"{self.folder}: holds no weights: neither *.safetensors nor pytorch_model*.bin; finish the download"
            )
        paths = [self.folder / name for name in names]
        return [open_weights(path) for path in paths]

    @staticmethod
    def _read_index(path: Path, suffix: str) -> dict[str, str]:
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise QvlError(f"{path}: has no 'weight_map'; download it again")
        for shard in index.values():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+", shard) or not shard.endswith(suffix):
                raise QvlError(
                    f"{path}: names the shard {str(shard)[:100]!r}, expected a {suffix} file beside it; "
                    "download it again"
                )
        return index

    def _check_index(self) -> None:
        for name, shard in self._index.items():
            own = self._name(name)
            if own is None:
                continue
            owner = self._owners.get(own)
            if owner is None or owner[0].path.name != shard:
                raise QvlError(
                    f"{self.folder / shard}: has no tensor {name!r:.100}, but {self._index_name} says so; "
                    "download it again"
                )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.family.tokenizer(self.ranks, self.config)

    @functools.cached_property
    def reader(self) -> PictureReader | None:
        """Return the reader of pictures for this model; None if it is text-only."""
        if not self.config.sees:
            return None
        return PictureReader(self.family.preprocess(self.config, self.preprocessing), upright=self.family.upright)

    @functools.cached_property
    def prompts(self) -> Prompts:
        read = None if self.reader is None else self.reader.read
        return self.family.prompts(self.tokenizer, self.config, self.generation_config, read)

    @property
    def is_chat(self) -> bool:
        return self.generation_config.is_chat

    @property
    def grounding(self) -> Grounding:
        return self.family.grounding

    @property
    def names(self) -> list[str]:
        """Names of all tensors in file order, without the scales of FP8 weights."""
        return [name for name in self._owners if not self._is_scale(name)]

    def _is_scale(self, name: str) -> bool:
        return self._fp8_block is not None and name.endswith(fp8.SCALE) and name.removesuffix(fp8.SCALE) in self._owners

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def entry(self, name: str) -> Entry | PickledTensor:
        """Return dtype and shape of a tensor, without reading it."""
        shard, published = self._owners[name]
        return shard.entries[published]

    def path(self, name: str) -> Path:
        """Return the shard of a tensor."""
        return self._owners[name][0].path

    def origin(self, name: str) -> str:
        """Return file and name of a tensor, for errors."""
        return f"{self.path(name)}: {name!r}"

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor, read-only and memory-mapped; FP8 tensors are converted to float32 in memory.

        Raises
        ------
        QvlError
            If there is no such tensor, or the scales of an FP8 tensor do not match it.
        """
        if name not in self._owners:
            raise QvlError(f"{self.folder}: has no tensor {name!r}; is the download complete?")
        array = read_tensor(*self._owners[name])
        return array if array.dtype != FP8 else self._dequantized(name, array)

    def _dequantized(self, name: str, weight: np.ndarray) -> np.ndarray:
        block, scale = self._fp8_block, name + fp8.SCALE
        if block is None:
            raise QvlError(f"{self.path(name)}: {name!r} is FP8, but config.json does not say so; download it again")
        shape = tuple(-(-size // side) for size, side in zip(weight.shape, block))
        if scale not in self or self.entry(scale).shape != shape or weight.ndim != 2:
            raise QvlError(f"{self.path(name)}: {scale!r} is missing or not of shape {list(shape)}; download it again")
        dtype = self.entry(scale).dtype
        if dtype not in FLOATS or dtype == FP8:  # integers may be exponents
            raise QvlError(f"{self.origin(scale)} is {dtype}, expected 16 or 32 bits of floating point; {fp8.REMEDY}")
        return fp8.dequantize(weight, self.vector(scale), block)

    def vector(self, name: str) -> np.ndarray:
        """Return a tensor as float32, in memory.

        Raises
        ------
        QvlError
            If there is no such tensor, or a value is not finite.
        """
        vector = self.tensor(name).astype(np.float32)
        if not np.isfinite(vector).all():
            raise QvlError(f"{self.origin(name)} holds a value that is not finite; download the model again")
        return vector

    def check(self, wanted: dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]]) -> None:
        """Compare the folder's tensors with those of a config.

        Parameters
        ----------
        wanted : dict
            Shape and possible dtypes of every tensor.

        Raises
        ------
        QvlError
            For the first tensor that is missing, has another shape or dtype, or is unexpected.
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
        """Return a short hash of each weight file, of its size and sampled bytes, to distinguish sources."""
        return {shard.path.name: _fingerprint(shard.path) for shard in self._shards}


def _fingerprint(path: Path, samples: int = 64, length: int = 4096) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open_regular(path) as file:
        for i in range(samples):
            file.seek(max(size - length, 0) * i // (samples - 1))
            digest.update(file.read(length))
    return digest.hexdigest()[:32]
