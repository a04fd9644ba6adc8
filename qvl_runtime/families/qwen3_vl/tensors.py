"""The tensors of Qwen3-VL."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.families.qwen2_vl import tensors as qwen2
from qvl_runtime.families.qwen2_vl.config import MERGE
from qvl_runtime.families.qwen2_vl.tensors import VISUAL
from qvl_runtime.families.qwen3_vl.config import Qwen3Config
from qvl_runtime.families.specs import TensorSpec, VectorSpec, layer_norm, linear

POSITIONS = f"{VISUAL}.pos_embed.weight"
LAYERS = ("linear_fc1", "linear_fc2")


def deepstack(index: int) -> str:
    """Return the base name of the merger of the `index`-th deepstack block."""
    return f"{VISUAL}.deepstack_merger_list.{index}"


def deepstack_level(name: str) -> int | None:
    """Return the feature level of a deepstack merger's tensor; None for other tensors."""
    prefix = f"{VISUAL}.deepstack_merger_list."
    return 1 + int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


def tensors(config: Qwen3Config) -> Iterator[TensorSpec]:
    """Yield all tensors of a model, in order of use."""
    v = config.visual
    yield qwen2.patch_embedding(v, bias=True)
    yield VectorSpec(POSITIONS, "vision", (v.num_position_embeddings, v.width))
    for i in range(v.depth):
        block = f"{VISUAL}.blocks.{i}"
        yield from layer_norm(f"{block}.norm1", "vision", v.width)
        yield from qwen2.vision_attention(block, v)
        yield from layer_norm(f"{block}.norm2", "vision", v.width)
        yield linear(f"{block}.mlp.{LAYERS[0]}", "vision", v.mlp_width, v.width, bias=True)
        yield linear(f"{block}.mlp.{LAYERS[1]}", "vision", v.width, v.mlp_width, bias=True)
        if i in v.deepstack_visual_indexes:
            name = deepstack(v.deepstack_visual_indexes.index(i))
            yield from layer_norm(f"{name}.norm", "adapter", v.width * MERGE**2)
            yield from qwen2.merger(name, v, LAYERS)
    yield from layer_norm(f"{VISUAL}.merger.norm", "adapter", v.width)
    yield from qwen2.merger(f"{VISUAL}.merger", v, LAYERS)
    yield from qwen2.decoder(config)
