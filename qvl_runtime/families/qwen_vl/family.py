"""The family of Qwen-VL, Qwen-VL-Chat and Qwen-7B."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvl_kernels.ops import Ops
from qvl_runtime.errors import QvlError
from qvl_runtime.families.base import Family, VisionStage
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.layers import DecoderNames
from qvl_runtime.families.qwen_vl import positions
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.grounding import GROUNDING
from qvl_runtime.families.qwen_vl.preprocessing import MEAN, STD, preprocess
from qvl_runtime.families.qwen_vl.prompt import QwenPrompts
from qvl_runtime.families.qwen_vl.tensors import DECODER, stage_of, tensors
from qvl_runtime.families.qwen_vl.tokenizer import QwenTokenizer
from qvl_runtime.families.qwen_vl.vision import Vision, vision_stage
from qvl_runtime.families.reading import LARGEST, read_json, three
from qvl_runtime.families.rope import TableRotary
from qvl_runtime.families.specs import MatrixSpec, TensorSpec
from qvl_runtime.families.weights import Weights
from qvl_runtime.file.opening import read_regular
from qvl_runtime.inputs.pictures import Picture, Pixels
from qvl_runtime.inputs.resolution import Resolution
from qvl_runtime.inputs.tokenizer import MAX_RANKS

RANKS_FILE = "qwen.tiktoken"

CODE_FILES = "configuration_qwen", "modeling_qwen", "tokenization_qwen"
"""Python files of the published repositories, which export does not write."""


class QwenVL:
    """`qvl_runtime.families.base.Family`."""

    model_type = "qwen"
    grounding = GROUNDING
    calling = None
    upright = False

    def read_config(self, data: Mapping[str, Any], where: str) -> ModelConfig:
        return ModelConfig.from_dict(data, where)

    def title(self, config: ModelConfig, generation: GenerationConfig) -> str:
        name = "Qwen-VL" if config.sees else "Qwen-7B"
        return f"{name}-Chat" if generation.is_chat else name

    def tensors(self, config: ModelConfig) -> Iterator[TensorSpec]:
        return tensors(config)

    def decoder_names(self, config: ModelConfig) -> DecoderNames:
        return DECODER

    def tokenizer(self, ranks: bytes, config: ModelConfig) -> QwenTokenizer:
        visual = config.visual
        return QwenTokenizer.from_ranks(
            ranks,
            image_tags=visual is not None,
            n_queries=visual.n_queries if visual else 256,
            vocab_size=config.vocab_size,
        )

    def rotary(self, ops: Ops, config: ModelConfig, capacity: int) -> TableRotary:
        return TableRotary(
            ops,
            capacity,
            lambda count, alpha: positions.rotary_table(count, alpha, config),
            lambda count: positions.logn_table(count, config),
            lambda length: positions.ntk_alpha(length, config),
        )

    def preprocess(
        self,
        config: ModelConfig,
        preprocessing: Mapping[str, Any],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Callable[..., Pixels]:
        if min_pixels is not None or max_pixels is not None:
            raise QvlError("min_pixels and max_pixels are for models that take pictures of any size: leave them out")
        given = {"mean": MEAN.tolist(), "std": STD.tolist(), **preprocessing}
        mean, std = three(given, "mean", "preprocessing"), three(given, "std", "preprocessing", 1 / LARGEST)
        return functools.partial(_pixels, config, np.array(mean, np.float32), np.array(std, np.float32))

    def vision(self, weights: Weights[ModelConfig]) -> Vision:
        return Vision(weights)

    def vision_values(self, config: ModelConfig) -> tuple[int, int]:
        v = config.vision
        tower = v.patches * (6 * v.width + v.mlp_width + v.patch_dim)
        return tower, 6 * v.patches * v.output_dim + 4 * v.n_queries * v.output_dim

    def describe_vision(self, config: ModelConfig, preprocessing: Mapping[str, Any]) -> str:
        v = config.vision
        return (
            f"layers {v.layers}, width {v.width}, heads {v.heads}, pictures {v.image_size} x {v.image_size}, "
            f"{v.n_queries} tokens each"
        )

    def prompts(
        self,
        tokenizer: QwenTokenizer,
        config: ModelConfig,
        generation: GenerationConfig,
        read: Callable[..., Picture] | None,
    ) -> QwenPrompts:
        return QwenPrompts(tokenizer, generation.is_chat, read)

    def stage_of(self, spec: MatrixSpec) -> tuple[str, int]:
        return stage_of(spec)

    def vision_shape(self, config: ModelConfig, pixels: Pixels) -> tuple[int, int]:
        return config.vision.patches, config.vision.width

    def levels(self, config: ModelConfig) -> int:
        return 1

    def vision_stage(self, kind: str, index: int, weights: Weights[ModelConfig]) -> VisionStage:
        return vision_stage(kind, index, weights)

    def published_name(self, name: str, config: ModelConfig) -> str:
        return name

    def published_files(
        self, config: ModelConfig, generation: GenerationConfig, preprocessing: Mapping[str, Any], data: bytes
    ) -> dict[str, Any]:
        configuration, modeling, tokenization = CODE_FILES
        return {
            "config.json": {
                "architectures": ["QWenLMHeadModel"],
                "auto_map": {
                    "AutoConfig": f"{configuration}.QWenConfig",
                    "AutoModelForCausalLM": f"{modeling}.QWenLMHeadModel",
                },
                **config.to_dict(),
                "no_bias": True,
                "rotary_pct": 1.0,
                "tie_word_embeddings": False,
                "torch_dtype": "float16",
            },
            "generation_config.json": generation.to_dict(),
            "tokenizer_config.json": {
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": [f"{tokenization}.QWenTokenizer", None]},
                "model_max_length": config.max_position_embeddings,
            },
            RANKS_FILE: data,
        }

    def read_generation(self, folder: Path) -> GenerationConfig:
        path = folder / "generation_config.json"
        return GenerationConfig.from_dict(read_json(path) if os.path.lexists(path) else {}, str(path))

    def read_ranks(self, folder: Path, config: ModelConfig) -> bytes:
        path = folder / RANKS_FILE
        ranks = read_regular(path, limit=MAX_RANKS, remedy="download it from the model's repository")
        try:
            tokenizer = self.tokenizer(ranks, config)
        except QvlError as error:
            raise QvlError(f"{path}: {error}") from None
        visual = config.visual
        if visual is not None and visual.image_start_id != tokenizer.img_start_id:
            raise QvlError(
                f"{folder / 'config.json'}: visual 'image_start_id' is {visual.image_start_id}, but <img> is "
                f"{tokenizer.img_start_id} in {path.name}; do they belong together?"
            )
        return ranks

    def read_preprocessing(self, folder: Path, config: ModelConfig) -> dict[str, Any]:
        return {"mean": MEAN.tolist(), "std": STD.tolist()} if config.sees else {}


def _pixels(
    config: ModelConfig,
    mean: np.ndarray,
    std: np.ndarray,
    image: Image.Image,
    *,
    resolution: Resolution | None = None,
) -> Pixels:
    if resolution is not None and resolution != Resolution(low=True):  # the only detail of this model is low
        raise QvlError("min_pixels and the like are for models that take pictures of any size: leave them out")
    visual = config.vision
    side = visual.image_size
    return Pixels(
        values=preprocess(image, side, mean, std),
        tokens=visual.n_queries,
        grid=(visual.n_queries, 1),
        size=image.size,
        resized=(side, side),
    )


FAMILY: Family[ModelConfig, QwenTokenizer] = QwenVL()
