"""Will it fit: the memory a model takes, part by part, and what to change when there is too little."""

from __future__ import annotations

import dataclasses

from qvl_runtime.blob import Blob
from qvl_runtime.config import ModelConfig
from qvl_runtime.session import PREFILL_ROWS

VISION_PARTS = ("vision", "adapter")
KV_CACHES = ("fp16", "int8")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes a loaded model takes.

    Attributes
    ----------
    parts : dict of str to int
        Weights by part (the keys of `architecture.PARTS`).
    cache : int
        Keys and values of `context` tokens.
    workspace : int
        The larger of what a prompt's prefill and a picture's encoding take while they run.
    context : int
        Tokens of prompt and answer together.
    """

    parts: dict[str, int]
    cache: int
    workspace: int
    context: int

    @property
    def weights(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def budget(blob: Blob, context: int, kv_cache: str) -> Budget:
    """What `blob` takes with a cache of `context` tokens."""
    return Budget(blob.part_sizes(), cache_bytes(blob.config, context, kv_cache), workspace_bytes(blob.config), context)


def cache_bytes(config: ModelConfig, context: int, kv_cache: str) -> int:
    """Keys and values of all layers; int8 has a float32 scale for every vector."""
    vector = config.head_dim + 4 if kv_cache == "int8" else 2 * config.head_dim
    return 2 * config.num_hidden_layers * config.num_attention_heads * context * vector


def workspace_bytes(config: ModelConfig) -> int:
    """Activations at four bytes each, and as much again for their quantised copies."""
    row = config.hidden_size + 4 * config.attention_width + config.ffn_width
    prefill = PREFILL_ROWS * row + config.vocab_size
    vision = 0
    if config.visual is not None:
        v = config.visual
        patch = 6 * v.width + v.mlp_width + v.patch_dim
        vision = v.patches * max(patch, 6 * v.output_dim) + 4 * v.n_queries * v.output_dim
    return 8 * max(prefill, vision)


def remedies(blob: Blob, context: int, kv_cache: str, free: int) -> list[str]:
    """Changes that would make a model fit into `free` bytes, mildest first; empty if nothing would."""
    found = []
    if kv_cache != "int8" and budget(blob, context, "int8").total <= free:
        found.append("--kv-cache int8")
    needed = budget(blob, 0, kv_cache).total
    tokens = (free - needed) // cache_bytes(blob.config, 1, kv_cache) // 256 * 256
    if 256 <= tokens < context:
        found.append(f"--context {tokens}")
    return found
