"""Computations in slices, between which the engine may run others."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")


def at_once(work: Generator[Any, Any, T]) -> T:
    """Run all slices of a computation and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
