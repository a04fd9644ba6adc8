"""Every tensor of a model, named, shaped, and traced to its published name: one table for reader and writer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from qvl_runtime.families.qwen_vl.config import ModelConfig

PARTS = {"vision": "ViT", "adapter": "adapter", "decoder": "decoder", "embedding": "embedding", "head": "output head"}


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """A weight ``[n, k]`` of a product, quantised when converted.

    Attributes
    ----------
    name : str
        Base name in the blob; `name.weight` or `name.qweight`, `name.scales`, … hold it.
    part : str
        A key of `PARTS`.
    source : str
        Published name of the weight.
    bias : str or None
        Published name of the bias. None when the published model has none.
    first_row : int
        Row of the published tensors at which this matrix starts (a stacked q, k, v projection).
    transposed : bool
        The published tensor is ``[k, n]``.
    """

    name: str
    part: str
    n: int
    k: int
    source: str
    bias: str | None = None
    first_row: int = 0
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class VectorSpec:
    """A tensor kept as it is, in float32: norms, positions, queries. Its name is the published one."""

    name: str
    part: str
    shape: tuple[int, ...]


def tensors(config: ModelConfig) -> Iterator[MatrixSpec | VectorSpec]:
    """All tensors of a model, in the order in which it uses them."""
    if config.visual is not None:
        yield from _vision(config)
        yield from _adapter(config)
    d, f = config.hidden_size, config.ffn_width
    yield MatrixSpec("transformer.wte", "embedding", config.vocab_size, d, "transformer.wte.weight")
    for i in range(config.num_hidden_layers):
        h = f"transformer.h.{i}"
        yield VectorSpec(f"{h}.ln_1.weight", "decoder", (d,))
        attn = 3 * config.attention_width
        yield _linear(f"{h}.attn.c_attn", "decoder", attn, d, bias=True)
        yield _linear(f"{h}.attn.c_proj", "decoder", d, config.attention_width)
        yield VectorSpec(f"{h}.ln_2.weight", "decoder", (d,))
        yield _linear(f"{h}.mlp.w1", "decoder", f, d)
        yield _linear(f"{h}.mlp.w2", "decoder", f, d)
        yield _linear(f"{h}.mlp.c_proj", "decoder", d, f)
    yield VectorSpec("transformer.ln_f.weight", "decoder", (d,))
    yield _linear("lm_head", "head", config.vocab_size, d)


def _linear(name: str, part: str, n: int, k: int, *, bias: bool = False) -> MatrixSpec:
    return MatrixSpec(name, part, n, k, f"{name}.weight", f"{name}.bias" if bias else None)


def _layer_norm(name: str, part: str, width: int) -> Iterator[VectorSpec]:
    yield VectorSpec(f"{name}.weight", part, (width,))
    yield VectorSpec(f"{name}.bias", part, (width,))


def _vision(config: ModelConfig) -> Iterator[MatrixSpec | VectorSpec]:
    v, name = config.visual, "transformer.visual"
    yield _linear(f"{name}.conv1", "vision", v.width, v.patch_dim)
    yield VectorSpec(f"{name}.positional_embedding", "vision", (256, v.width))
    yield from _layer_norm(f"{name}.ln_pre", "vision", v.width)
    for i in range(v.layers):
        block = f"{name}.transformer.resblocks.{i}"
        yield from _layer_norm(f"{block}.ln_1", "vision", v.width)
        yield _linear(f"{block}.attn.in_proj", "vision", 3 * v.width, v.width, bias=True)
        yield _linear(f"{block}.attn.out_proj", "vision", v.width, v.width, bias=True)
        yield from _layer_norm(f"{block}.ln_2", "vision", v.width)
        yield _linear(f"{block}.mlp.c_fc", "vision", v.mlp_width, v.width, bias=True)
        yield _linear(f"{block}.mlp.c_proj", "vision", v.width, v.mlp_width, bias=True)


def _adapter(config: ModelConfig) -> Iterator[MatrixSpec | VectorSpec]:
    v, name = config.visual, "transformer.visual.attn_pool"
    d = v.output_dim
    if v.width != d:
        yield _linear(f"{name}.kv_proj", "adapter", d, v.width)
    yield from _layer_norm(f"{name}.ln_kv", "adapter", d)
    yield from _layer_norm(f"{name}.ln_q", "adapter", d)
    yield VectorSpec(f"{name}.query", "adapter", (v.n_queries, d))
    yield VectorSpec(f"{name}.pos_embed", "adapter", (v.n_queries, d))
    for i, projection in enumerate("qkv"):
        in_proj = f"{name}.attn.in_proj"
        yield MatrixSpec(
            f"{name}.attn.{projection}_proj", "adapter", d, d, f"{in_proj}_weight", f"{in_proj}_bias", first_row=i * d
        )
    yield _linear(f"{name}.attn.out_proj", "adapter", d, d, bias=True)
    yield from _layer_norm("transformer.visual.ln_post", "adapter", d)
    yield MatrixSpec("transformer.visual.proj", "adapter", d, d, "transformer.visual.proj", transposed=True)
