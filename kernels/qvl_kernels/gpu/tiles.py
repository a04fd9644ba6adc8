"""The choice of a product's kernel, by its number of rows and the multiprocessors of the GPU."""

from __future__ import annotations

import itertools

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.weights import DeviceMatrix

COUNTERS = 1 << 16
"""Largest number of tiles of a product that is split along k."""

_FEW_ROWS = 16
"""Up to this number of rows, reading the weights takes most of the time."""

_MAX_SPLIT, _WAVES = 16, 2

_SHARE = 4
"""Smallest number of blocks of 128 columns of a program of a split product, if the product has so many."""

_SPLITS = (1, 2, 3, 4, 5, 6, 8)
"""Parts of the columns to choose from with many rows."""

_BLOCK, _STORE, _SUM = 0.19, 4.95, 0.6
"""Microseconds on an H100 (`Tiles._time`)."""

_SMALL, _ALONE = 0.25, 1.45
"""Programs with tiles up to this part of 128 x 128 share a multiprocessor; one alone takes as long as so many."""


class Tiles:
    """Chooses kernels and grids of products."""

    def __init__(self, launch: Launcher, multiprocessors: int):
        self._launch, self._multiprocessors = launch, multiprocessors
        self._chosen: dict[tuple, tuple[str, int, int]] = {}

    def __call__(self, family: str, w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        """Return kernel, number of tiles, and number of parts of the columns, for a product of `m` rows."""
        key = (family, w.kind, w.rows, w.blocks, m, self._launch.replaced)
        found = self._chosen.get(key)
        if found is None:
            names = [n for n in s.names(self._launch.images.architecture, family) if n.split(".")[1] == w.kind]
            found = self._chosen[key] = self._for_few(names, w, m) if m <= _FEW_ROWS else self._for_many(names, w, m)
        return found

    def _for_few(self, names: list[str], w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        """The smallest tile; several programs share its columns, about `waves` programs a multiprocessor in total."""
        name = next(n for n in names if m <= self._launch.constants(n)["BM"])
        tiles = self._count(name, w, m)
        programs = tiles * (2 if name.startswith("gate_up") else 1)
        wanted = self._launch.tile(name).get("waves", _WAVES) * self._multiprocessors // programs
        split = min(max(wanted, 1), _MAX_SPLIT, max(w.blocks // _SHARE, 1)) if tiles <= COUNTERS else 1
        return name, tiles, _without_empty(split, w.blocks)

    def _for_many(self, names: list[str], w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        """The fastest tile and split, as estimated."""
        many = [n for n in names if "cost" in self._launch.tile(n)]
        splits = sorted({_without_empty(split, w.blocks) for split in _SPLITS})
        choices = [(n, p) for n, p in itertools.product(many, splits) if p == 1 or self._count(n, w, m) <= COUNTERS]
        name, split = min(choices, key=lambda choice: self._time(w, m, *choice))
        return name, self._count(name, w, m), split

    def _count(self, name: str, w: DeviceMatrix, m: int) -> int:
        constants = self._launch.constants(name)
        return -(-m // constants["BM"]) * (w.rows // constants["BN"])

    def _time(self, w: DeviceMatrix, m: int, name: str, split: int) -> float:
        """Estimate a product of many rows for comparison; fitted to measurements on an H100 (bench/README.md).

        The multiprocessor with the most programs needs `cost` for each, and no block takes less than `_BLOCK`. Programs
        of a split product store their sums, and the last one reads those of all.
        """
        constants = self._launch.constants(name)
        size = constants["BM"] * constants["BN"] / 128**2
        programs = -(-self._count(name, w, m) * split // self._multiprocessors)
        together = max(programs, _ALONE if size <= _SMALL else 1)
        products = -(-w.blocks // split) * max(_BLOCK, together * size * self._launch.tile(name)["cost"])
        return products + (size * (_STORE * programs + _SUM * split) if split > 1 else 0.0)


def _without_empty(split: int, blocks: int) -> int:
    """Return the number of parts that have blocks, if `split` parts get equally many and the last ones what is left."""
    return -(-blocks // -(-blocks // split))
