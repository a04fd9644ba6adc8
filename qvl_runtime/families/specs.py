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
    sources : dict of str to int
        Published names of the weights that are stacked, with the rows of each.
    bias : bool
        Whether each source has a bias, whose name ends in "bias" where the weight's ends in "weight".
    first_row : int
        Row of the published tensor at which this matrix starts (a stacked q, k, v projection).
    transposed : bool
        The published tensor is ``[k, n]``.
    columns : tuple of int
        Shape of the published tensor behind its rows, if that is not ``(k,)``: a convolution.
    heads : int
        Rows are published as ``[3, heads, d]`` and stored as ``[heads, 3, d]``. 0 keeps their order.
    """

    name: str
    part: str
    n: int
    k: int
    sources: dict[str, int]
    bias: bool = False
    first_row: int = 0
    transposed: bool = False
    columns: tuple[int, ...] = ()
    heads: int = 0

    @property
    def source(self) -> str:
        """The published weight, or the first of several."""
        return next(iter(self.sources))

    @property
    def biases(self) -> list[str]:
        """Published names of the biases."""
        return [bias_name(source) for source in self.sources] if self.bias else []


@dataclasses.dataclass(frozen=True)
class VectorSpec:
    """A tensor kept in float32: a norm, positions, queries. Its name is the published one."""

    name: str
    part: str
    shape: tuple[int, ...]


TensorSpec = MatrixSpec | VectorSpec


def bias_name(weight: str) -> str:
    """The published name of the bias that belongs to a weight."""
    return weight.removesuffix("weight") + "bias"


def linear(name: str, part: str, n: int, k: int, *, bias: bool = False, heads: int = 0) -> MatrixSpec:
    """A published linear layer that keeps its name."""
    return MatrixSpec(name, part, n, k, {f"{name}.weight": n}, bias, heads=heads)
