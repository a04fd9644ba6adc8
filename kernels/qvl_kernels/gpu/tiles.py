"""The choice of a product's kernel and grid: how many rows its tiles have, and how many programs share the columns.

With few rows the weights are read once whatever is chosen, so the smallest tile is taken, and columns are split until
the multiprocessors are busy. With many rows every choice has its price, and the one with the shortest estimated time is
taken. The tiles and their costs are in tiles.json.

A row gets the same bits whatever the other rows are: the number of parts of the columns depends on the weight alone.
"""

from __future__ import annotations

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.weights import DeviceMatrix

COUNTERS = 1 << 16
"""Largest number of tiles of a product that is split along k."""

_MAX_SPLIT = 16
"""Most parts of the columns with few rows."""

_SHARE = 4
"""Fewest blocks of 128 columns in a part with few rows, unless the product has fewer."""

_SMALL = 0.25
"""Tiles of up to this share of 128 x 128 are computed beside others on the same multiprocessor."""

_ALONE = 1.45
"""A program with such a tile that has its multiprocessor alone takes as long as this many side by side."""


class Tiles:
    """Chooses kernels and grids of products.

    Parameters
    ----------
    launch : Launcher
    multiprocessors : int
        Of the GPU.
    """

    def __init__(self, launch: Launcher, multiprocessors: int):
        self._launch, self._multiprocessors = launch, multiprocessors
        self._chosen: dict[tuple, tuple[str, int, int]] = {}

    def __call__(self, family: str, w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        """Choose the kernel and grid of a product.

        Parameters
        ----------
        family : str
            "linear", or for at most `signatures.FEW_ROWS` rows "gate_up".
        w : DeviceMatrix
            The weight; the first of two.
        m : int
            Number of rows of the activations.

        Returns
        -------
        kernel : str
            ``family.variant``.
        tiles : int
            Number of tiles of the result.
        split : int
            Number of parts of the columns. None is empty: the kernels rely on it.
        """
        key = (family, w.kind, w.rows, w.blocks, m, self._launch.replaced)
        found = self._chosen.get(key)
        if found is None:
            names = [n for n in s.names(self._launch.images.architecture, family) if n.split(".")[1] == w.kind]
            choose = self._for_few if m <= s.FEW_ROWS else self._for_many
            found = self._chosen[key] = choose(names, w, m)
        return found

    def _for_few(self, names: list[str], w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        """The smallest tile; of a lone row, about `waves` programs a multiprocessor share the columns of its tiles."""
        first = names[0]
        tiles = self._count(first, w, 1)
        programs = tiles * (2 if first.startswith("gate_up") else 1)
        wanted = self._launch.tile(first)["waves"] * self._multiprocessors // programs
        split = min(max(wanted, 1), _MAX_SPLIT, max(w.blocks // _SHARE, 1)) if tiles <= COUNTERS else 1
        name = next(n for n in names if m <= self._launch.constants(n)["BM"])
        return name, self._count(name, w, m), _without_empty(split, w.blocks)

    def _for_many(self, names: list[str], w: DeviceMatrix, m: int) -> tuple[str, int, int]:
        """The fastest tile, as estimated."""
        name = min((n for n in names if "cost" in self._launch.tile(n)), key=lambda n: self._microseconds(w, m, n))
        return name, self._count(name, w, m), 1

    def _count(self, name: str, w: DeviceMatrix, m: int) -> int:
        """Return the number of tiles."""
        constants = self._launch.constants(name)
        return -(-m // constants["BM"]) * (w.rows // constants["BN"])

    def _microseconds(self, w: DeviceMatrix, m: int, name: str) -> float:
        """Estimate the time of a product of many rows, to compare choices; fitted on an H100 (bench/README.md).

        It is that of the multiprocessor with the most programs: each block takes `cost` for every 128 x 128 of a tile.
        """
        constants = self._launch.constants(name)
        size = constants["BM"] * constants["BN"] / 128**2
        programs = -(-self._count(name, w, m) // self._multiprocessors)
        together = max(programs, _ALONE if size <= _SMALL else 1)
        return w.blocks * together * size * self._launch.tile(name)["cost"]


def _without_empty(split: int, blocks: int) -> int:
    """Return the number of parts that have blocks, if `split` parts get equally many and the last ones what is left."""
    return -(-blocks // -(-blocks // split))
