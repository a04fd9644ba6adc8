"""The ViT: pixels in, one vector a patch out."""

from __future__ import annotations

import dataclasses

import numpy as np

from qvl_kernels.ops import Array, Norm, Weight
from qvl_runtime.images import patches
from qvl_runtime.positions import interpolate_grid
from qvl_runtime.weights import Trace, Weights, no_trace

NAME = "transformer.visual"


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A pre-norm transformer block."""

    ln_1: Norm
    in_proj: Weight
    out_proj: Weight
    ln_2: Norm
    c_fc: Weight
    c_proj: Weight


class VisionTower:
    """Patch embedding, position, and the transformer blocks, without a final norm."""

    def __init__(self, weights: Weights):
        self.ops, self.config = weights.ops, weights.blob.config.visual
        self.conv1 = weights.matrix(f"{NAME}.conv1")
        positions = weights.vector(f"{NAME}.positional_embedding")
        self.positions = self.ops.upload(interpolate_grid(positions, self.config.grid))
        self.ln_pre = weights.layer_norm(f"{NAME}.ln_pre")
        self.blocks = [_block(weights, f"{NAME}.transformer.resblocks.{i}") for i in range(self.config.layers)]

    def __call__(self, pixels: np.ndarray, trace: Trace = no_trace) -> Array:
        """Encode one picture.

        Parameters
        ----------
        pixels : ndarray
            Normalised, float32 ``[3, image_size, image_size]``.

        Returns
        -------
        Array
            float32 ``[patches, width]``.
        """
        ops, config = self.ops, self.config
        count, width = config.patches, config.width
        raw, x = ops.empty((count, width)), ops.empty((count, width))
        qkv = ops.empty((count, 3 * width), ops.activation_dtype)
        attended = ops.empty((count, width), ops.activation_dtype)
        hidden = ops.empty((count, config.mlp_width), ops.activation_dtype)
        ops.linear(ops.upload(patches(pixels, config.patch_size)), self.conv1, raw, residual=self.positions)
        trace("patch_pos", raw)
        ops.normalize(raw, self.ln_pre, x)
        trace("ln_pre", x)
        for i, block in enumerate(self.blocks):
            ops.linear(x, block.in_proj, qkv, norm=block.ln_1)
            ops.vision_attention(qkv, config.heads, attended)
            ops.linear(attended, block.out_proj, x, residual=x)
            ops.linear(x, block.c_fc, hidden, norm=block.ln_2, gelu=True)
            ops.linear(hidden, block.c_proj, x, residual=x)
            trace(f"block{i}", x)
        return x


def _block(weights: Weights, name: str) -> Block:
    return Block(
        ln_1=weights.layer_norm(f"{name}.ln_1"),
        in_proj=weights.matrix(f"{name}.attn.in_proj"),
        out_proj=weights.matrix(f"{name}.attn.out_proj"),
        ln_2=weights.layer_norm(f"{name}.ln_2"),
        c_fc=weights.matrix(f"{name}.mlp.c_fc"),
        c_proj=weights.matrix(f"{name}.mlp.c_proj"),
    )
