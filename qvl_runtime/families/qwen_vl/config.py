"""Parsing and validation of the `config.json` of Qwen-VL and Qwen-7B."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qvl_runtime.families.reading import check, take

# Limits far beyond any model of the family: these values size memory before the tensors are checked.
MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_SIDE, MAX_MLP_RATIO = 1024, 1 << 24, 1 << 24, 1 << 13, 64.0
MAX_WIDTH = 1 << 20


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The ViT and the adapter (the `visual` section)."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int
    image_start_id: int
    n_queries: int = 256

    @property
    def grid(self) -> int:
        """Number of patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def patch_dim(self) -> int:
        """Number of values of one flattened patch."""
        return 3 * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def adapter_heads(self) -> int:
        return self.output_dim // 128

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> VisionConfig:
        where = f"{where}: visual"
        check(isinstance(data, Mapping), where, f"is {data!r:.60}, expected a section")
        kinds = {f.name: {"int": int, "float": float}[str(f.type)] for f in dataclasses.fields(cls)}
        config = cls(**{k: take(data, k, t, where, 256 if k == "n_queries" else None) for k, t in kinds.items()})
        limits = {"layers": MAX_LAYERS, "image_size": MAX_SIDE}
        for name in ("image_size", "patch_size", "width", "layers", "heads", "output_dim", "n_queries"):
            value, limit = getattr(config, name), limits.get(name, MAX_WIDTH)
            check(0 < value <= limit, where, f"'{name}' is {value}, expected > 0 and at most {limit}")
        check(
            0 < config.mlp_ratio <= MAX_MLP_RATIO,
            where,
            f"'mlp_ratio' is {config.mlp_ratio}, expected > 0 and at most {MAX_MLP_RATIO}",
        )
        check(
            config.image_size % config.patch_size == 0,
            where,
            f"'image_size' {config.image_size} is no multiple of 'patch_size' {config.patch_size}",
        )
        check(
            config.width % config.heads == 0,
            where,
            f"'width' {config.width} is no multiple of 'heads' {config.heads}",
        )
        check(config.output_dim % 128 == 0, where, f"'output_dim' {config.output_dim} is no multiple of 128")
        check(math.isqrt(config.n_queries) ** 2 == config.n_queries, where, "'n_queries' is no square")
        return config


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Qwen decoder, with `visual` if the model takes pictures.

    `intermediate_size` is the published value; the width of the feed-forward is half of it (`ffn_width`).
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_channels: int
    intermediate_size: int
    layer_norm_epsilon: float
    vocab_size: int
    seq_length: int
    max_position_embeddings: int
    rotary_emb_base: float
    use_dynamic_ntk: bool
    use_logn_attn: bool
    visual: VisionConfig | None = None

    @property
    def ffn_width(self) -> int:
        return self.intermediate_size // 2

    @property
    def head_dim(self) -> int:
        return self.kv_channels

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def norm_eps(self) -> float:
        """Epsilon of the decoder's norms."""
        return self.layer_norm_epsilon

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return self.visual is not None

    @property
    def vision(self) -> VisionConfig:
        """`visual`, of a model that takes pictures."""
        assert self.visual is not None, "this model has no vision part"
        return self.visual

    @property
    def attention_width(self) -> int:
        """Width of queries, of keys and of values."""
        return self.num_attention_heads * self.kv_channels

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Parse a published `config.json`.

        Raises
        ------
        QvlError
            For another `model_type`, a missing key, or an unsupported value.
        """
        model_type = data.get("model_type")
        check(
            model_type == "qwen",
            where,
            f"model_type is {model_type!r}; this runtime runs 'qwen' (Qwen-VL, Qwen-VL-Chat, Qwen-7B)",
        )
        kinds = {f.name: {"int": int, "float": float, "bool": bool}.get(str(f.type)) for f in dataclasses.fields(cls)}
        values = {k: take(data, k, t, where) for k, t in kinds.items() if t is not None}
        visual = data.get("visual")
        config = cls(**values, visual=None if visual is None else VisionConfig.from_dict(visual, where))
        limits = {
            "num_hidden_layers": MAX_LAYERS,
            "seq_length": MAX_POSITIONS,
            "max_position_embeddings": MAX_POSITIONS,
            "vocab_size": MAX_VOCABULARY,
            "layer_norm_epsilon": 1.0,
            "rotary_emb_base": 1e12,
        }
        for name, kind in kinds.items():
            if kind in (int, float):
                value, limit = values[name], limits.get(name, MAX_WIDTH)
                check(0 < value <= limit, where, f"'{name}' is {value}, expected > 0 and at most {limit}")
        base = config.rotary_emb_base
        check(base >= 1, where, f"'rotary_emb_base' is {base}, expected 1 or more")
        check(config.seq_length > 1, where, "'seq_length' is 1, expected > 1")
        check(config.intermediate_size % 2 == 0, where, "'intermediate_size' is odd")
        channels = config.kv_channels
        # The scaled rotary base has an exponent with the divisor kv_channels - 2.
        check(
            channels > 2 and channels % 2 == 0, where, f"'kv_channels' is {channels}, expected an even number above 2"
        )
        for name, computed in (("rotary_pct", 1.0), ("no_bias", True), ("tie_word_embeddings", False)):
            value = data.get(name, computed)
            check(value == computed, where, f"'{name}' is {value!r:.60}; only {computed!r} is known")
        if config.visual is not None:
            check(
                config.visual.output_dim == config.hidden_size,
                where,
                f"visual 'output_dim' {config.visual.output_dim} differs from 'hidden_size' {config.hidden_size}",
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        data = {"model_type": "qwen", **dataclasses.asdict(self)}
        if self.visual is None:
            del data["visual"]
        return data
