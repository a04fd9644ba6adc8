"""Descriptions of a family's tensors, shared by the converter, which writes them, and the runtime, which reads them."""

from __future__ import annotations

import dataclasses

PARTS = {"vision": "ViT", "adapter": "adapter", "decoder": "decoder", "embedding": "embedding", "head": "output head"}
"""Parts of a model, and their names in `qvl info`."""


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """The weight ``[n, k]`` of a matrix product, quantized by the converter.

    Attributes
    ----------
    name : str
        Base name in the blob, of `name.weight` or `name.qweight`, `name.scales`, …
    part : str
        A key of `PARTS`.
    sources : dict of str to int
        Published names of the stacked weights, with the rows of each.
    bias : bool
        Whether each source has a bias, whose name ends in "bias" where the weight's ends in "weight".
    first_row : int
        First row of this matrix in the published tensor (a stacked q, k, v projection).
    transposed : bool
        Whether the published tensor is ``[k, n]``.
    columns : tuple of int
        Shape of a row of the published tensor, if not ``(k,)``: a convolution.
    heads : int
        If set, rows are published as ``[3, heads, d]`` and stored as ``[heads, 3, d]``. 0 preserves the order.
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
        """The published weight, or the first of several stacked ones."""
        return next(iter(self.sources))

    @property
    def biases(self) -> list[str]:
        """Published names of the biases."""
        return [bias_name(source) for source in self.sources] if self.bias else []


@dataclasses.dataclass(frozen=True)
class VectorSpec:
    """A float32 tensor: a norm, positions, queries. Its name is the published one."""

    name: str
    part: str
    shape: tuple[int, ...]


TensorSpec = MatrixSpec | VectorSpec


def bias_name(weight: str) -> str:
    """Return the published name of a weight's bias."""
    return weight.removesuffix("weight") + "bias"


def linear(name: str, part: str, n: int, k: int, *, bias: bool = False, heads: int = 0) -> MatrixSpec:
    """Return the spec of a linear layer with its published name."""
    return MatrixSpec(name, part, n, k, {f"{name}.weight": n}, bias, heads=heads)


def layer_norm(name: str, part: str, width: int) -> tuple[VectorSpec, VectorSpec]:
    """Return the specs of a norm with a weight and a bias."""
    return VectorSpec(f"{name}.weight", part, (width,)), VectorSpec(f"{name}.bias", part, (width,))
