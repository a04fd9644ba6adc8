"""The family of Qwen2-VL, and the base class of its successors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from qvl_kernels.ops import Ops
from qvl_runtime.errors import QvlError
from qvl_runtime.families.base import Calling, Family, Grounding, VisionStage
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.layers import DecoderNames
from qvl_runtime.families.qwen2_vl.config import MERGE, ModelConfig, section
from qvl_runtime.families.qwen2_vl.grounding import GROUNDING
from qvl_runtime.families.qwen2_vl.preprocessing import (
    MAX_TOKENS,
    Preparation,
    Preprocessing,
    VideoLimits,
    find_settings,
    find_video_settings,
    settings_in,
)
from qvl_runtime.families.qwen2_vl.prompt import Prompts
from qvl_runtime.families.qwen2_vl.published import files
from qvl_runtime.families.qwen2_vl.rotary import Mrope
from qvl_runtime.families.qwen2_vl.template import Template
from qvl_runtime.families.qwen2_vl.tensors import HEAD, canonical, decoder_names, stage_of, tensors
from qvl_runtime.families.qwen2_vl.vision import Qwen2Vision, VisionTower
from qvl_runtime.families.qwen2_vl.vocabulary import Vocabulary, read_vocabulary
from qvl_runtime.families.reading import check, read_json
from qvl_runtime.families.specs import MatrixSpec, TensorSpec
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.pictures import Picture, Pixels
from qvl_runtime.inputs.tokenizer import Tokenizer

NO_LIMIT = 1 << 24
"""Tokens of a history: larger than any window, because these models have no limit."""

REASONING_TOKENS = 8192
"""Default limit of an answer with reasoning, in tokens."""

TOP_K = 50
"""What transformers takes without `top_k`, and therefore leaves out of the files it saves."""


C = TypeVar("C", bound=ModelConfig)


class QwenFamily(Generic[C]):
    """A `Family` for models with pictures of any size; `C` is the config."""

    TITLE: ClassVar[str]
    CLASS: ClassVar[str]
    """Prefix of its class names in transformers."""
    CONFIG: type[C]
    VISION: ClassVar[type[VisionTower]]
    VIDEO: ClassVar[VideoLimits] = VideoLimits(128 * 28 * 28, 768 * 28 * 28)
    grounding: Grounding
    calling: Calling | None = None
    upright = True

    @property
    def model_type(self) -> str:
        return self.CONFIG.MODEL_TYPE

    def read_config(self, data: Mapping[str, Any], where: str) -> C:
        return self.CONFIG.from_dict(data, where)

    def title(self, config: C, generation: GenerationConfig) -> str:
        return self.TITLE

    def tensors(self, config: C) -> Iterator[TensorSpec]:
        return tensors(config)

    def decoder_names(self, config: C) -> DecoderNames:
        return decoder_names(tied=config.tie_word_embeddings, qk_norm=config.QK_NORM)

    def tokenizer(self, data: bytes, config: C) -> Tokenizer:
        vocabulary = Vocabulary.from_bytes(data)
        _check_forms(vocabulary, config, "config")
        return Tokenizer(*vocabulary, config.vocab_size)

    def rotary(self, ops: Ops, config: C, capacity: int) -> Mrope:
        return Mrope(ops, config, capacity)

    def preprocess(
        self,
        config: C,
        preprocessing: Mapping[str, Any],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Preparation:
        visual = config.visual
        settings = Preprocessing.from_dict(preprocessing, visual, "preprocessing")
        settings = settings.limited(min_pixels, max_pixels, visual.factor)
        limits = section(preprocessing, "video", "preprocessing") if "video" in preprocessing else {}
        video = VideoLimits.from_dict(limits, self.VIDEO, "preprocessing: video")
        if not video.whole and (min_pixels or max_pixels):
            video = VideoLimits(settings.min_pixels, settings.max_pixels)
        return Preparation(settings, video, visual)

    def vision(self, weights: Weights) -> VisionTower:
        return self.VISION(weights).load()

    def vision_values(self, config: C) -> tuple[int, int]:
        v, patches = config.visual, MAX_TOKENS * MERGE**2
        features = v.levels * MAX_TOKENS * v.output_width
        kept = patches * (6 * v.width + v.mlp_width + v.head_dim) + features
        return kept, patches * 2 * v.patch_dim + features

    def levels(self, config: C) -> int:
        return config.visual.levels

    def describe_vision(self, config: C, preprocessing: Mapping[str, Any]) -> str:
        v = config.visual
        most = self.preprocess(config, preprocessing).max_pixels // v.factor**2
        return (
            f"layers {v.depth}, width {v.width}, heads {v.num_heads}, pictures of any size, a token for "
            f"{v.factor} x {v.factor} pixels and {most} at most (--max-pixels: more)"
        )

    def template(self, generation: GenerationConfig) -> Template:
        """Return the chat template."""
        return Template()

    def prompts(
        self,
        tokenizer: Tokenizer,
        config: C,
        generation: GenerationConfig,
        read: Callable[..., Picture] | None,
    ) -> Prompts:
        assert read is not None, "all models of these families take pictures"
        return Prompts(tokenizer, config, self.template(generation), read)

    # for the converter
    def stage_of(self, spec: MatrixSpec) -> tuple[str, int]:
        return stage_of(spec)

    def vision_shape(self, config: C, pixels: Pixels) -> tuple[int, int]:
        return pixels.tokens * MERGE**2, config.visual.width

    def vision_stage(self, kind: str, index: int, weights: Weights) -> VisionStage:
        return self.VISION(weights).stage(kind, index)

    def published_name(self, name: str, config: C) -> str | None:
        """Map the name of a checkpoint's tensor to its name in `tensors`; None if it is not used."""
        return None if config.tie_word_embeddings and name == f"{HEAD}.weight" else canonical(name)

    def published_files(
        self,
        config: C,
        generation: GenerationConfig,
        preprocessing: Mapping[str, Any],
        data: bytes,
    ) -> dict[str, Any]:
        return files(self.CLASS, config, generation, preprocessing, data)

    def read_ranks(self, folder: Path, config: C) -> bytes:
        vocabulary = read_vocabulary(folder)
        try:
            Tokenizer(*vocabulary, config.vocab_size)
        except QvlError as error:
            raise QvlError(f"{folder}: {error}") from None
        _check_forms(vocabulary, config, str(folder / "config.json"))
        return vocabulary.to_bytes()

    def read_preprocessing(self, folder: Path, config: C) -> dict[str, Any]:
        path = find_settings(folder)
        data = read_json(path)
        given = settings_in(data, "image_processor", path)
        settings = Preprocessing.from_dict(given, config.visual, str(path)).to_dict()
        other = find_video_settings(folder) if self.VIDEO.whole else None
        if other is not None:
            video = settings_in(data if other == path else read_json(other), "video_processor", other)
            if video:
                settings["video"] = VideoLimits.from_dict(video, self.VIDEO, str(other)).to_dict()
        return settings

    def read_generation(self, folder: Path) -> GenerationConfig:
        """Read the prompt and sampling settings of a published checkpoint."""
        path = folder / "generation_config.json"
        data = read_json(path) if os.path.lexists(path) else {}
        thinking = data.get("thinking") is True or _thinks(folder)
        own = {"chat_format": "chatml", "max_window_size": NO_LIMIT, "thinking": thinking}
        default = {"top_k": TOP_K} | ({"max_new_tokens": REASONING_TOKENS} if thinking else {})
        return GenerationConfig.from_dict({**default, **data, **own}, str(path))


