"""Parsing and validation of the `config.json` of Qwen2-VL, shared with Qwen2.5-VL and Qwen3-VL.

Three formats are supported: text keys at the top level (as published for Qwen2-VL and Qwen2.5-VL), in a `text_config`
(Qwen3-VL, and files saved by transformers 4.52 and later), and the latter with `rope_parameters` (transformers 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from qvl_runtime.errors import QvlError
from qvl_runtime.families.reading import check, take

# Limits far beyond any model of the families: these values size memory before the tensors are checked.
MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH, MAX_PATCH = 1024, 1 << 24, 1 << 24, 1 << 20, 256

MERGE = 2
"""Rows and columns of patches per token (`spatial_merge_size`)."""

FRAMES = 2
"""Frames per patch (`temporal_patch_size`); a picture counts as two equal frames."""

VISION_ROPE_BASE = 10000.0
VISION_EPS = 1e-6


def section(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return a nested section of a config."""
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise QvlError(f"{where}: '{key}' is {value!r:.80}, expected a section")
    return value


def integers(data: Mapping[str, Any], key: str, where: str, default: Any = None) -> tuple[int, ...]:
    """Return a list of integers."""
    values = take(data, key, list, where, default)
    for value in values:
        take({key: value}, key, int, where)
    return tuple(values)


def refuse(data: Mapping[str, Any], where: str, known: Mapping[str, Any]) -> None:
    """Refuse keys with an unsupported value; an absent key is accepted."""
    for key, value in known.items():
        found = data.get(key)
        check(found is None or found == value, where, f"'{key}' is {found!r:.80}; only {value!r} is known")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The ViT and its merger (`vision_config`).

    Published files omit keys with default values, so the defaults are part of the format.

    Attributes
    ----------
    depth : int
        Number of blocks.
    width : int
        Width of the residual stream.
    output_width : int
        Width of the merger's output.
    num_heads : int
    patch_size : int
        Side of a patch in pixels.
    """

    depth: int
    width: int
    output_width: int
    num_heads: int
    patch_size: int

    KEYS: ClassVar[Mapping[str, str]]
    """Published names of attributes that differ."""
    DEFAULTS: ClassVar[Mapping[str, Any]]
    ACTIVATION: ClassVar[str]

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        raise NotImplementedError

    @property
    def patch_dim(self) -> int:
        """Number of values of one patch."""
        return 3 * FRAMES * self.patch_size**2

    @property
    def levels(self) -> int:
        """Number of feature rows per token of a picture; see `qvl_runtime.inputs.pictures.Vision.encode`."""
        return 1

    @property
    def factor(self) -> int:
        """Side of a token's cell in pixels."""
        return self.patch_size * MERGE

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> Self:
        """Parse a `vision_config`."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            key, default = cls.KEYS.get(field.name, field.name), cls.DEFAULTS[field.name]
            if isinstance(default, tuple):
                values[field.name] = integers(data, key, where, list(default))
            else:
                values[field.name] = take(data, key, type(default), where, default)
        refuse(
            data,
            where,
            {
                "spatial_merge_size": MERGE,
                "temporal_patch_size": FRAMES,
                "in_channels": 3,
                "in_chans": 3,
                "hidden_act": cls.ACTIVATION,
            },
        )
        rope = data.get("rope_parameters")
        if isinstance(rope, Mapping):
            inner = f"{where}: rope_parameters"
            refuse(rope, inner, {"rope_theta": VISION_ROPE_BASE})
            kind = rope.get("rope_type", "axial")
            check(kind in ("axial", "default"), inner, f"'rope_type' is {kind!r:.80}; only 'axial' is computed")
        config = cls(**values)
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Validate the values."""
        limits = {"depth": MAX_LAYERS, "patch_size": MAX_PATCH}
        for field in dataclasses.fields(self):
            value, key = getattr(self, field.name), self.KEYS.get(field.name, field.name)
            if isinstance(value, int | float):
                limit = limits.get(field.name, MAX_WIDTH)
                check(0 < value <= limit, where, f"'{key}' is {value}, expected above 0 and at most {limit}")
        check(0 < self.mlp_width <= MAX_WIDTH, where, f"the MLP is {self.mlp_width} wide, expected 1 to {MAX_WIDTH}")
        width, heads = self.width, self.num_heads
        check(width % heads == 0, where, f"the ViT's width {width} is no multiple of 'num_heads' {heads}")
        # half of a head is rotated by the row and half by the column, in pairs
        check(self.head_dim % 4 == 0, where, f"the ViT's heads are {self.head_dim} wide, expected a multiple of 4")

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        values = dataclasses.asdict(self).items()
        return {self.KEYS.get(name, name): list(v) if isinstance(v, tuple) else v for name, v in values}


