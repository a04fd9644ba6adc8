"""Lossless import of AWQ's layout (version "gemm") of a quantized linear layer, 4 bits.

qweight int32 ``[k, n/8]``: the nibble at bits 4 i of word j holds row ``8 j + ORDER[i]``; qzeros int32
``[groups, n/8]``, packed the same way; scales fp16 ``[groups, n]``; ``w[n, k] = scales[k / group, n] * (q - zero)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from qvl_convert.checkpoint import Checkpoint
from qvl_convert.imports import HALVES, REMEDY, WORDS, Wanted, known_values, unpack_words
from qvl_kernels.packing import SYMMETRIC_ZERO
from qvl_runtime.errors import QvlError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class Awq:
    """The quantization of a checkpoint's linear layers: `qvl_convert.imports.Import`.

    Attributes
    ----------
    group_size : int
        Columns per scale.
    path : str
        The file that describes it.
    """

    group_size: int
    path: str

    METHOD: ClassVar[str] = "awq"
    bits: ClassVar[int] = 4

    @classmethod
    def read(cls, config: Mapping[str, Any], path: str) -> Awq:
        """Read the `quantization_config` of a `config.json`.

        Raises
        ------
        QvlError
            For another layout or number of bits.
        """
        known_values(config, {"quant_method": ("awq",), "version": ("gemm",), "bits": (4,)}, path)
        size = config.get("group_size", 128)
        if type(size) is not int or size <= 0 or size % 32:
            raise QvlError(f"{path}: 'group_size' is {str(size)[:60]!r}, expected a multiple of 32; {REMEDY}")
        return cls(size, path)

    def wanted(self, base: str, n: int, k: int) -> Wanted:
        if n % 8 or k % self.group_size:
            raise QvlError(f"{self.path}: {base!r} is {n} x {k}, no multiples of 8 and {self.group_size}; {REMEDY}")
        groups = k // self.group_size
        return {
            f"{base}.qweight": ((k, n // 8), WORDS),
            f"{base}.qzeros": ((groups, n // 8), WORDS),
            f"{base}.scales": ((groups, n), HALVES),
        }

    def codes(self, checkpoint: Checkpoint, base: str) -> np.ndarray:
        return _rows(checkpoint.tensor(f"{base}.qweight"))

    def zeros(self, checkpoint: Checkpoint, base: str) -> np.ndarray | None:
        zeros = _rows(checkpoint.tensor(f"{base}.qzeros"))
        return None if np.all(zeros == SYMMETRIC_ZERO[4]) else zeros

    def perm(self, checkpoint: Checkpoint, base: str) -> None:
        """Return None: columns are in order."""


def _rows(words: np.ndarray) -> np.ndarray:
    """Unpack ``[k, n/8]`` words to ``[n, k]`` values."""
    nibbles = unpack_words(np.ascontiguousarray(words), 4, axis=1)
    in_order = nibbles.reshape(len(words), -1, 8)[:, :, np.argsort(ORDER)]
    return np.ascontiguousarray(in_order.reshape(len(words), -1).T)
