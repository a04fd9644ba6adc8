"""Assembles the matrices of a model from the tensors of its published checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from qvl_runtime.families.specs import MatrixSpec, TensorSpec, VectorSpec


class Tensors(Protocol):
    """A source of published tensors: a `Checkpoint`."""

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor, read-only."""

    def vector(self, name: str) -> np.ndarray:
        """Return a tensor as float32."""


def published_shapes(specs: Iterable[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a model's unquantized checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        if isinstance(spec, VectorSpec):
            shapes[spec.name] = spec.shape
            continue
        for source, count in spec.sources.items():
            rows = spec.first_row + count
            if spec.transposed:
                shapes[source] = (spec.k, rows)
            else:
                shapes[source] = (rows, *(spec.columns or (spec.k,)))
        shapes |= {name: (spec.first_row + count,) for name, count in zip(spec.biases, spec.sources.values())}
    return shapes


def matrix(tensors: Tensors, spec: MatrixSpec) -> np.ndarray:
    """Return the weight of a matrix, ``[n, k]``, in the published dtype; float32 if its parts have different ones.

    It is only copied if the published layout differs; else it stays memory-mapped.
    """
    parts = [_source(tensors.tensor(source), spec, count) for source, count in spec.sources.items()]
    if len({part.dtype for part in parts}) > 1:  # numpy knows no common dtype of bfloat16 and float16
        parts = [part.astype(np.float32) for part in parts]
    weight = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return weight if not spec.heads else weight[rows_by_head(spec)]


def bias(tensors: Tensors, spec: MatrixSpec) -> np.ndarray | None:
    """Return the bias of a matrix, float32 ``[n]``, or None."""
    if not spec.bias:
        return None
    counts = spec.sources.values()
    parts = [tensors.vector(name)[spec.first_row :][:count] for name, count in zip(spec.biases, counts)]
    values = np.concatenate(parts)
    return values if not spec.heads else values[rows_by_head(spec)]


def _source(weight: np.ndarray, spec: MatrixSpec, count: int) -> np.ndarray:
    """Return one source of a matrix, ``[count, k]``."""
    if spec.transposed:
        weight = np.ascontiguousarray(weight.T)
    return weight.reshape(len(weight), -1)[spec.first_row : spec.first_row + count]


def rows_by_head(spec: MatrixSpec) -> np.ndarray:
    """Return the indices of published rows ``[3, heads, d]`` in the order ``[heads, 3, d]``."""
    return np.arange(spec.n).reshape(3, spec.heads, -1).swapaxes(0, 1).ravel()
