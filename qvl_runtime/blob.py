"""The `.qvl` file: one valid safetensors file with a whole model. It is memory-mapped, not copied.

Metadata keys (all text, most of it JSON): `format` ("qvl"), `version`, `config`, `generation_config`,
`preprocessing` (what `Family.read_preprocessing` returns), `quantization` (settings of each part), `calibration` (its
data, where GPTQ was used), `source` (what it was converted from), `hashes` (SHA-256 of every tensor, and of the other
metadata). Tensors: for each `MatrixSpec`, `NAME.weight` (fp16) or `NAME.qweight`, `NAME.scales` and, if asymmetric,
`NAME.zeros`; `NAME.bias` and `NAME.perm` where there is one; each `VectorSpec` under its name; and `tokenizer.ranks`,
the bytes that `Family.read_ranks` returns: the published `qwen.tiktoken` of Qwen-VL, the `Vocabulary` of later models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qvl_kernels.packing import BLOCK, Matrix, group_sizes, packed_shapes
from qvl_runtime.errors import QvlError
from qvl_runtime.families import family_of
from qvl_runtime.families.base import Family
from qvl_runtime.families.config import Config
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.specs import PARTS, MatrixSpec, TensorSpec, VectorSpec
from qvl_runtime.file.json_text import parse_object
from qvl_runtime.file.opening import as_path, shown
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.inputs.tokenizer import MAX_RANKS

FORMAT, VERSION = "qvl", "1"
RANKS = "tokenizer.ranks"
METADATA = "__metadata__"
REMEDY = "convert the model again"

DEMO = {"model.safetensors": "ddba226f92bc3340bacc85bcc0390c02"}
"""The `files` of the `source` of the shipped demo model, which the title of its family would call the published one."""


def metadata_hash(metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of the metadata without `hashes`."""
    rest = sorted((key, value) for key, value in metadata.items() if key != "hashes")
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


