"""Computations that pause, so that others get their turn."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")


def at_once(work: Generator[Any, Any, T]) -> T:
    """Run a computation through all its pauses; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
