"""Keys and values on the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.memory import Memory, rounded
from qvl_kernels.gpu.signatures import ELEMENTS
from qvl_kernels.ops import restored
from qvl_kernels.packing import round_up

CACHE_DTYPES: dict[str, np.dtype] = {"fp16": np.dtype(np.float16), "int8": np.dtype(np.int8)}

_STRIDE = 64
"""Rows of the arrays are padded to a multiple of this, which aligns every head of every layer."""


def cache_bytes(layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> int:
    """Return the bytes of a cache as allocated by the driver."""
    positions = 2 * kv_heads * round_up(capacity, _STRIDE)
    scales = rounded(positions * 2) if dtype == "int8" else 0
    return layers * (rounded(positions * head_dim * CACHE_DTYPES[dtype].itemsize) + scales)


class CudaCache:
    """Keys and values: ``[2, kv_heads, capacity, head_dim]`` per layer, in fp16 or int8.

    int8 has one fp16 scale per position and head, ``[2, kv_heads, capacity]``.
    """

    def __init__(
        self,
        memory: Memory,
        launch: Launcher,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: str,
    ):
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"cache dtype {dtype!r}: expected one of {tuple(CACHE_DTYPES)}")
        if head_dim % 2 or not 0 < head_dim <= 128:
            raise ValueError(f"head_dim {head_dim}: the GPU kernels take an even one of at most 128")
        self.memory, self.launch = memory, launch
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.capacity, self.dtype = capacity, dtype
        self.stride = round_up(capacity, _STRIDE)
        self.arrays = [self._layer() for _ in range(layers)]

    def _layer(self) -> list[DeviceArray]:
        """Allocate the arrays of a layer: values, and scales for int8."""
        shape = (2, self.kv_heads, self.stride)
        found = [self.memory.array((*shape, self.head_dim), CACHE_DTYPES[self.dtype])]
        if self.dtype == "int8":
            found.append(self.memory.array(shape, np.float16))
        return found

    @property
    def nbytes(self) -> int:
        return cache_bytes(self.layers, self.kv_heads, self.head_dim, self.capacity, self.dtype)

    @functools.cached_property
    def addresses(self) -> np.ndarray:
        """int64 ``[layers, 4]``: those of keys, values and their scales, 0 where there are none."""
        return np.array([[0 if a is None else a.address for a in self.layer(i)] for i in range(self.layers)], np.int64)

    def layer(self, index: int) -> tuple:
        """Return the launch arguments of one layer: keys, values, and their scales."""
        halves = [half for array in self.arrays[index] for half in (array[:1], array[1:])]
        return tuple(halves + [None] * (4 - len(halves)))

    def resized(self, capacity: int, length: int, *, keep: bool = False) -> CudaCache:
        """Resize layer by layer, so that there are not two whole caches unless `keep`; see `KVCache`.

        A step that was captured on the invalid cache must not be replayed: the memory is freed.
        """
        other = CudaCache(self.memory, self.launch, 0, self.kv_heads, self.head_dim, capacity, self.dtype)
        other.layers = self.layers
        for arrays in self.arrays:
            other.arrays.append(other._layer())
            for source, target in zip(arrays, other.arrays[-1]):
                self._move(source, target, length * math.prod(source.shape[3:]) * source.dtype.itemsize // 2)
                if not keep:
                    source.owner.release()
        return other

    def saved(self, layer: int, length: int) -> list[np.ndarray]:
        """See `KVCache`."""
        found = []
        for array in self.arrays[layer]:
            host = np.empty(array.shape, array.dtype)
            self.memory.driver.to_host(host, array.address)
            found.append(np.ascontiguousarray(host[:, :, :length]))
        return found

    def restore(self, layer: int, length: int, arrays: Sequence[np.ndarray]) -> None:
        """See `KVCache`."""
        expected = [((*a.shape[:2], length, *a.shape[3:]), a.dtype) for a in self.arrays[layer]]
        for array, values in zip(self.arrays[layer], restored(expected, arrays)):
            host = np.zeros(array.shape, array.dtype)
            host[:, :, :length] = values
            self.memory.driver.to_device(array.address, host)
            self.memory.driver.synchronize()

    def _move(self, source: DeviceArray, target: DeviceArray, size: int) -> None:
        """Copy the first `size` 16-bit units of every head."""
        if size:
            strides = [math.prod(a.shape[2:]) * a.dtype.itemsize // 2 for a in (source, target)]
            grid = (-(-size // ELEMENTS), math.prod(source.shape[:2]))
            self.launch("move_rows.any", grid, source, target, size, *strides)
