"""The ViT: pixels to one vector per patch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator

import numpy as np

from qvl_kernels.ops import Array, Norm, Ops, Weight
from qvl_runtime.families.qwen_vl.adapter import Adapter
from qvl_runtime.families.qwen_vl.config import ModelConfig, VisionConfig
from qvl_runtime.families.qwen_vl.positions import interpolate_grid
from qvl_runtime.families.qwen_vl.preprocessing import patches
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.pictures import SLICE_LAYERS, ArrayClaims, Pixels
from qvl_runtime.slices import at_once
from qvl_runtime.trace import Trace, no_trace

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

    @classmethod
    def load(cls, weights: Weights[ModelConfig], index: int) -> Block:
        """Load the `index`-th block of a model."""
        name = f"{NAME}.transformer.resblocks.{index}"
        return cls(
            ln_1=weights.layer_norm(f"{name}.ln_1"),
            in_proj=weights.matrix(f"{name}.attn.in_proj"),
            out_proj=weights.matrix(f"{name}.attn.out_proj"),
            ln_2=weights.layer_norm(f"{name}.ln_2"),
            c_fc=weights.matrix(f"{name}.mlp.c_fc"),
            c_proj=weights.matrix(f"{name}.mlp.c_proj"),
        )

    def __call__(self, ops: Ops, work: Workspace, heads: int) -> None:
        """Run on ``work.x`` in place."""
        ops.linear(work.x, self.in_proj, out=work.qkv, norm=self.ln_1)
        ops.vision_attention(work.qkv, heads, out=work.attended)
        ops.linear(work.attended, self.out_proj, out=work.x, residual=work.x)
        ops.linear(work.x, self.c_fc, out=work.hidden, norm=self.ln_2, activation="gelu")
        ops.linear(work.hidden, self.c_proj, out=work.x, residual=work.x)


@dataclasses.dataclass(frozen=True, eq=False)
class Workspace:
    """Arrays for one picture."""

    x: Array
    qkv: Array
    attended: Array
    hidden: Array

    @classmethod
    def empty(cls, ops: Ops, config: VisionConfig) -> Workspace:
        """Allocate uninitialized arrays."""
        count, width = config.patches, config.width
        return cls(
            x=ops.empty((count, width)),
            qkv=ops.empty((count, 3 * width), ops.activation_dtype),
            attended=ops.empty((count, width), ops.activation_dtype),
            hidden=ops.empty((count, config.mlp_width), ops.activation_dtype),
        )


class PatchEmbedding:
    """The input of the blocks: patches, positions, and a norm."""

    def __init__(self, weights: Weights[ModelConfig]):
        self.ops, self.config = weights.ops, weights.config.vision
        self.conv1 = weights.matrix(f"{NAME}.conv1")
        positions = weights.vector(f"{NAME}.positional_embedding")
        self.positions = self.ops.upload(interpolate_grid(positions, self.config.grid))
        self.ln_pre = weights.layer_norm(f"{NAME}.ln_pre")

    def __call__(self, pixels: np.ndarray, out: Array, trace: Trace = no_trace) -> None:
        """Embed a picture, normalized float32 ``[3, image_size, image_size]``, into `out` ``[patches, width]``."""
        raw = self.ops.empty(out.shape)
        patch_rows = self.ops.upload(patches(pixels, self.config.patch_size))
        self.ops.linear(patch_rows, self.conv1, out=raw, residual=self.positions)
        trace("patch_pos", raw)
        self.ops.normalize(raw, self.ln_pre, out=out)
        trace("ln_pre", out)


class VisionTower:
    """Patch embedding, positions, and transformer blocks, without a final norm.

    The blocks are captured with the first picture and replayed for all others, in permanent arrays.
    """

    def __init__(self, weights: Weights[ModelConfig]):
        self.ops, self.config = weights.ops, weights.config.vision
        self.embed, self._claims = PatchEmbedding(weights), ArrayClaims()
        self.blocks = [Block.load(weights, i) for i in range(self.config.layers)]

    def __call__(self, pixels: np.ndarray, trace: Trace = no_trace) -> Array:
        """Encode one picture.

        Parameters
        ----------
        pixels : ndarray
            Normalized, float32 ``[3, image_size, image_size]``.

        Returns
        -------
        Array
            float32 ``[patches, width]``, valid until the next picture.
        """
        if trace is no_trace:
            return at_once(self.slices(pixels))
        self._claims.claim()
        self.embed(pixels, self._work.x, trace)
        self._run(0, len(self.blocks), trace)
        return self._work.x

    def slices(self, pixels: np.ndarray) -> Generator[None, None, Array]:
        """Encode in slices of a few layers. Restarts if another picture used the arrays in between."""
        while True:
            is_latest = self._claims.claim()
            self.embed(pixels, self._work.x)
            for replay in self._replays:
                if not is_latest():
                    break
                replay()
                yield
            if is_latest():
                return self._work.x

    @functools.cached_property
    def _work(self) -> Workspace:
        return Workspace.empty(self.ops, self.config)

    @functools.cached_property
    def _replays(self) -> list[Callable[[], None]]:
        firsts = range(0, len(self.blocks), SLICE_LAYERS)
        return [self.ops.capture(functools.partial(self._run, i, i + SLICE_LAYERS)) for i in firsts]

    def _run(self, first: int, last: int, trace: Trace = no_trace) -> None:
        for i, block in enumerate(self.blocks[first:last], first):
            block(self.ops, self._work, self.config.heads)
            trace(f"block{i}", self._work.x)


class Vision:
    """ViT and adapter: `qvl_runtime.inputs.pictures.Vision`."""

    def __init__(self, weights: Weights[ModelConfig]):
        self.ops = weights.ops
        self.tower, self.adapter = VisionTower(weights), Adapter(weights)

    def encode(self, pixels: np.ndarray, grid: tuple[int, int], trace: Trace = no_trace) -> Array:
        """Compute features float32 ``[n_queries, output_dim]`` of pixels float32 ``[3, image_size, image_size]``."""
        return self.adapter(self.tower(pixels, trace), trace)

    def encode_slowly(self, pixels: np.ndarray, grid: tuple[int, int]) -> Generator[None, None, Array]:
        """See `qvl_runtime.inputs.pictures.Vision`."""
        return self.adapter((yield from self.tower.slices(pixels)))


def vision_stage(kind: str, index: int, weights: Weights[ModelConfig]) -> Callable[[np.ndarray, Pixels], Array]:
    """See `qvl_runtime.families.base.Family.vision_stage`."""
    ops, config = weights.ops, weights.config.vision
    if kind == "patches":
        embed = PatchEmbedding(weights)

        def patch(_: np.ndarray, pixels: Pixels) -> Array:
            out = ops.empty((config.patches, config.width))
            embed(pixels.values, out)
            return out

        return patch
    if kind == "adapter":
        adapter = Adapter(weights)
        return lambda state, _: adapter(ops.upload(state))
    block, work = Block.load(weights, index), Workspace.empty(ops, config)

    def layer(state: np.ndarray, _: Pixels) -> Array:
        ops.write(work.x, state)
        block(ops, work, config.heads)
        return work.x

    return layer
