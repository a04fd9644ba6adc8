"""Preprocessed pictures that wait for the vision tower, within a limit of memory.

A picture of 1,280 tokens takes 24 to 31 MB in this form, many times its file.
"""

from __future__ import annotations

import weakref

import numpy as np

from qvl_kernels.locks import make_lock

HELD_BYTES = 256 << 20
"""Most bytes that the pictures of a model take together; the oldest ones are prepared again when it is their turn."""


class Prepared:
    """A preprocessed picture.

    Attributes
    ----------
    values : numpy.ndarray or None
        The pixels; None after `take`, or if later pictures needed the room.
    """

    __slots__ = ("__weakref__", "values")

    def __init__(self, values: np.ndarray):
        self.values: np.ndarray | None = values

    def take(self) -> np.ndarray | None:
        """Return the pixels, and hold them no longer."""
        values, self.values = self.values, None
        return values


class PreparedPictures:
    """Limits what `Prepared` objects hold. Thread-safe.

    Parameters
    ----------
    limit : int
        Bytes of all; the newest picture is always held.
    """

    def __init__(self, limit: int = HELD_BYTES):
        self._limit, self._lock = limit, make_lock()
        self._held: list[weakref.ref[Prepared]] = []  # oldest first; a picture that nobody needs any more is freed

    def hold(self, values: np.ndarray) -> Prepared:
        """Hold the pixels of a picture."""
        made = Prepared(values)
        with self._lock:
            living = [found for held in self._held if (found := held()) is not None and found.values is not None]
            total = values.nbytes
            kept = [made]
            for prepared in reversed(living):
                held = prepared.values
                if held is None:  # taken just now
                    continue
                total += held.nbytes
                if total > self._limit:
                    prepared.take()
                else:
                    kept.append(prepared)
            self._held = [weakref.ref(prepared) for prepared in reversed(kept)]
        return made
