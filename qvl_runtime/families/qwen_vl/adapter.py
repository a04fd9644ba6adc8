"""The adapter: cross-attention of learned queries over the patches yields the picture's features."""

from __future__ import annotations

import numpy as np

from qvl_kernels.ops import Array
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.positions import interpolate_grid
from qvl_runtime.families.weights import Weights
from qvl_runtime.trace import Trace, no_trace

NAME = "transformer.visual.attn_pool"


class Adapter:
    """One layer of cross-attention, a norm, and a projection."""

    def __init__(self, weights: Weights[ModelConfig]):
        ops, config = weights.ops, weights.config.vision
        self.ops, self.config = ops, config
        self.kv_proj = weights.matrix(f"{NAME}.kv_proj") if config.width != config.output_dim else None
        self.ln_kv = weights.layer_norm(f"{NAME}.ln_kv")
        self.k_proj, self.v_proj, self.out_proj = (
            weights.matrix(f"{NAME}.attn.{name}") for name in ("k_proj", "v_proj", "out_proj")
        )
        self.ln_post = weights.layer_norm("transformer.visual.ln_post")
        self.proj = weights.matrix("transformer.visual.proj")
        positions = weights.vector(f"{NAME}.pos_embed")
        self.positions = self._activations(interpolate_grid(positions, config.grid))
        self.queries = self._queries(weights, self._activations(positions))

    def _activations(self, values: np.ndarray) -> Array:
        array = self.ops.empty(values.shape, self.ops.activation_dtype)
        self.ops.write(array, values.astype(self.ops.activation_dtype))
        return array

    def _queries(self, weights: Weights[ModelConfig], positions: Array) -> Array:
        """Compute ``ln_q(query) + pos_embed``, projected: the same for every picture."""
        ops, shape = self.ops, (self.config.n_queries, self.config.output_dim)
        query, projected = (ops.empty(shape, ops.activation_dtype) for _ in range(2))
        ops.normalize(ops.upload(weights.vector(f"{NAME}.query")), weights.layer_norm(f"{NAME}.ln_q"), out=query)
        ops.add(query, positions, out=query)
        ops.linear(query, weights.matrix(f"{NAME}.attn.q_proj"), out=projected)
        return projected

    def __call__(self, x: Array, trace: Trace = no_trace) -> Array:
        """Map patches, float32 ``[patches, width]``, to features, float32 ``[n_queries, output_dim]``."""
        ops, config = self.ops, self.config
        patch_shape, query_shape = (config.patches, config.output_dim), (config.n_queries, config.output_dim)
        if self.kv_proj is not None:
            projected = ops.empty(patch_shape)
            ops.linear(x, self.kv_proj, out=projected)
            x = projected
        values, keys, k, v = (ops.empty(patch_shape, ops.activation_dtype) for _ in range(4))
        ops.normalize(x, self.ln_kv, out=values)
        ops.add(values, self.positions, out=keys)
        ops.linear(keys, self.k_proj, out=k)
        ops.linear(values, self.v_proj, out=v)
        attended, normed = (ops.empty(query_shape, ops.activation_dtype) for _ in range(2))
        ops.cross_attention(self.queries, k, v, config.adapter_heads, out=attended)
        resampled, features = ops.empty(query_shape), ops.empty(query_shape)
        ops.linear(attended, self.out_proj, out=resampled)
        trace("resampler", resampled)
        ops.normalize(resampled, self.ln_post, out=normed)
        trace("ln_post", normed)
        ops.linear(normed, self.proj, out=features)
        trace("final", features)
        return features
