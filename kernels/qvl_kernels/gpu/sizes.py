"""Sizes on a GPU."""

from __future__ import annotations

from qvl_kernels.gpu.cache import cache_bytes
from qvl_kernels.gpu.memory import RESERVE
from qvl_kernels.gpu.weights import device_bytes


class CudaSizes:
    """`Sizes` of `CudaOps`."""

    reserve = RESERVE

    def weight(self, n: int, k: int, bits: int, group_size: int, *, zeros: bool, perm: bool, bias: bool) -> int:
        """Return the size in the device layout; zero points are packed with the scales."""
        return device_bytes(n, k, bits, group_size) + (4 * k if perm else 0) + (4 * n if bias else 0)

    def kv_cache(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> int:
        """See `cache_bytes`."""
        return cache_bytes(layers, kv_heads, head_dim, capacity, dtype)

    def workspace(self, values: int) -> int:
        """Return the size in float32, doubled for padded fp16 copies and partial sums of split products."""
        return 8 * values


SIZES = CudaSizes()
