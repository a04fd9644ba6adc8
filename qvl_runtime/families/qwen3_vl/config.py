"""Parsing and validation of the `config.json` of Qwen3-VL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from qvl_runtime.families.qwen2_vl.config import ModelConfig, VisionConfig
from qvl_runtime.families.reading import check, take


@dataclasses.dataclass(frozen=True)
class Qwen3VisionConfig(VisionConfig):
    """A ViT with learned positions. Features of some blocks are added to decoder layers (deepstack).

    Attributes
    ----------
    num_position_embeddings : int
        Number of cells of the square table of learned positions.
    deepstack_visual_indexes : tuple of int
        Blocks whose output is added to the decoder's first layers, in this order.
    """

    intermediate_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    KEYS: ClassVar[Mapping[str, str]] = {"width": "hidden_size", "output_width": "out_hidden_size"}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "depth": 27,
        "width": 1152,
        "output_width": 3584,
        "num_heads": 16,
        "patch_size": 16,
        "intermediate_size": 4304,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
    }
    ACTIVATION = "gelu_pytorch_tanh"

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size

    @property
    def levels(self) -> int:
        """Number of feature rows per token of a picture: the embedding, and the deepstack levels."""
        return 1 + len(self.deepstack_visual_indexes)

    def check(self, where: str) -> None:
        super().check(where)
        count, blocks = self.num_position_embeddings, self.deepstack_visual_indexes
        check(math.isqrt(count) ** 2 == count, where, f"'num_position_embeddings' {count} is no square")
        ascending = all(a < b for a, b in zip((-1, *blocks), (*blocks, self.depth)))
        check(ascending, where, f"'deepstack_visual_indexes' {list(blocks)} do not name blocks in order")


@dataclasses.dataclass(frozen=True)
class Qwen3Config(ModelConfig):
    """Config of a Qwen3-VL. The decoder normalizes queries and keys and has no biases."""

    visual: Qwen3VisionConfig

    MODEL_TYPE = "qwen3_vl"
    VISION = Qwen3VisionConfig
    ATTENTION_BIAS = False
    QK_NORM = True
    INTERLEAVED = True

    @classmethod
    def _head_dim(cls, text: Mapping[str, Any], where: str) -> int:
        return take(text, "head_dim", int, where)

    @classmethod
    def _tied(cls, data: Mapping[str, Any], text: Mapping[str, Any], where: str) -> bool:
        return take(data, "tie_word_embeddings", bool, where, False)
