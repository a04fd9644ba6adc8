"""Numba functions whose cache lies in the cache folder (``QVL_CACHE_DIR``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from qvl_kernels import cache_folder


def jit(**options: Any) -> Callable[[Callable], Callable]:
    """Decorate with a parallel `numba.njit`, cached in the cache folder if there is one.

    Numba reads its setting for the cache folder when a function is decorated. It is changed for that moment only.
    """

    def decorate(function: Callable) -> Callable:
        folder, before = cache_folder.find().path, numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = str(folder / "numba") if folder else before
            return numba.njit(function, parallel=True, cache=folder is not None, **options)
        finally:
            numba.config.CACHE_DIR = before

    return decorate
