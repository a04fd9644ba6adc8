"""Will it fit: the memory a model takes, part by part, and what to change when there is too little."""

from __future__ import annotations

import dataclasses
import math

from qvl_kernels.sizes import Sizes
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


def sizes_of(backend: str) -> Sizes:
    """The sizes of a backend: "cpu", "cuda" or "reference"."""
    if backend == "cuda":
        from qvl_kernels import gpu

        return gpu.SIZES
    if backend == "reference":
        from qvl_kernels import reference

        return reference.SIZES
    from qvl_kernels import cpu

    return cpu.SIZES


def budget(blob: Blob, context: int, kv_cache: str, backend: str = "cpu") -> Budget:
    """What `blob` takes with a cache of `context` tokens on a backend ("cpu", "cuda" or "reference")."""
    sizes, config = sizes_of(backend), blob.config
    cache = cache_bytes(config, context, kv_cache, backend)
    kept, passing = step_values(blob.family, config)
    rotary = 4 * context * config.head_dim
    workspace = sizes.workspace(passing) + 4 * kept + rotary
    return Budget(weight_bytes(blob, sizes), cache, workspace, context, sizes.reserve)


def weight_bytes(blob: Blob, sizes: Sizes) -> dict[str, int]:
    """Weights by part."""
    found: dict[str, int] = {}
    for spec in blob.family.tensors(blob.config):
        if isinstance(spec, MatrixSpec):
            has = {suffix: f"{spec.name}.{suffix}" in blob.file for suffix in ("zeros", "perm", "bias")}
            nbytes = sizes.weight(spec.n, spec.k, *blob.bits(spec.name), **has)
        else:
            nbytes = 4 * math.prod(spec.shape)
        found[spec.part] = found.get(spec.part, 0) + nbytes
    return found


def cache_bytes(config: Config, context: int, kv_cache: str, backend: str = "cpu") -> int:
    """Keys and values of all layers."""
    sizes = sizes_of(backend)
    return sizes.kv_cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, context, kv_cache)


def step_values(family: Family, config: Config) -> tuple[int, int]:
    """Values that stay (the float32 arrays of the vision part), and those of the larger step that passes beside them.

    A step is a slice of a prompt or the encoding of a picture; the features of a picture are copied once.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    row = config.hidden_size + (2 * heads + 2 * kv_heads) * config.head_dim + config.ffn_width
    prefill = (PREFILL_ROWS + FEW_ROWS) * row + config.vocab_size
    kept, passing = family.vision_values(config) if config.sees else (0, 0)
    return kept, max(prefill, passing, -(-kept // 2))


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
