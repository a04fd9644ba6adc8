"""Fetching a blob's tensors onto a device, and looking at what a model computes with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qvl_kernels.ops import Array, Norm, Ops, Weight
from qvl_runtime.file.blob import Blob

Trace = Callable[[str, Array], None]
"""Called with the name of a stage and its values while a model runs; for parity checks."""


def no_trace(stage: str, values: Array) -> None:
    """The `Trace` that looks at nothing."""


class Weights:
    """The tensors of one blob, prepared for one backend."""

    def __init__(self, blob: Blob, ops: Ops):
        self.blob, self.ops = blob, ops

    def matrix(self, name: str) -> Weight:
        """A product's weight."""
        return self.ops.weight(self.blob.matrix(name))

    def vector(self, name: str) -> np.ndarray:
        """A float32 tensor, on the host."""
        return self.blob.vector(name)

    def rms_norm(self, name: str) -> Norm:
        """An RMSNorm of the decoder."""
        eps = self.blob.config.layer_norm_epsilon
        return Norm(self.ops.upload(self.vector(f"{name}.weight")), None, eps)

    def layer_norm(self, name: str) -> Norm:
        """A LayerNorm of the ViT or the adapter; its epsilon is fixed at 1e-6 in the published model."""
        weight, bias = (self.ops.upload(self.vector(f"{name}.{kind}")) for kind in ("weight", "bias"))
        return Norm(weight, bias, 1e-6)