class Blob:
    """An opened `.qvl` file.

    Attributes
    ----------
    family : Family
    config : Config
    generation_config : GenerationConfig
    metadata : dict
        The other metadata, parsed: `preprocessing`, `quantization`, `source`, `hashes`.

    Raises
    ------
    QvlError
        If the file is damaged, has another format or version, or contradicts its own config.
    """

    def __init__(self, path: str | os.PathLike):
        if os.path.isdir(as_path(path)):
            raise QvlError(f"{shown(path)}: is a folder; make one file of it with: qvl convert {shown(path)} OUT.qvl")
        self.file = TensorFile(path)
        self.path = self.file.path
        raw = self.file.metadata
        if raw.get("format") != FORMAT:
            raise QvlError(f"{self.path}: is no .qvl file; make one with: qvl convert FOLDER OUT.qvl")
        if raw.get("version") != VERSION:
            raise QvlError(
                f"{self.path}: has format version {raw.get('version')!r}, this program reads {VERSION!r}; {REMEDY}"
            )
        config, where = self._json("config"), f"{self.path}: config"
        self.family: Family = family_of(config, where)
        self.config: Config = self.family.read_config(config, where)
        where = f"{self.path}: generation_config"
        self.generation_config = GenerationConfig.from_dict(self._json("generation_config"), where)
        self.generation_config.check_tokens(self.config.vocab_size, where)
        self.metadata = {key: self._json(key) for key in ("preprocessing", "quantization", "source", "hashes")}
        specs = list(self.family.tensors(self.config))
        self._matrices = {s.name: s for s in specs if isinstance(s, MatrixSpec)}
        self._vectors = {s.name: s for s in specs if isinstance(s, VectorSpec)}
        self._owners: dict[str, TensorSpec] = {s.name: s for s in specs}

    def _json(self, key: str) -> dict[str, Any]:
        if key not in self.file.metadata:
            raise QvlError(f"{self.path}: its metadata {key!r} is missing; {REMEDY}")
        return parse_object(self.file.metadata[key], f"{self.path}: its metadata {key!r}", REMEDY)

    @property
    def title(self) -> str:
        """Return the model's display name."""
        if self.metadata["source"].get("files") == DEMO:
            return "Demo model"
        return self.family.title(self.config, self.generation_config)

    @property
    def ranks(self) -> bytes:
        """Return the tokenizer's rank file."""
        ranks = self.file.array(RANKS)
        if ranks.nbytes > MAX_RANKS:
            raise QvlError(f"{self.path}: its tokenizer has {ranks.nbytes} bytes, more than {MAX_RANKS}; {REMEDY}")
        return ranks.tobytes()

    def vector(self, name: str) -> np.ndarray:
        """Return a `VectorSpec` tensor as float32."""
        return self._finite(name, self._typed(name, self._vectors[name].shape, np.dtype(np.float32)))

    def matrix(self, name: str) -> Matrix:
        """Return a `MatrixSpec` weight with its bias, as views of the file."""
        spec = self._matrices[name]
        bits, group_size = self.bits(name)
        asymmetric = f"{name}.zeros" in self.file
        shapes = packed_shapes(spec.n, spec.k, bits, group_size, zeros=asymmetric)
        arrays = {suffix: self._typed(f"{name}.{suffix}", *wanted) for suffix, wanted in shapes.items()}
        scales, bias = arrays.get("scales"), self._optional(f"{name}.bias", (spec.n,), np.float32)
        for suffix, small in (("scales", scales), ("bias", bias)):
            if small is not None:
                self._finite(f"{name}.{suffix}", small)
        perm = self._optional(f"{name}.perm", (spec.k,), np.int32)
        if perm is not None and not np.array_equal(np.sort(perm), np.arange(spec.k)):
            raise QvlError(f"{self.path}: '{name}.perm' is no permutation of {spec.k} columns; {REMEDY}")
        return Matrix(
            n=spec.n,
            k=spec.k,
            bits=bits,
            group_size=group_size,
            weight=arrays["weight" if bits == 16 else "qweight"],
            scales=scales,
            zeros=arrays.get("zeros"),
            perm=perm,
            bias=bias,
        )

    def bits(self, name: str) -> tuple[int, int]:
        """Return the bits and the group size of a matrix, derived from the shapes of its arrays."""
        if f"{name}.weight" in self.file:
            return 16, BLOCK
        qweight, scales = self.file.array(f"{name}.qweight"), self.file.array(f"{name}.scales")
        bits = groups = None
        if qweight.ndim == 5 and scales.ndim == 3 and qweight.shape[1]:
            bits, groups = {12: 3, 16: 4, 32: 8}.get(qweight.shape[2]), scales.shape[1] // qweight.shape[1]
        if bits is None or groups not in [BLOCK // g for g in group_sizes(bits)]:
            raise QvlError(
                f"{self.path}: '{name}' has arrays of shapes {list(qweight.shape)} and {list(scales.shape)}, "
                f"which no matrix of 3, 4 or 8 bits has; {REMEDY}"
            )
        return bits, BLOCK // groups

    def _typed(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = self.file.array(name)
        if array.shape != shape or array.dtype != dtype:
            raise QvlError(
                f"{self.path}: '{name}' is {array.dtype} {list(array.shape)}, "
                f"its config asks for {np.dtype(dtype)} {list(shape)}; {REMEDY}"
            )
        return array

    def _finite(self, name: str, array: np.ndarray) -> np.ndarray:
        """Check that an array is finite: kernels would silently turn NaN and infinity into numbers."""
        if array.dtype == np.float16 and array.size:
            # Two reductions without a temporary array: a model has tens of millions of scales.
            finite = array.view(np.int16).max() < 0x7C00 and array.view(np.uint16).max() < 0xFC00
        else:
            finite = np.isfinite(array).all()
        if not finite:
            raise QvlError(f"{self.path}: '{name}' holds a value that is not finite; {REMEDY}")
        return array

    def _optional(self, name: str, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray | None:
        return self._typed(name, shape, np.dtype(dtype)) if name in self.file else None

    def part_of(self, name: str) -> str | None:
        """Return the part (a key of `PARTS`) of a tensor; None for the tokenizer."""
        spec = self._owners.get(name) or self._owners.get(name.rpartition(".")[0])
        return None if spec is None else spec.part

    def part_sizes(self) -> dict[str, int]:
        """Return the bytes of each part (the keys of `PARTS`)."""
        sizes = dict.fromkeys(PARTS, 0)
        for name, entry in self.file.entries.items():
            if (part := self.part_of(name)) is not None:
                sizes[part] += entry.stop - entry.start
        return {part: size for part, size in sizes.items() if size}

    def hashes(self, *parts: str) -> dict[str, str]:
        """Return the SHA-256 of the tensors, or of those of some parts: as stored in the file, else computed."""
        told = self.metadata["hashes"]
        names = sorted(name for name in self.file.entries if not parts or self.part_of(name) in parts)
        return {name: told.get(name) or hashlib.sha256(self.file.bytes(name)).hexdigest() for name in names}

    def check(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Verify the hash of the metadata and of every tensor, and that every value is finite.

        Loading checks the small tensors only. `progress` is called with the bytes of each checked tensor.

        Raises
        ------
        QvlError
            Names the first tensor whose hash differs or that is not finite.
        """
        hashes = self.metadata["hashes"]
        if metadata_hash(self.file.metadata) != hashes.get(METADATA):
            raise QvlError(f"{self.path}: its metadata is damaged (its hash differs); copy the file again")
        for name, entry in self.file.entries.items():
            if hashlib.sha256(self.file.bytes(name)).hexdigest() != hashes.get(name):
                raise QvlError(f"{self.path}: tensor '{name}' is damaged (its hash differs); copy the file again")
            if entry.dtype.kind == "f":
                self._finite(name, self.file.array(name))
            progress(entry.stop - entry.start)
