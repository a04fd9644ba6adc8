"""The ViT of Qwen2.5-VL: windows, RMSNorms and a SwiGLU with biases."""

from __future__ import annotations

import dataclasses

import numpy as np

from qvl_kernels.ops import Norm, Ops, Weight
from qvl_runtime.families.qwen2_5_vl.config import Qwen25VisionConfig
from qvl_runtime.families.qwen2_5_vl.windows import windows
from qvl_runtime.families.qwen2_vl.config import VISION_EPS
from qvl_runtime.families.qwen2_vl.tensors import VISUAL
from qvl_runtime.families.qwen2_vl.vision import Attention, Merger, Mlp, VisionTower, Workspace


@dataclasses.dataclass(frozen=True, eq=False)
class GatedMlp:
    """A SwiGLU feed-forward after a norm."""

    norm: Norm
    gate: Weight
    up: Weight
    down: Weight

    def __call__(self, ops: Ops, work: Workspace) -> None:
        ops.gate_up(work.x, self.gate, self.up, out=work.hidden, norm=self.norm)
        ops.linear(work.hidden, self.down, out=work.x, residual=work.x)


class Qwen25Vision(VisionTower):
    """The vision tower of Qwen2.5-VL."""

    config: Qwen25VisionConfig

    def _attention(self, block: str) -> Attention:
        return Attention.load(self.weights, block, self.weights.rms_norm(f"{block}.norm1", VISION_EPS))

    def _mlp(self, block: str) -> Mlp:
        layers = (self.weights.matrix(f"{block}.mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
        return GatedMlp(self.weights.rms_norm(f"{block}.norm2", VISION_EPS), *layers)

    def _merger(self, level: int) -> Merger:
        name = f"{VISUAL}.merger"
        return Merger.load(self.weights, name, self.weights.rms_norm(f"{name}.ln_q", VISION_EPS), ("mlp.0", "mlp.2"))

    def _order(self, rows: int, columns: int) -> tuple[np.ndarray | None, np.ndarray]:
        return windows(rows, columns, self.config.window_cells)

    def _windowed(self, index: int) -> bool:
        return index not in self.config.fullatt_block_indexes
