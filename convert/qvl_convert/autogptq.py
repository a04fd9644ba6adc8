"""Lossless import of AutoGPTQ's layout (version 1) of a quantized linear layer, 4 or 8 bits.

With ``p = 32 / bits`` values in a word: qweight int32 ``[k/p, n]`` (row r, lowest bits first, holds columns
``p r + i``), qzeros int32 ``[groups, n/p]`` (the stored zero is one too small), scales fp16 ``[groups, n]``, g_idx
int32 ``[k]``, and often a bias ``[n]``; ``w[n, k] = scales[g_idx[k], n] * (q - zero)``.
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


@dataclasses.dataclass(frozen=True)
class AutoGptq:
    """The quantization of a checkpoint's linear layers: `qvl_convert.imports.Import`.

    Attributes
    ----------
    bits : int
        4 or 8.
    group_size : int
        Columns per scale; -1 is one group per row.
    path : str
        The file that describes it.
    """

    bits: int
    group_size: int
    path: str

    METHOD: ClassVar[str] = "autogptq"

    @classmethod
    def read(cls, config: Mapping[str, Any], path: str) -> AutoGptq:
        """Read a `quantize_config.json`.

        Raises
        ------
        QvlError
            For another layout or number of bits.
        """
        known = {"quant_method": ("gptq",), "bits": (4, 8), "checkpoint_format": ("gptq",), "format": ("gptq",)}
        known_values(config, {**known, "is_marlin_format": (False,)}, path)
        size = config.get("group_size", -1)
        if type(size) is not int or (size != -1 and (not 0 < size < 1 << 31 or size % 32)):
            raise QvlError(f"{path}: 'group_size' is {str(size)[:60]!r}, expected -1 or a multiple of 32; {REMEDY}")
        return cls(config.get("bits", 4), size, path)

    def wanted(self, base: str, n: int, k: int) -> Wanted:
        pack = 32 // self.bits
        if k % pack or n % pack:
            raise QvlError(f"{self.path}: {base!r} is {n} x {k}, no multiples of {pack}; {REMEDY}")
        groups = 1 if self.group_size == -1 else -(-k // self.group_size)
        return {
            f"{base}.qweight": ((k // pack, n), WORDS),
            f"{base}.qzeros": ((groups, n // pack), WORDS),
            f"{base}.scales": ((groups, n), HALVES),
            f"{base}.g_idx": ((k,), WORDS),
        }

    def codes(self, checkpoint: Checkpoint, base: str) -> np.ndarray:
        return unpack_words(checkpoint.tensor(f"{base}.qweight"), self.bits, axis=0).T

    def zeros(self, checkpoint: Checkpoint, base: str) -> np.ndarray | None:
        words = np.ascontiguousarray(checkpoint.tensor(f"{base}.qzeros"))
        # a zero of 16 (or 256) is stored as 15 (255)
        zeros = unpack_words(words, self.bits, axis=1).astype(np.int16) + 1
        if np.all(zeros == SYMMETRIC_ZERO[self.bits]):
            return None
        if zeros.max() > 255:
            raise QvlError(f"{checkpoint.path(f'{base}.qzeros')}: {base!r} has a zero point of 256; {REMEDY}")
        return zeros.T.astype(np.uint8)

    def perm(self, checkpoint: Checkpoint, base: str) -> np.ndarray | None:
        groups = checkpoint.tensor(f"{base}.g_idx")
        columns = len(groups)
        order = np.argsort(groups, kind="stable").astype(np.int32)
        wanted = np.arange(columns) // (columns if self.group_size == -1 else self.group_size)
        if not np.array_equal(groups[order], wanted):
            name = f"{base}.g_idx"
            raise QvlError(
                f"{checkpoint.path(name)}: {name!r} does not fill groups of {self.group_size}; download it again"
            )
        return None if np.array_equal(order, np.arange(columns)) else order
