"""How a family names its tensors: one table for the converter, which writes them, and the runtime, which reads them."""

from __future__ import annotations

import dataclasses

PARTS = {"vision": "ViT", "adapter": "adapter", "decoder": "decoder", "embedding": "embedding", "head": "output head"}
"""Parts of a model, and what `qvl info` calls them."""


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """The weight ``[n, k]`` of a product, quantized by the converter.

    Attributes
    ----------
    name : str
        Base name in the blob; `name.weight` or `name.qweight`, `name.scales`, … hold it.
    part : str
        A key of `PARTS`.
    source : str
        Published name of the weight.
    bias : str or None
        Published name of the bias; None if the published model has none.
    first_row : int
        Row of the published tensors at which this matrix starts (a stacked q, k, v projection).
    transposed : bool
        The published tensor is ``[k, n]``.
    columns : tuple of int
        Shape of the published tensor behind its rows, if that is not ``(k,)``: a convolution.
    """

    name: str
    part: str
    n: int
    k: int
    source: str
    bias: str | None = None
    first_row: int = 0
    transposed: bool = False
    columns: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class VectorSpec:
    """A tensor kept in float32: a norm, positions, queries. Its name is the published one."""

    name: str
    part: str
    shape: tuple[int, ...]


TensorSpec = MatrixSpec | VectorSpec


def linear(name: str, part: str, n: int, k: int, *, bias: bool = False) -> MatrixSpec:
    """A published linear layer that keeps its name."""
    return MatrixSpec(name, part, n, k, f"{name}.weight", f"{name}.bias" if bias else None)
