"""Arrays in device memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qvl_kernels.ops import Array


class DeviceArray:
    """A contiguous array on the GPU, or a slice of its leading dimension.

    Attributes
    ----------
    address : int
        Address of the first value.
    shape : tuple of int
    dtype : numpy dtype
    owner : object
        Owner of the memory; shared by slices.
    """

    __slots__ = ("address", "dtype", "owner", "shape")

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.typing.DTypeLike, owner: Any):
        self.address, self.shape, self.dtype, self.owner = address, tuple(shape), np.dtype(dtype), owner

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(map(int, self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Return rows ``i:j`` of the leading dimension as a view."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"a device array takes slices a[i:j] of its leading dimension, not {rows!r}")
        start, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.address + start * row, (max(stop - start, 0), *self.shape[1:]), self.dtype, self.owner)

    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view with another shape."""
        if math.prod(shape) != self.size:
            raise ValueError(f"{self} cannot have the shape {list(shape)}")
        return DeviceArray(self.address, shape, self.dtype, self.owner)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} at {self.address:#x})"


def same_shape(a: Array, b: Array) -> None:
    """Raise a ValueError if the shapes of two arrays differ."""
    if tuple(a.shape) != tuple(b.shape):
        raise ValueError(f"arrays of shapes {list(a.shape)} and {list(b.shape)}, expected equal ones")


def expect(array: Array, shape: tuple[int, ...], dtype: np.dtype | None = None) -> None:
    """Raise a ValueError if an array has another shape, or another type if `dtype` is given."""
    if tuple(array.shape) != tuple(shape) or (dtype is not None and array.dtype != dtype):
        wanted = f"{dtype or ''} {list(shape)}".strip()
        raise ValueError(f"{array} where {wanted} is expected")
