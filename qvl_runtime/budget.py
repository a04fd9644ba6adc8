"""Will it fit: the memory a model takes, part by part, and what to change when there is too little."""

from __future__ import annotations

import dataclasses
import math

from qvl_runtime.blob import Blob
from qvl_runtime.engine.decoder import FEW_ROWS
from qvl_runtime.engine.session import PREFILL_ROWS
from qvl_runtime.families.base import Family
from qvl_runtime.families.config import Config
from qvl_runtime.families.specs import MatrixSpec

VISION_PARTS = ("vision", "adapter")
KV_CACHES = ("fp16", "int8")

DEFAULT_WINDOW = 32768
"""Tokens a prompt and its answer may have together, unless more are asked for: a cache for the 262,144 tokens that some
models take would be larger than their weights."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes a loaded model takes on a device.

    Attributes
    ----------
    parts : dict of str to int
        Weights by part (the keys of `qvl_runtime.families.specs.PARTS`).
    cache : int
        Keys and values of `context` tokens.
    workspace : int
        The larger of what a prompt's prefill and a picture's encoding take while they run.
    context : int
        Tokens of prompt and answer together.
    reserve : int
        What a GPU's driver and kernels take besides.
    """

    parts: dict[str, int]
    cache: int
    workspace: int
    context: int
    reserve: int = 0

    @property
    def weights(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace + self.reserve


def budget(blob: Blob, context: int, kv_cache: str, backend: str = "cpu") -> Budget:
    """What `blob` takes with a cache of `context` tokens on a backend ("cpu" or "cuda"), in that backend's sizes."""
    cache = cache_bytes(blob.config, context, kv_cache, backend)
    reserve = 0
    if backend == "cuda":
        from qvl_kernels import gpu

        reserve = gpu.RESERVE
    return Budget(
        weight_bytes(blob, backend), cache, workspace_bytes(blob.family, blob.config, context), context, reserve
    )


def weight_bytes(blob: Blob, backend: str = "cpu") -> dict[str, int]:
    """Weights by part: on a GPU as they are laid out there, else as in the file, which is mapped."""
    if backend != "cuda":
        return blob.part_sizes()
    from qvl_kernels import gpu

    sizes: dict[str, int] = {}
    for spec in blob.family.tensors(blob.config):
        if isinstance(spec, MatrixSpec):
            nbytes = gpu.device_bytes(spec.n, spec.k, *blob.bits(spec.name)) + (4 * spec.n if spec.bias else 0)
        else:
            nbytes = 4 * math.prod(spec.shape)
        sizes[spec.part] = sizes.get(spec.part, 0) + nbytes
    return sizes


def cache_bytes(config: Config, context: int, kv_cache: str, backend: str = "cpu") -> int:
    """Keys and values of all layers; int8 has a scale for every vector, in fp16 on a GPU and else in float32."""
    if backend == "cuda":
        from qvl_kernels import gpu

        return gpu.cache_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, context, kv_cache)
    vector = config.head_dim + 4 if kv_cache == "int8" else 2 * config.head_dim
    return 2 * config.num_hidden_layers * config.num_key_value_heads * context * vector


def workspace_bytes(family: Family, config: Config, context: int) -> int:
    """Activations at four bytes each and as much again for their quantized copies, and the rotary table.

    Those of the vision part stay, beside what a prompt needs.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    row = config.hidden_size + (2 * heads + 2 * kv_heads) * config.head_dim + config.ffn_width
    prefill = (PREFILL_ROWS + FEW_ROWS) * row + config.vocab_size
    kept, passing = family.vision_values(config) if config.sees else (0, 0)
    return 4 * (kept + max(2 * prefill, 2 * passing, kept) + context * config.head_dim)


def remedies(blob: Blob, context: int, kv_cache: str, free: int, backend: str = "cpu") -> list[str]:
    """Changes that would make a model fit into `free` bytes, mildest first; empty if nothing would."""
    found = []
    if kv_cache != "int8" and budget(blob, context, "int8", backend).total <= free:
        found.append("--kv-cache int8")
    nothing, page = (budget(blob, count, kv_cache, backend).total for count in (0, 256))
    tokens = (free - nothing) // (page - nothing) * 256
    if 256 <= tokens < context:
        found.append(f"--context {tokens}")
    return found
