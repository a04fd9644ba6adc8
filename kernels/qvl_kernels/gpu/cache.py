"""Keys and values on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.memory import Memory
from qvl_kernels.gpu.signatures import ELEMENTS
from qvl_kernels.ops import restored
from qvl_kernels.packing import round_up

CACHE_DTYPES = {"fp16": np.dtype(np.float16), "int8": np.dtype(np.int8)}

_STRIDE = 64
"""Rows of the arrays are padded to this many positions, which aligns every head of every layer."""


def cache_bytes(layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> int:
    """Bytes of a cache."""
    positions = layers * 2 * kv_heads * round_up(capacity, _STRIDE)
    return positions * (head_dim * CACHE_DTYPES[dtype].itemsize + (2 if dtype == "int8" else 0))


class CudaCache:
    """Keys and values, ``[layers, 2, kv_heads, capacity, head_dim]`` in fp16 or int8.

    int8 has one fp16 scale a position and head, ``[layers, 2, kv_heads, capacity]``.
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
        self.values = memory.array((layers, 2, kv_heads, self.stride, head_dim), CACHE_DTYPES[dtype])
        self.scales = memory.array((layers, 2, kv_heads, self.stride), np.float16) if dtype == "int8" else None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def layer(self, index: int) -> tuple:
        """Launch arguments of one layer: keys, values, and their scales."""
        return (*_halves(self.values, index), *_halves(self.scales, index))

    def resized(self, capacity: int, length: int) -> CudaCache:
        """A cache of another capacity that holds the first `length` positions of this one."""
        other = CudaCache(self.memory, self.launch, self.layers, self.kv_heads, self.head_dim, capacity, self.dtype)
        self._move(self.values, other.values, length * self.head_dim * self.values.dtype.itemsize // 2)
        if self.scales is not None:
            self._move(self.scales, other.scales, length)
        return other

    def saved(self, layer: int, length: int) -> list[np.ndarray]:
        """See `KVCache`."""
        found = []
        for array in self._arrays():
            host = np.empty(array.shape[1:], array.dtype)
            self.memory.driver.to_host(host, array[layer : layer + 1].address)
            found.append(np.ascontiguousarray(host[:, :, :length]))
        return found

    def restore(self, layer: int, length: int, arrays: Sequence[np.ndarray]) -> None:
        """See `KVCache`."""
        expected = [((*a.shape[1:3], length, *a.shape[4:]), a.dtype) for a in self._arrays()]
        for array, values in zip(self._arrays(), restored(expected, arrays)):
            host = np.zeros(array.shape[1:], array.dtype)
            host[:, :, :length] = values
            self.memory.driver.to_device(array[layer : layer + 1].address, host)
        self.memory.driver.synchronize()

    def _arrays(self) -> list[DeviceArray]:
        return [self.values] if self.scales is None else [self.values, self.scales]

    def _move(self, source: DeviceArray, target: DeviceArray, size: int) -> None:
        """Copy the first `size` 16-bit units of every head."""
        if size:
            strides = [math.prod(a.shape[3:]) * a.dtype.itemsize // 2 for a in (source, target)]
            grid = (-(-size // ELEMENTS), math.prod(source.shape[:3]))
            self.launch("move_rows.any", grid, source, target, size, *strides)


def _halves(array: DeviceArray | None, layer: int) -> tuple:
    if array is None:
        return None, None
    half = array[layer : layer + 1]
    return half, (half, half.nbytes // 2)
