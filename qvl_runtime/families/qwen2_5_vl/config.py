"""Parsing and validation of the `config.json` of Qwen2.5-VL."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from qvl_runtime.families.qwen2_vl.config import MERGE, ModelConfig, VisionConfig
from qvl_runtime.families.reading import check


@dataclasses.dataclass(frozen=True)
class Qwen25VisionConfig(VisionConfig):
    """A ViT with windowed attention in most blocks.

    Attributes
    ----------
    window_size : int
        Side of a window in pixels.
    fullatt_block_indexes : tuple of int
        Blocks with full attention.
    tokens_per_second : int
        Temporal positions per second of video.
    """

    intermediate_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    tokens_per_second: int

    KEYS: ClassVar[Mapping[str, str]] = {"width": "hidden_size", "output_width": "out_hidden_size"}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "width": 3584,
        "output_width": 3584,
        "num_heads": 16,
        "patch_size": 14,
        "intermediate_size": 3420,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "tokens_per_second": 4,
    }
    ACTIVATION = "silu"

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size

    @property
    def window_cells(self) -> int:
        """Side of a window in tokens."""
        return self.window_size // MERGE // self.patch_size

    def check(self, where: str) -> None:
        super().check(where)
        check(
            self.window_cells > 0,
            where,
            f"'window_size' {self.window_size} is less than a token's {self.factor} pixels",
        )


@dataclasses.dataclass(frozen=True)
class Qwen25Config(ModelConfig):
    """Config of a Qwen2.5-VL. The decoder is that of Qwen2-VL."""

    visual: Qwen25VisionConfig

    MODEL_TYPE = "qwen2_5_vl"
    VISION = Qwen25VisionConfig

    def frame_position(self, pair: int, seconds: float) -> int:
        # In float32 as in the published code: the error of times in float64 must not change a whole number's floor.
        step = np.float32(seconds) * np.float32(self.visual.tokens_per_second)
        return int(np.float32(pair) * step)