def _check_forms(vocabulary: Vocabulary, config: ModelConfig, where: str) -> None:
    """Check that the ids of a config are those of the vocabulary's special tokens."""
    for form in ("image_pad", "video_pad", "vision_start", "vision_end"):
        key = f"{form.removesuffix('_pad')}_token_id"
        found, wanted = vocabulary.special.get(f"<|{form}|>"), getattr(config, key)
        check(
            found == wanted,
            where,
            f"'{key}' is {wanted}, but <|{form}|> is {found} in the tokenizer; do they belong together?",
        )


def _thinks(folder: Path) -> bool:
    """Whether the checkpoint's chat template begins an answer with reasoning."""
    texts = []
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        texts.append(str(read_json(path).get("chat_template")) if path.is_file() else "")
    path = folder / "chat_template.jinja"
    if path.is_file() and path.stat().st_size < 1 << 20:
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return any(re.search(r"<\|im_start\|>assistant(\\n|\n)<think>", text) for text in texts)


class Qwen2VL(QwenFamily[ModelConfig]):
    """Qwen2-VL."""

    TITLE = "Qwen2-VL"
    CLASS = "Qwen2VL"
    CONFIG = ModelConfig
    VISION = Qwen2Vision
    grounding = GROUNDING


FAMILY: Family[ModelConfig, Tokenizer] = Qwen2VL()
