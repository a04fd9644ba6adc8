"""Functions compiled by Numba, whose own cache lies in the folder that ``QVL_CACHE_DIR`` rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from qvl_kernels import cache_folder


def jit(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit` for several threads, cached where compiled kernels may be kept and not cached elsewhere.

    Numba reads its cache's folder when a function is decorated. It is set for that moment only: the rest of the
    program keeps its own setting.
    """

    def decorate(function: Callable) -> Callable:
        folder, before = cache_folder.find().path, numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = str(folder / "numba") if folder else before
            return numba.njit(function, parallel=True, cache=folder is not None, **options)
        finally:
            numba.config.CACHE_DIR = before

    return decorate