@dataclasses.dataclass(frozen=True)
class Qwen2VisionConfig(VisionConfig):
    """The ViT of Qwen2-VL; `hidden_size` is the width of its output."""

    mlp_ratio: float

    KEYS: ClassVar[Mapping[str, str]] = {"width": "embed_dim", "output_width": "hidden_size"}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "width": 1280,
        "output_width": 3584,
        "num_heads": 16,
        "patch_size": 14,
        "mlp_ratio": 4.0,
    }
    ACTIVATION = "quick_gelu"

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder with grouped-query attention and M-RoPE, and its ViT.

    Attributes
    ----------
    rope_theta : float
        Base of the rotary frequencies.
    mrope_section : tuple of int
        Number of rotary frequencies for time, height and width.
    tie_word_embeddings : bool
        Whether the output head is the embedding.
    image_token_id, video_token_id : int
        Placeholders for one token of a picture or of a video.
    vision_start_token_id, vision_end_token_id : int
        Tokens before and after the placeholders.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    visual: VisionConfig

    MODEL_TYPE: ClassVar[str] = "qwen2_vl"
    VISION: ClassVar[type[VisionConfig]] = Qwen2VisionConfig
    ATTENTION_BIAS: ClassVar[bool] = True
    QK_NORM: ClassVar[bool] = False
    INTERLEAVED: ClassVar[bool] = False
    """Whether the frequencies of time, height and width are interleaved."""

    @property
    def ffn_width(self) -> int:
        return self.intermediate_size

    @property
    def norm_eps(self) -> float:
        return self.rms_norm_eps

    @property
    def sees(self) -> bool:
        return True

    @property
    def qkv_width(self) -> int:
        """Total width of queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config.json") -> Self:
        """Parse a published `config.json`, or the result of `to_dict`.

        Raises
        ------
        QvlError
            For another `model_type`, a missing key, or an unsupported value.
        """
        refuse(data, where, {"model_type": cls.MODEL_TYPE})
        nested = "text_config" in data
        text = section(data, "text_config", where) if nested else data
        inner = f"{where}: text_config" if nested else where
        if nested:
            kind = text.get("model_type", f"{cls.MODEL_TYPE}_text")
            known = (cls.MODEL_TYPE, f"{cls.MODEL_TYPE}_text")
            check(kind in known, inner, f"'model_type' is {kind!r:.80}; only {known[1]!r} belongs to {known[0]!r}")
        cls._refuse_text(text, inner)
        rope, rope_where = _rope(data, text, inner)
        kinds: dict[str, type] = {
            "hidden_size": int,
            "intermediate_size": int,
            "num_hidden_layers": int,
            "num_attention_heads": int,
        }
        kinds |= {"num_key_value_heads": int, "rms_norm_eps": float, "vocab_size": int, "max_position_embeddings": int}
        values = {key: take(text, key, kind, inner) for key, kind in kinds.items()}
        ids = {"image": 151655, "video": 151656, "vision_start": 151652, "vision_end": 151653}
        values |= {f"{n}_token_id": take(data, f"{n}_token_id", int, where, i) for n, i in ids.items()}
        check(values["num_attention_heads"] > 0, inner, "'num_attention_heads' is below 1")
        theta = take(rope if rope.get("rope_theta") is not None else text, "rope_theta", float, inner)
        refuse(rope, rope_where, {"mrope_interleaved": cls.INTERLEAVED, "partial_rotary_factor": 1.0})
        config = cls(
            **values,
            head_dim=cls._head_dim(text, inner),
            rope_theta=theta,
            mrope_section=integers(rope, "mrope_section", rope_where),
            tie_word_embeddings=cls._tied(data, text, where),
            visual=cls._vision(data, where),
        )
        config._check(inner)
        return config

    @classmethod
    def _refuse_text(cls, text: Mapping[str, Any], where: str) -> None:
        known: dict[str, Any] = {"hidden_act": "silu", "use_sliding_window": False, "partial_rotary_factor": 1.0}
        if not cls.ATTENTION_BIAS:
            known["attention_bias"] = False
        refuse(text, where, known)
        for key in ("num_experts", "num_local_experts", "moe_intermediate_size"):
            check(not text.get(key), where, f"'{key}' is {text.get(key)!r:.80}; mixtures of experts are not computed")
        layers = text.get("layer_types")
        if layers is not None:
            other = [kind for kind in layers if kind != "full_attention"] if isinstance(layers, list) else [layers]
            check(not other, where, f"'layer_types' holds {other[:1]!r:.80}; only 'full_attention' is computed")

    @classmethod
    def _head_dim(cls, text: Mapping[str, Any], where: str) -> int:
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        check(hidden % heads == 0, where, f"'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}")
        refuse(text, where, {"head_dim": hidden // heads})
        return hidden // heads

    @classmethod
    def _tied(cls, data: Mapping[str, Any], text: Mapping[str, Any], where: str) -> bool:
        return any(take(part, "tie_word_embeddings", bool, where, False) for part in (data, text))

    @classmethod
    def _vision(cls, data: Mapping[str, Any], where: str) -> VisionConfig:
        vision, inner = section(data, "vision_config", where), f"{where}: vision_config"
        kind = vision.get("model_type", cls.MODEL_TYPE)
        known = (cls.MODEL_TYPE, f"{cls.MODEL_TYPE}_vision")
        check(kind in known, inner, f"'model_type' is {kind!r:.80}; only {known[0]!r} is known here")
        return cls.VISION.from_dict(vision, inner)

    def _check(self, where: str) -> None:
        limits = {
            "num_hidden_layers": MAX_LAYERS,
            "vocab_size": MAX_VOCABULARY,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1.0,
            "rope_theta": 1e12,
        }
        for field in dataclasses.fields(self):
            value, limit = getattr(self, field.name), limits.get(field.name, MAX_WIDTH)
            if field.type in ("int", "float") and not field.name.endswith("_token_id"):
                check(0 < value <= limit, where, f"'{field.name}' is {value}, expected above 0 and at most {limit}")
        check(self.rope_theta >= 1, where, f"'rope_theta' is {self.rope_theta}, expected 1 or more")
        check(self.max_position_embeddings > 1, where, "'max_position_embeddings' is 1, expected more")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        check(
            heads % kv_heads == 0,
            where,
            f"'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}",
        )
        check(self.head_dim % 2 == 0, where, f"'head_dim' {self.head_dim} is odd")
        sections = self.mrope_section
        check(
            len(sections) == 3 and all(n >= 0 for n in sections) and sum(sections) == self.head_dim // 2,
            where,
            f"'mrope_section' is {list(sections)}, expected three numbers with the sum {self.head_dim // 2}",
        )
        for name in ("image", "video", "vision_start", "vision_end"):
            value = getattr(self, f"{name}_token_id")
            check(0 <= value < self.vocab_size, where, f"'{name}_token_id' is {value}, expected below 'vocab_size'")
        width = self.visual.output_width
        check(
            width == self.hidden_size,
            where,
            f"the ViT's output is {width} wide, but 'hidden_size' is {self.hidden_size}",
        )

    def frame_position(self, pair: int, seconds: float) -> int:
        """Return the temporal offset of the `pair`-th pair of frames; `seconds` is the interval between pairs."""
        return pair

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        text = dataclasses.asdict(self)
        del text["visual"]
        ids = {key: text.pop(key) for key in list(text) if key.endswith("_token_id")}
        rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
        rope["mrope_section"] = list(text.pop("mrope_section"))
        tied = text.pop("tie_word_embeddings")
        return {
            "model_type": self.MODEL_TYPE,
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": self.visual.to_dict(),
            "tie_word_embeddings": tied,
            **ids,
        }


def _rope(data: Mapping[str, Any], text: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
    """Return the rotary section of a config, and its name for errors."""
    found = [(part, key) for part in (text, data) for key in ("rope_parameters", "rope_scaling") if part.get(key)]
    check(bool(found), where, "'rope_scaling' is missing; download the file again")
    part, key = found[0]
    rope, inner = section(part, key, where), f"{where}: {key}"
    for name in ("rope_type", "type"):
        kind = rope.get(name, "default")
        check(kind in ("default", "mrope"), inner, f"'{name}' is {kind!r:.80}; only 'default' and 'mrope' are computed")
    return rope, inner
