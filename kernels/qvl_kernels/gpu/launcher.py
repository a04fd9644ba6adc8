"""Launching kernels by name with checked arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from qvl_kernels.gpu.driver import Driver, Kernel
from qvl_kernels.gpu.graph import Queue
from qvl_kernels.gpu.signatures import KERNELS, tile
from qvl_kernels.ops import Array, DeviceError

ALIGNMENT = 16
"""Alignment of every pointer in bytes; kernels are compiled for it."""

Argument = Array | tuple[Array, int] | int | float | None
"""Argument of a kernel: a pointer (an array, an array with a byte offset, or None if not read) or a number."""

_SCALARS = {kind: functools.lru_cache(4096)(number) for kind, number in (("i32", np.int32), ("fp32", np.float32))}
"""Numbers of the kernels' widths; making one takes longer than finding it."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A compiled kernel.

    Attributes
    ----------
    code : bytes
    kind : str
        "cubin" or "ptx".
    symbol : str
        Name of the kernel in `code`.
    warps, shared : int
        Warps per program, and its shared memory in bytes.
    constants : dict
        Compile-time constants such as tile shapes.
    """

    code: bytes
    kind: str
    symbol: str
    warps: int
    shared: int
    constants: dict[str, int | bool]


class Images(Protocol):
    """Compiled kernels by name, all for one architecture."""

    architecture: int

    def __getitem__(self, name: str) -> Image: ...


class Launcher:
    """Loads kernels on first use and launches them.

    Attributes
    ----------
    replaced : int
        Number of calls of `replace`.
    """

    def __init__(self, driver: Driver, queue: Queue, images: Images):
        self.driver, self.queue, self.images = driver, queue, images
        self._kernels: dict[str, Kernel] = {}
        self._replaced: dict[str, Image] = {}
        self._tiles: dict[str, dict[str, Any]] = {}
        self.replaced = 0

    def constants(self, name: str) -> dict[str, int | bool]:
        """Return the compile-time constants of kernel `name`."""
        return self._image(name).constants

    def replace(self, name: str, image: Image) -> None:
        """Replace the image of a kernel, for tuning tile shapes."""
        self.replaced += 1
        self._replaced[name] = image
        self._kernels.pop(name, None)
        self._tiles.pop(name, None)

    def _image(self, name: str) -> Image:
        return self._replaced.get(name) or self.images[name]

    def tile(self, name: str) -> dict[str, Any]:
        """Return the entry of kernel `name` in tiles.json."""
        found = self._tiles.get(name)
        if found is None:
            found = self._tiles[name] = tile(name, self.images.architecture)
        return found

    def __call__(self, name: str, grid: tuple[int, ...], *args: Argument) -> None:
        """Launch kernel ``family.variant`` with the arguments of its signature."""
        kernel = self._kernels.get(name)
        if kernel is None:
            image = self._image(name)
            if image.shared > self.driver.shared_limit:
                raise DeviceError(
                    f"kernel {name} needs {image.shared} bytes of shared memory, "
                    f"{self.driver.name} has {self.driver.shared_limit}"
                )
            kernel = self.driver.load(image.code, image.kind, image.symbol, 32 * image.warps, image.shared)
            self._kernels[name] = kernel
        converters = _CONVERTERS[name.partition(".")[0]]
        if len(args) != len(converters):
            raise TypeError(f"kernel {name} takes {len(converters)} arguments, got {len(args)}")
        values = [convert(value) for convert, value in zip(converters, args)]
        values += [0, 0]  # Triton's global and profile scratch, unused
        shape = (*grid, 1, 1)[:3]
        self.queue(self.driver.launch, kernel, shape, values, keep=args)


def _pointer(value: Any) -> int:
    if value is None:
        return 0
    address = value[0].address + value[1] if isinstance(value, tuple) else value.address
    if address % ALIGNMENT:
        raise ValueError(f"{value} is not aligned to {ALIGNMENT} bytes: rows and heads must be multiples of 8 wide")
    return address


_CONVERTERS: dict[str, tuple[Callable, ...]] = {
    family: tuple(_SCALARS.get(kind, _pointer) for _, kind in kernel.arguments) for family, kernel in KERNELS.items()
}
