"""The memory that a model needs, by part, and remedies if there is too little."""

from __future__ import annotations

import dataclasses
import math

from qvl_kernels.ops import FEW_ROWS
from qvl_kernels.sizes import Sizes
from qvl_runtime.blob import Blob
from qvl_runtime.engine.session import PREFILL_ROWS
from qvl_runtime.families.base import Family
from qvl_runtime.families.config import Config
from qvl_runtime.families.specs import MatrixSpec

VISION_PARTS = ("vision", "adapter")
KV_CACHES = ("fp16", "int8")

DEFAULT_WINDOW = 32768
"""Default limit for prompt and answer together, in tokens: a cache for the 262,144 tokens of some models would be
larger than their weights."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes that a loaded model needs on a device.

    Attributes
    ----------
    parts : dict of str to int
        Weights by part (the keys of `qvl_runtime.families.specs.PARTS`).
    cache : int
        Keys and values of `context` tokens.
    workspace : int
        Temporary memory: the larger of that of a prefill and that of a picture's encoding.
    context : int
        Tokens of prompt and answer together.
    reserve : int
        Memory of a GPU's driver and kernels.
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
    """Return the sizes of a backend: "cpu", "cuda" or "reference"."""
    if backend == "cuda":
        from qvl_kernels import gpu

        return gpu.SIZES
    if backend == "reference":
        from qvl_kernels import reference

        return reference.SIZES
    from qvl_kernels import cpu

    return cpu.SIZES


def budget(blob: Blob, context: int, kv_cache: str, backend: str = "cpu") -> Budget:
    """Compute the budget of `blob` with a cache of `context` tokens on a backend ("cpu", "cuda" or "reference")."""
    sizes, config = sizes_of(backend), blob.config
    cache = cache_bytes(config, context, kv_cache, backend)
    kept, passing = step_values(blob.family, config)
    rotary = 4 * context * config.head_dim
    workspace = sizes.workspace(passing) + 4 * kept + rotary
    return Budget(weight_bytes(blob, sizes), cache, workspace, context, sizes.reserve)


def weight_bytes(blob: Blob, sizes: Sizes) -> dict[str, int]:
    """Return the bytes of the weights by part."""
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
    """Return the bytes of the keys and values of all layers."""
    sizes = sizes_of(backend)
    return sizes.kv_cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, context, kv_cache)


def step_values(family: Family, config: Config) -> tuple[int, int]:
    """Count the float32 values of the vision part's permanent arrays, and those of the larger temporary step.

    A step is a slice of a prompt or the encoding of a picture. The features of a picture are copied once.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    row = config.hidden_size + (2 * heads + 2 * kv_heads) * config.head_dim + config.ffn_width
    prefill = (PREFILL_ROWS + FEW_ROWS) * row + config.vocab_size
    kept, passing = family.vision_values(config) if config.sees else (0, 0)
    return kept, max(prefill, passing, -(-kept // 2))


def remedies(blob: Blob, context: int, kv_cache: str, free: int, backend: str = "cpu") -> list[str]:
    """List options that would make a model fit into `free` bytes, the mildest first; empty if none does."""
    found = []
    if kv_cache != "int8" and budget(blob, context, "int8", backend).total <= free:
        found.append("--kv-cache int8")
    nothing, page = (budget(blob, count, kv_cache, backend).total for count in (0, 256))
    tokens = (free - nothing) // (page - nothing) * 256
    if 256 <= tokens < context:
        found.append(f"--context {tokens}")
    return found
