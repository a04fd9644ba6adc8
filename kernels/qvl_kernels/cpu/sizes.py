"""Sizes on the CPU."""

from __future__ import annotations

from qvl_kernels.packing import round_up
from qvl_kernels.sizes import MappedSizes

ITEM = {"fp32": 4, "fp16": 2, "int8": 1}


class CpuSizes(MappedSizes):
    """`Sizes` of `CpuOps`."""

    def kv_cache(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> int:
        """Return the size with the padding of `CpuCache`; int8 has a float32 scale per vector."""
        vectors = layers * kv_heads * round_up(capacity, 16)
        scales = 2 * 4 if dtype == "int8" else 0
        return vectors * ((round_up(head_dim, 4) + round_up(head_dim, 16)) * ITEM[dtype] + scales)


SIZES = CpuSizes()
