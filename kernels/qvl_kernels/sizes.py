"""Sizes of weights, caches and work space of a backend in bytes, before allocation."""

from __future__ import annotations

from typing import Protocol

from qvl_kernels.packing import packed_shapes


class Sizes(Protocol):
    """The sizes of a backend: `qvl_kernels.cpu.SIZES`, `qvl_kernels.gpu.SIZES`, `qvl_kernels.reference.SIZES`.

    Attributes
    ----------
    reserve : int
        Memory of the device's driver.
    """

    reserve: int

    def weight(self, n: int, k: int, bits: int, group_size: int, *, zeros: bool, perm: bool, bias: bool) -> int:
        """Return the size of a matrix ``[n, k]``, with optional zero points, column order and bias."""

    def kv_cache(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> int:
        """Return the size of `Ops.kv_cache` with these arguments."""

    def workspace(self, values: int) -> int:
        """Return the size of the arrays of a step that writes this many values, including temporary copies."""


class MappedSizes:
    """Sizes of backends that read weights from the mapped file."""

    reserve = 0

    def weight(self, n: int, k: int, bits: int, group_size: int, *, zeros: bool, perm: bool, bias: bool) -> int:
        """Return the size in the file."""
        total = (4 * k if perm else 0) + (4 * n if bias else 0)
        for shape, dtype in packed_shapes(n, k, bits, group_size, zeros=zeros).values():
            size = dtype.itemsize
            for length in shape:
                size *= length
            total += size
        return total

    def workspace(self, values: int) -> int:
        """Return the size of float32 activations, doubled for quantized copies."""
        return 8 * values
