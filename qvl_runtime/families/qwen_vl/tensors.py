"""The tensors of Qwen-VL and Qwen-7B: names, shapes and published names."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.families.layers import DecoderNames
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.specs import MatrixSpec, TensorSpec, VectorSpec, layer_norm, linear

DECODER = DecoderNames(
    embedding="transformer.wte",
    layer="transformer.h",
    attention_norm="ln_1",
    qkv="attn.c_attn",
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    # the published feed-forward is c_proj(w1(x) * silu(w2(x)))
    gate="mlp.w2",
    up="mlp.w1",
    down="mlp.c_proj",
    norm="transformer.ln_f",
    head="lm_head",
)


def tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield all tensors of a model, in order of use."""
    if config.visual is not None:
        yield from _vision(config)
        yield from _adapter(config)
    d, f = config.hidden_size, config.ffn_width
    yield linear("transformer.wte", "embedding", config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        h = f"transformer.h.{i}"
        yield VectorSpec(f"{h}.ln_1.weight", "decoder", (d,))
        attn = 3 * config.attention_width
        yield linear(f"{h}.attn.c_attn", "decoder", attn, d, bias=True)
        yield linear(f"{h}.attn.c_proj", "decoder", d, config.attention_width)
        yield VectorSpec(f"{h}.ln_2.weight", "decoder", (d,))
        yield linear(f"{h}.mlp.w1", "decoder", f, d)
        yield linear(f"{h}.mlp.w2", "decoder", f, d)
        yield linear(f"{h}.mlp.c_proj", "decoder", d, f)
    yield VectorSpec("transformer.ln_f.weight", "decoder", (d,))
    yield linear("lm_head", "head", config.vocab_size, d)


def _vision(config: ModelConfig) -> Iterator[TensorSpec]:
    v, name = config.vision, "transformer.visual"
    convolution = (3, v.patch_size, v.patch_size)
    source = {f"{name}.conv1.weight": v.width}
    yield MatrixSpec(f"{name}.conv1", "vision", v.width, v.patch_dim, source, columns=convolution)
    yield VectorSpec(f"{name}.positional_embedding", "vision", (256, v.width))
    yield from layer_norm(f"{name}.ln_pre", "vision", v.width)
    for i in range(v.layers):
        block = f"{name}.transformer.resblocks.{i}"
        yield from layer_norm(f"{block}.ln_1", "vision", v.width)
        yield linear(f"{block}.attn.in_proj", "vision", 3 * v.width, v.width, bias=True)
        yield linear(f"{block}.attn.out_proj", "vision", v.width, v.width, bias=True)
        yield from layer_norm(f"{block}.ln_2", "vision", v.width)
        yield linear(f"{block}.mlp.c_fc", "vision", v.mlp_width, v.width, bias=True)
        yield linear(f"{block}.mlp.c_proj", "vision", v.width, v.mlp_width, bias=True)


def _adapter(config: ModelConfig) -> Iterator[TensorSpec]:
    v, name = config.vision, "transformer.visual.attn_pool"
    d = v.output_dim
    if v.width != d:
        yield linear(f"{name}.kv_proj", "adapter", d, v.width)
    yield from layer_norm(f"{name}.ln_kv", "adapter", d)
    yield from layer_norm(f"{name}.ln_q", "adapter", d)
    yield VectorSpec(f"{name}.query", "adapter", (v.n_queries, d))
    yield VectorSpec(f"{name}.pos_embed", "adapter", (v.n_queries, d))
    for i, projection in enumerate("qkv"):
        in_proj = {f"{name}.attn.in_proj_weight": d}
        yield MatrixSpec(f"{name}.attn.{projection}_proj", "adapter", d, d, in_proj, bias=True, first_row=i * d)
    yield linear(f"{name}.attn.out_proj", "adapter", d, d, bias=True)
    yield from layer_norm("transformer.visual.ln_post", "adapter", d)
    yield MatrixSpec("transformer.visual.proj", "adapter", d, d, {"transformer.visual.proj": d}, transposed=True)


def stage_of(spec: MatrixSpec) -> tuple[str, int]:
    """See `qvl_runtime.families.base.Family.stage_of`."""
    if spec.part == "decoder":
        return "decoder", int(spec.name.removeprefix("transformer.h.").split(".")[0])
    if spec.part == "vision":
        layer = spec.name.removeprefix("transformer.visual.transformer.resblocks.").split(".")[0]
        return ("vision", int(layer)) if layer.isdigit() else ("patches", 0)
    return {"adapter": "adapter", "embedding": "embedding", "head": "norm"}[spec.part], 0
