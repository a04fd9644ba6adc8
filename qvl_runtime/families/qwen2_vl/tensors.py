"""The tensors of Qwen2-VL: names, shapes and published names; shared by its successors.

Names are those of newer files. `canonical` translates older names.
"""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.families.layers import DecoderNames
from qvl_runtime.families.qwen2_vl.config import FRAMES, MERGE, ModelConfig, VisionConfig
from qvl_runtime.families.specs import MatrixSpec, TensorSpec, VectorSpec, layer_norm, linear

VISUAL, TEXT = "model.visual", "model.language_model"
PATCH_EMBEDDING = f"{VISUAL}.patch_embed.proj"
HEAD = "lm_head"


def decoder_names(*, tied: bool, qk_norm: bool = False) -> DecoderNames:
    """Return the names of the decoder's tensors in the blob."""
    embedding = f"{TEXT}.embed_tokens"
    return DecoderNames(
        embedding=embedding,
        layer=f"{TEXT}.layers",
        attention_norm="input_layernorm",
        qkv="self_attn.qkv_proj",
        attention_out="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        norm=f"{TEXT}.norm",
        head=embedding if tied else HEAD,
        q_norm="self_attn.q_norm" if qk_norm else None,
        k_norm="self_attn.k_norm" if qk_norm else None,
    )


def canonical(name: str) -> str:
    """Return a tensor's name in newer files, for either naming.

    Examples
    --------
    >>> canonical("visual.merger.ln_q.weight"), canonical("model.norm.weight")
    ('model.visual.merger.ln_q.weight', 'model.language_model.norm.weight')
    """
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith((f"{VISUAL}.", f"{TEXT}.")):
        return f"{TEXT}.{name.removeprefix('model.')}"
    return name


def stage_of(spec: MatrixSpec) -> tuple[str, int]:
    """See `qvl_runtime.families.base.Family.stage_of`."""
    for kind, prefix in (("decoder", f"{TEXT}.layers."), ("vision", f"{VISUAL}.blocks.")):
        if spec.name.startswith(prefix):
            return kind, int(spec.name.removeprefix(prefix).split(".")[0])
    return {"vision": "patches", "adapter": "adapter", "embedding": "embedding", "head": "norm"}[spec.part], 0


def tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield all tensors of a Qwen2-VL, in order of use."""
    v = config.visual
    yield patch_embedding(v, bias=False)
    for i in range(v.depth):
        block = f"{VISUAL}.blocks.{i}"
        yield from layer_norm(f"{block}.norm1", "vision", v.width)
        yield from vision_attention(block, v)
        yield from layer_norm(f"{block}.norm2", "vision", v.width)
        yield linear(f"{block}.mlp.fc1", "vision", v.mlp_width, v.width, bias=True)
        yield linear(f"{block}.mlp.fc2", "vision", v.width, v.mlp_width, bias=True)
    yield from layer_norm(f"{VISUAL}.merger.ln_q", "adapter", v.width)
    yield from merger(f"{VISUAL}.merger", v, ("mlp.0", "mlp.2"))
    yield from decoder(config)


def patch_embedding(v: VisionConfig, *, bias: bool) -> MatrixSpec:
    """Return the convolution over patches as a matrix product."""
    convolution = (3, FRAMES, v.patch_size, v.patch_size)
    source = {f"{PATCH_EMBEDDING}.weight": v.width}
    return MatrixSpec(PATCH_EMBEDDING, "vision", v.width, v.patch_dim, source, bias, columns=convolution)


def rms_norm(name: str, part: str, width: int) -> VectorSpec:
    """Return a norm with a weight only."""
    return VectorSpec(f"{name}.weight", part, (width,))


def vision_attention(block: str, v: VisionConfig) -> Iterator[MatrixSpec]:
    """Yield the projections of a ViT block's attention."""
    yield linear(f"{block}.attn.qkv", "vision", 3 * v.width, v.width, bias=True, heads=v.num_heads)
    yield linear(f"{block}.attn.proj", "vision", v.width, v.width, bias=True)


def merger(name: str, v: VisionConfig, layers: tuple[str, str]) -> Iterator[MatrixSpec]:
    """Yield the two layers that merge the patches of a cell to a token."""
    cell = v.width * MERGE**2
    yield linear(f"{name}.{layers[0]}", "adapter", cell, cell, bias=True)
    yield linear(f"{name}.{layers[1]}", "adapter", v.output_width, cell, bias=True)


def decoder(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield the decoder, the embedding and, unless it is tied, the head."""
    d, f, head = config.hidden_size, config.ffn_width, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    yield linear(f"{TEXT}.embed_tokens", "embedding", config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        layer = f"{TEXT}.layers.{i}"
        attention = f"{layer}.self_attn"
        yield rms_norm(f"{layer}.input_layernorm", "decoder", d)
        stacked = {f"{attention}.{n}_proj.weight": rows for n, rows in (("q", query), ("k", key), ("v", key))}
        yield MatrixSpec(f"{attention}.qkv_proj", "decoder", config.qkv_width, d, stacked, config.ATTENTION_BIAS)
        if config.QK_NORM:
            yield rms_norm(f"{attention}.q_norm", "decoder", head)
            yield rms_norm(f"{attention}.k_norm", "decoder", head)
        yield linear(f"{attention}.o_proj", "decoder", d, query)
        yield rms_norm(f"{layer}.post_attention_layernorm", "decoder", d)
        yield linear(f"{layer}.mlp.gate_proj", "decoder", f, d)
        yield linear(f"{layer}.mlp.up_proj", "decoder", f, d)
        yield linear(f"{layer}.mlp.down_proj", "decoder", d, f)
    yield rms_norm(f"{TEXT}.norm", "decoder", d)
    if not config.tie_word_embeddings:
        yield linear(HEAD, "head", config.vocab_size, d)
