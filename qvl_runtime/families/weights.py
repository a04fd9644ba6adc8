"""Loading a model's tensors to a device."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar, cast

import numpy as np

from qvl_kernels.ops import Norm, Ops, Weight
from qvl_kernels.packing import Matrix
from qvl_runtime.families.config import Config


class Tensors(Protocol):
    """A source of tensors: a `Blob`, or a checkpoint during conversion."""

    @property
    def config(self) -> Config: ...

    def matrix(self, name: str) -> Matrix:
        """Return a weight by its base name."""

    def vector(self, name: str) -> np.ndarray:
        """Return a float32 tensor."""


C = TypeVar("C", bound=Config, covariant=True)


class Weights(Generic[C]):
    """The tensors of a model, prepared for a backend, with the model's config of type `C`.

    Parameters
    ----------
    tensors : Tensors
    ops : Ops
    """

    def __init__(self, tensors: Tensors, ops: Ops):
        self.tensors, self.ops = tensors, ops

    @property
    def config(self) -> C:
        return cast(C, self.tensors.config)

    def matrix(self, name: str) -> Weight:
        """Return the weight of a matrix product."""
        return self.ops.weight(self.tensors.matrix(name))

    def vector(self, name: str) -> np.ndarray:
        """Return a float32 tensor on the host."""
        return self.tensors.vector(name)

    def rms_norm(self, name: str, eps: float | None = None) -> Norm:
        """Return an RMSNorm; the epsilon is by default that of the decoder."""
        weight = self.ops.upload(self.vector(f"{name}.weight"))
        return Norm(weight, None, self.config.norm_eps if eps is None else eps)

    def layer_norm(self, name: str, eps: float = 1e-6) -> Norm:
        """Return a LayerNorm."""
        weight, bias = (self.ops.upload(self.vector(f"{name}.{kind}")) for kind in ("weight", "bias"))
        return Norm(weight, bias, eps)
