"""Access to intermediate values of a model, for parity checks."""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.ops import Array

Trace = Callable[[str, Array], None]
"""Callback with the name of a stage and its values."""


def no_trace(stage: str, values: Array) -> None:
    """Do nothing: the default `Trace`."""
