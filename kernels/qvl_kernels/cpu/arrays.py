"""Checked inputs of kernels: arrays, prepared weights and the KV cache."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvl_kernels.cpu.runner import Address, Program, aligned
from qvl_kernels.ops import Array, Move, restored
from qvl_kernels.packing import Matrix, packed_shapes, product_bits, round_up

CACHE_DTYPES: dict[str, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}


def address(array: Any) -> Address:
    """Return the address of a numpy array; 0 for None."""
    if array is None:
        return Address(0)
    try:
        return Address(ctypes.addressof(ctypes.c_char.from_buffer(array)))  # a third of the time of the attribute
    except (TypeError, ValueError):  # read-only, empty, or not contiguous
        return Address(array.ctypes.data)


def check(name: str, array: Array, dtype: np.typing.DTypeLike, shape: tuple[int | None, ...]) -> np.ndarray:
    """Check that `array` is a C-contiguous numpy array of this type and shape (None: any length)."""
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected a numpy array, got {type(array).__name__}")
    fits = array.dtype == dtype and len(array.shape) == len(shape)
    if fits:
        for got, length in zip(array.shape, shape):
            fits &= length is None or got == length
    if not fits:
        want = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ValueError(f"{name}: expected {np.dtype(dtype).name} {want}, got {array.dtype.name} {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a contiguous array")
    return array


class CpuWeight:
    """A `Matrix` with checked arrays; nothing is copied."""

    def __init__(self, matrix: Matrix):
        self.matrix = matrix
        self.n, self.k, self.bits, self.group_size = matrix.n, matrix.k, matrix.bits, matrix.group_size
        self.product_bits = product_bits(matrix.bits)
        has_zeros = matrix.zeros is not None
        for suffix, (shape, dtype) in packed_shapes(
            matrix.n, matrix.k, matrix.bits, matrix.group_size, zeros=has_zeros
        ).items():
            check(suffix, matrix.weight if suffix in ("weight", "qweight") else getattr(matrix, suffix), dtype, shape)
        if matrix.perm is not None:
            check("perm", matrix.perm, np.int32, (matrix.k,))
            if not np.array_equal(np.sort(matrix.perm), np.arange(matrix.k)):
                raise ValueError("perm: expected every column once")
        if matrix.bias is not None:
            check("bias", matrix.bias, np.float32, (matrix.n,))
        self.weight, self.scales, self.zeros, self.perm, self.bias = (
            address(a) for a in (matrix.weight, matrix.scales, matrix.zeros, matrix.perm, matrix.bias)
        )

    @property
    def blocks(self) -> int:
        """Number of blocks of 128 columns."""
        return round_up(self.k, 128) // 128


class CpuCache:
    """Keys and values of all layers; `cached_attention` describes the layout."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str):
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"cache dtype {dtype!r}: expected one of {', '.join(CACHE_DTYPES)}")
        if min(layers, kv_heads, capacity) < 1 or head_dim < 2 or head_dim % 2 or head_dim > 256:
            raise ValueError(f"cache of {layers} layers, {kv_heads} heads of {head_dim}, {capacity} positions")
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.capacity, self.dtype = capacity, dtype
        self.depth, self.width = round_up(head_dim, 4), round_up(head_dim, 16)
        self.padded = round_up(capacity, 16)
        kind = CACHE_DTYPES[dtype]
        # Zeroed: padding is multiplied by zero and must be finite. The system allocates pages on first use.
        self.keys = _zeros((layers, kv_heads, self.padded // 16, self.depth * 16), kind)
        self.values = _zeros((layers, kv_heads, self.padded, self.width), kind)
        scales = (layers, 2, kv_heads, self.padded) if dtype == "int8" else (layers, 2, 0, 0)
        self.scales = _zeros(scales, np.dtype(np.float32))
        parts = (self.keys, self.values, self.scales)
        firsts, strides = [address(part) for part in parts], [part.nbytes // layers for part in parts]
        self._addresses = [self._parts(*(a + layer * b for a, b in zip(firsts, strides))) for layer in range(layers)]

    def _parts(self, keys: int, values: int, scales: int) -> tuple[Address, Address, Address, Address]:
        value_scales = scales + self.scales.nbytes // (2 * self.layers)
        return Address(keys), Address(values), Address(scales), Address(value_scales)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.scales.nbytes

    def addresses(self, layer: int) -> tuple[Address, Address, Address, Address]:
        """Return the addresses of keys, values, key scales and value scales of a layer."""
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer {layer} of a cache of {self.layers}")
        return self._addresses[layer]

    def resized(self, capacity: int, length: int, *, keep: bool = False) -> CpuCache:
        """See `KVCache`."""
        if length > min(capacity, self.capacity):
            raise ValueError(f"{length} positions do not fit from {self.capacity} into {capacity}")
        other = CpuCache(self.layers, self.kv_heads, self.head_dim, capacity, self.dtype)
        blocks = round_up(length, 16) // 16
        parts = {"keys": np.s_[:, :, :blocks], "values": np.s_[:, :, :length], "scales": np.s_[..., :length]}
        for name, filled in parts.items():
            getattr(other, name)[filled] = getattr(self, name)[filled]
            if not keep:  # so that not both keys and values are in memory twice
                delattr(self, name)
        return other

    def _filled(self, layer: int, length: int) -> list[np.ndarray]:
        """Return the part of a layer's arrays with the first `length` positions."""
        blocks = round_up(length, 16) // 16
        arrays = [self.keys[layer, :, :blocks], self.values[layer, :, :length]]
        return [*arrays, self.scales[layer, :, :, :length]] if self.dtype == "int8" else arrays

    def saved(self, layer: int, length: int) -> list[np.ndarray]:
        """See `KVCache`."""
        return [np.ascontiguousarray(array) for array in self._filled(layer, length)]

    def restore(self, layer: int, length: int, arrays: Sequence[np.ndarray]) -> None:
        """See `KVCache`."""
        targets = self._filled(layer, length)
        for target, array in zip(targets, restored([(t.shape, t.dtype) for t in targets], arrays)):
            target[...] = array


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = math.prod(shape)
    buffer = np.zeros(count + 64 // dtype.itemsize, dtype)
    offset = -address(buffer) % 64 // dtype.itemsize
    return buffer[offset : offset + count].reshape(shape)


def empty(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Allocate an uninitialized array, aligned to a cache line."""
    return aligned(math.prod(shape), dtype).reshape(shape)


def movable(program: Program, inputs: Sequence[Any]) -> Move | None:
    """See `Ops.movable`."""
    every, kinds = [_addresses(value) for value in inputs], [_kind(value) for value in inputs]
    known = [place for one in every for place in one]
    if sum(len(set(one)) for one in every) != len(set(known)):
        return None  # inputs share memory
    places, index = program.find(known)
    program.release(*inputs)

    def move(others: Sequence[Any]) -> bool:
        if [_kind(value) for value in others] != kinds:
            return False
        addresses = np.array([place for value in others for place in _addresses(value)], np.int64)
        program.words().reshape(-1)[places] = addresses[index]
        return True

    return move


def _addresses(value: np.ndarray | CpuCache | None) -> list[Address]:
    if isinstance(value, CpuCache):
        return [place for layer in range(value.layers) for place in value.addresses(layer)]
    return [] if value is None else [address(value)]


def _kind(value: np.ndarray | CpuCache | None) -> tuple[Any, ...]:
    """Return what must be equal for one input to replace another."""
    if isinstance(value, CpuCache):
        return value.layers, value.kv_heads, value.head_dim, value.capacity, value.dtype
    return () if value is None else (value.shape, value.dtype)
