"""Lossless import of the quantized linear layers of a published checkpoint, for several layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from qvl_convert.checkpoint import FLOATS, Checkpoint
from qvl_kernels.packing import BLOCK, SYMMETRIC_ZERO, Matrix, pack
from qvl_runtime.errors import QvlError
from qvl_runtime.families.specs import MatrixSpec, bias_name

WORDS = (np.dtype(np.int32),)
HALVES = (np.dtype(np.float16),)
REMEDY = "take the unquantized model, or its AutoGPTQ or AWQ files"

Wanted = dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]]
"""Shape and possible dtypes of tensors, by name."""


class Import(Protocol):
    """A layout of quantized linear layers.

    Attributes
    ----------
    METHOD : str
        Its name in the blob.
    bits : int
    group_size : int
        Columns per scale; -1 is one group per row.
    path : str
        The file that describes it.
    """

    METHOD: ClassVar[str]

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def path(self) -> str: ...

    def wanted(self, base: str, n: int, k: int) -> Wanted:
        """Return the tensors of a linear layer ``[n, k]`` with the base name `base`, without its bias."""

    def codes(self, checkpoint: Checkpoint, base: str) -> np.ndarray:
        """Return the stored integers, uint8 ``[n, k]``."""

    def zeros(self, checkpoint: Checkpoint, base: str) -> np.ndarray | None:
        """Return zero points, uint8 ``[n, groups]``; None if all are symmetric."""

    def perm(self, checkpoint: Checkpoint, base: str) -> np.ndarray | None:
        """Return the order of columns in which groups are contiguous, int32 ``[k]``; None for the stored order."""


def known_values(config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], path: str) -> None:
    """Refuse unsupported values by name; the first known value is the default of an absent key."""
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            expected = " or ".join(map(repr, values))
            raise QvlError(f"{path}: '{key}' is {str(config[key])[:60]!r}, only {expected} is read; {REMEDY}")


def unpack_words(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unpack int32 words to uint8 values of 4 or 8 bits along an axis, lowest bits first."""
    octets = np.ascontiguousarray(np.moveaxis(words, axis, -1)).astype("<i4", copy=False).view(np.uint8)
    if bits == 4:
        octets = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)
    return np.moveaxis(octets, -1, axis)


class Imported:
    """The quantized matrices of a checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    layout : Import
    specs : list of MatrixSpec
        Matrices of the model; those of the decoder may be quantized.

    Attributes
    ----------
    specs : dict of str to MatrixSpec
        The quantized matrices by name.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Import, specs: list[MatrixSpec]):
        self.checkpoint, self.layout = checkpoint, layout
        quantized = [spec for spec in specs if spec.part == "decoder" and f"{_base(spec.source)}.qweight" in checkpoint]
        self.specs = {spec.name: spec for spec in quantized}

    def wanted(self) -> Wanted:
        """All tensors of these matrices."""
        wanted: Wanted = {}
        for spec in self.specs.values():
            for source, n in spec.sources.items():
                wanted |= self.layout.wanted(_base(source), n, spec.k)
                if spec.bias or bias_name(source) in self.checkpoint:
                    wanted[bias_name(source)] = ((n,), FLOATS)
        return wanted

    @property
    def stored_group_size(self) -> int:
        """The group size in the blob; larger groups are split into several with the same scale."""
        size = self.layout.group_size
        return BLOCK if size == -1 else next(stored for stored in (128, 64, 32) if size % stored == 0)

    def has_bias(self, spec: MatrixSpec) -> bool:
        """Whether a matrix has a bias. Some quantized layers have one although the original has none."""
        return any(bias_name(source) in self.checkpoint for source in spec.sources)

    def origin(self, spec: MatrixSpec) -> str:
        """Return file and name of the integers of a matrix, for errors."""
        return self.checkpoint.origin(f"{_base(spec.source)}.qweight")

    def zeros(self, spec: MatrixSpec) -> np.ndarray | None:
        """Return zero points, uint8 ``[n, groups]``; None if all are symmetric."""
        parts = {source: self.layout.zeros(self.checkpoint, _base(source)) for source in spec.sources}
        if all(part is None for part in parts.values()):
            return None
        groups = next(part.shape[1] for part in parts.values() if part is not None)
        symmetric = SYMMETRIC_ZERO[self.layout.bits]
        filled = [
            np.full((spec.sources[source], groups), symmetric, np.uint8) if part is None else part
            for source, part in parts.items()
        ]
        return np.concatenate(filled)

    def perm(self, spec: MatrixSpec) -> np.ndarray | None:
        """Return the order of a matrix's columns.

        Raises
        ------
        QvlError
            If the parts of a stacked matrix have different orders.
        """
        first, *orders = (self.layout.perm(self.checkpoint, _base(source)) for source in spec.sources)
        for order in orders:
            alike = np.array_equal(order, first) if order is not None and first is not None else order is first
            if not alike:
                names = ", ".join(map(_base, spec.sources))
                raise QvlError(f"{self.layout.path}: {names} group their columns in different orders; {REMEDY}")
        return first

    def matrix(self, spec: MatrixSpec) -> Matrix:
        """Import one matrix.

        Raises
        ------
        QvlError
            If a scale is not finite, or the order of columns is not supported.
        """
        perm, zeros = self.perm(spec), self.zeros(spec)
        codes = np.concatenate([self.layout.codes(self.checkpoint, _base(source)) for source in spec.sources])
        scales = np.concatenate([self._scales(_base(source)) for source in spec.sources])
        if perm is not None:
            codes = codes[:, perm]
        size, stored = self.layout.group_size, self.stored_group_size
        if size != stored:
            group_of = np.arange(0, spec.k, stored) // (spec.k if size == -1 else size)
            scales = scales[:, group_of]
            zeros = None if zeros is None else zeros[:, group_of]
        return pack(codes, scales, self.layout.bits, stored, zeros=zeros, perm=perm, bias=self._bias(spec))

    def _scales(self, base: str) -> np.ndarray:
        name = f"{base}.scales"
        scales, path = np.ascontiguousarray(self.checkpoint.tensor(name).T), self.checkpoint.path(name)
        if not np.isfinite(scales).all():
            raise QvlError(f"{path}: {name!r} holds a value that is not finite; download it again")
        return scales

    def _bias(self, spec: MatrixSpec) -> np.ndarray | None:
        if not self.has_bias(spec):
            return None
        parts = [np.zeros(n, np.float32) for n in spec.sources.values()]
        for i, source in enumerate(spec.sources):
            if bias_name(source) in self.checkpoint:
                parts[i] = self.checkpoint.vector(bias_name(source))
        return np.concatenate(parts)


def _base(source: str) -> str:
    """Return the base name of a linear layer, without ``.weight``."""
    return source.removesuffix(".weight")
