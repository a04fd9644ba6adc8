"""The tensors of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.families.qwen2_5_vl.config import Qwen25Config
from qvl_runtime.families.qwen2_vl import tensors as qwen2
from qvl_runtime.families.qwen2_vl.tensors import VISUAL
from qvl_runtime.families.specs import TensorSpec, linear


def tensors(config: Qwen25Config) -> Iterator[TensorSpec]:
    """Yield all tensors of a model, in order of use."""
    v = config.visual
    yield qwen2.patch_embedding(v, bias=False)
    for i in range(v.depth):
        block = f"{VISUAL}.blocks.{i}"
        yield qwen2.rms_norm(f"{block}.norm1", "vision", v.width)
        yield from qwen2.vision_attention(block, v)
        yield qwen2.rms_norm(f"{block}.norm2", "vision", v.width)
        yield linear(f"{block}.mlp.gate_proj", "vision", v.mlp_width, v.width, bias=True)
        yield linear(f"{block}.mlp.up_proj", "vision", v.mlp_width, v.width, bias=True)
        yield linear(f"{block}.mlp.down_proj", "vision", v.width, v.mlp_width, bias=True)
    yield qwen2.rms_norm(f"{VISUAL}.merger.ln_q", "adapter", v.width)
    yield from qwen2.merger(f"{VISUAL}.merger", v, ("mlp.0", "mlp.2"))
    yield from qwen2.decoder(config)
