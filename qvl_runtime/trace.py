"""Looking at what a model computes while it runs; for parity checks."""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.ops import Array

Trace = Callable[[str, Array], None]
"""Called with the name of a stage and its values."""


def no_trace(stage: str, values: Array) -> None:
    """The `Trace` that looks at nothing."""
