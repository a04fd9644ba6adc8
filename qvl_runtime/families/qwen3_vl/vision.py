"""The ViT of Qwen3-VL: learned positions, and features for the decoder's first layers (deepstack)."""

from __future__ import annotations

import functools

import numpy as np

from qvl_runtime.families.qwen2_vl.config import VISION_EPS
from qvl_runtime.families.qwen2_vl.tensors import VISUAL
from qvl_runtime.families.qwen2_vl.vision import ActivatedMlp, Attention, Merger, Mlp, VisionTower
from qvl_runtime.families.qwen3_vl.config import Qwen3VisionConfig
from qvl_runtime.families.qwen3_vl.learned_positions import interpolate
from qvl_runtime.families.qwen3_vl.tensors import LAYERS, POSITIONS, deepstack


class Qwen3Vision(VisionTower):
    """The vision tower of Qwen3-VL."""

    config: Qwen3VisionConfig

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Return learned positions, float32 ``[side * side, width]``."""
        return self.weights.vector(POSITIONS)

    def _attention(self, block: str) -> Attention:
        return Attention.load(self.weights, block, self.weights.layer_norm(f"{block}.norm1", VISION_EPS))

    def _mlp(self, block: str) -> Mlp:
        first, second = (self.weights.matrix(f"{block}.mlp.{name}") for name in LAYERS)
        return ActivatedMlp(self.weights.layer_norm(f"{block}.norm2", VISION_EPS), first, second, "gelu_tanh")

    def _merger(self, level: int) -> Merger:
        name = f"{VISUAL}.merger" if level == 0 else deepstack(level - 1)
        norm = self.weights.layer_norm(f"{name}.norm", VISION_EPS)
        return Merger.load(self.weights, name, norm, LAYERS, whole_cell=level > 0)

    def _positions(self, rows: int, columns: int) -> np.ndarray:
        return interpolate(self.table, rows, columns)

    def _level_behind(self, index: int) -> int | None:
        blocks = self.config.deepstack_visual_indexes
        return 1 + blocks.index(index) if index in blocks else None
