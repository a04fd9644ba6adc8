"""Numba functions whose cache lies in the cache folder (``QVL_CACHE_DIR``)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

from qvl_kernels import cache_folder
from qvl_kernels.cpu import bundle, features

FOLDER = "numba"
"""Numba runs what it finds there, whoever wrote it; so it is a folder that only this user may enter."""

SOURCES = tuple(Path(__file__).with_name(f"{name}.py") for name in ("gptq_kernels", "gptq_rounding", "gram"))
"""The modules of the functions."""


def jit(**options: Any) -> Callable[[Callable], Callable]:
    """Decorate with a parallel `numba.njit`, cached in the cache folder if there is one.

    Numba reads its setting for the cache folder when a function's cache is made. It is changed for that moment only.
    """

    def decorate(function: Callable) -> Callable:
        made = numba.njit(function, parallel=True, **options)
        if folder := _folder(cache_folder.find().path):
            before = numba.config.CACHE_DIR
            try:
                numba.config.CACHE_DIR = str(folder / _key())
                with contextlib.suppress(RuntimeError):  # its source is no file, such as in a zip
                    made._cache = _Cache(function, folder)
            finally:
                numba.config.CACHE_DIR = before
        return made

    return decorate


class _Cache(FunctionCache):
    """Numba's cache of a function. What cannot be read is compiled again, and what cannot be written is not kept."""

    def __init__(self, function: Callable, folder: Path):
        super().__init__(function)
        self._folder = folder

    def load_overload(self, *args: Any) -> Any:
        try:
            return super().load_overload(*args)
        except Exception:  # pickle raises any for damaged bytes
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, *args: Any) -> None:
        try:
            super().save_overload(*args)
        except OSError as error:
            _warn(self._folder, error.strerror)


@functools.cache
def _key() -> str:
    """Return a hash of what compiled functions depend on beside what Numba compares.

    Numba looks at the file of a function, not at those of the functions that it calls; nor does it know ``QVL_CPU``.
    """
    known = (bundle.source_hash(), features.selected().name, [path.read_bytes() for path in SOURCES if path.is_file()])
    return hashlib.sha256(repr(known).encode()).hexdigest()[:20]


@functools.cache
def _folder(parent: Path | None) -> Path | None:
    """Return Numba's folder in that of the cache; kept, so that a warning comes once and not for each function."""
    return parent and cache_folder.subfolder(FOLDER)


@functools.cache
def _warn(folder: Path, reason: str) -> None:
    """Warn once, not of each function."""
    cache_folder.warn_of(OSError(None, reason), folder, "the compiled functions of the conversion")
