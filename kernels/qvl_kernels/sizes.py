"""What things take on a backend, in bytes, before they are made."""

from __future__ import annotations

from typing import Protocol

from qvl_kernels.packing import packed_shapes


class Sizes(Protocol):
    """The sizes of a backend: `qvl_kernels.cpu.SIZES`, `qvl_kernels.gpu.SIZES`, `qvl_kernels.reference.SIZES`.

    Attributes
    ----------
    reserve : int
        What the device's driver takes besides.
    """

    reserve: int

    def weight(self, n: int, k: int, bits: int, group_size: int, *, zeros: bool, perm: bool, bias: bool) -> int:
        """A matrix ``[n, k]``, with zero points, an order of columns and a bias where it has them."""

    def kv_cache(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> int:
        """`Ops.kv_cache` of these arguments."""

    def workspace(self, values: int) -> int:
        """The arrays of a step that writes this many values, captured or not, and what its products make of them."""


class MappedSizes:
    """What backends have in common that read weights where the file is mapped."""

    reserve = 0

    def weight(self, n: int, k: int, bits: int, group_size: int, *, zeros: bool, perm: bool, bias: bool) -> int:
        """As in the file."""
        total = (4 * k if perm else 0) + (4 * n if bias else 0)
        for shape, dtype in packed_shapes(n, k, bits, group_size, zeros=zeros).values():
            size = dtype.itemsize
            for length in shape:
                size *= length
            total += size
        return total

    def workspace(self, values: int) -> int:
        """Activations in float32, and as much again for their quantized copies."""
        return 8 * values
