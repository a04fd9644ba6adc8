"""The choice of a product's kernel, by its number of rows and the multiprocessors of the GPU."""

from __future__ import annotations

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.weights import DeviceMatrix

COUNTERS = 1 << 16
"""Largest number of tiles of a product that is split along k."""

_MAX_SPLIT, _WAVES = 16, 2

_SHARE = 4
"""Smallest number of blocks of 128 columns of a program of a split product, if the product has so many."""


class Tiles:
    """Chooses kernels and grids of products."""

    def __init__(self, launch: Launcher, multiprocessors: int):
        self._launch, self._multiprocessors = launch, multiprocessors
        self._chosen: dict[tuple, tuple[str, int, int]] = {}

    def __call__(self, family: str, w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        """Return kernel, number of tiles, and number of parts of the columns, for a product of `m` rows.

        With few tiles, several programs share the columns of one, about `waves` programs per multiprocessor in total.
        """
        key = (family, w.kind, w.rows, w.blocks, m, self._launch.replaced)
        found = self._chosen.get(key)
        if found is None:
            found = self._chosen[key] = self._choose(family, w, m)
        return found

    def _choose(self, family: str, w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        names = [f"{family}.{w.kind}.{tile}" for tile in s.TILES if f"{w.kind}.{tile}" in s.KERNELS[family].variants]
        name = next((n for n in names if m <= self._launch.constants(n)["BM"]), None)
        if name is None:
            many = [n for n in names if n.endswith((".medium", ".large"))]
            name = min(many, key=lambda n: self._time(n, w, m))
        tiles = self._count(name, w, m)
        programs = tiles * (2 if family == "gate_up" else 1)
        wanted = self._launch.tile(name).get("waves", _WAVES) * self._multiprocessors // programs
        split = min(max(wanted, 1), _MAX_SPLIT, max(w.blocks // _SHARE, 1)) if tiles <= COUNTERS else 1
        return name, tiles, split

    def _count(self, name: str, w: DeviceMatrix, m: int) -> int:
        constants = self._launch.constants(name)
        return -(-m // constants["BM"]) * (w.rows // constants["BN"])

    def _time(self, name: str, w: DeviceMatrix, m: int) -> float:
        """Of a product of many rows, for comparison: the last of large tiles may leave most multiprocessors idle."""
        constants, waves = self._launch.constants(name), -(-self._count(name, w, m) // self._multiprocessors)
        return waves * constants["BM"] * constants["BN"] * self._launch.tile(name).get("cost", 1.0)
