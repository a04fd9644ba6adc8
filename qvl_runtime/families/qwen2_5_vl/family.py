"""Qwen2.5-VL as a family."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.families.qwen2_5_vl.config import Qwen25Config
from qvl_runtime.families.qwen2_5_vl.grounding import JsonGrounding
from qvl_runtime.families.qwen2_5_vl.tensors import tensors
from qvl_runtime.families.qwen2_5_vl.vision import Qwen25Vision
from qvl_runtime.families.qwen2_vl.family import Qwen2VL
from qvl_runtime.families.specs import TensorSpec


class Qwen25VL(Qwen2VL):
    """`qvl_runtime.families.base.Family`."""

    TITLE = "Qwen2.5-VL"
    CONFIG = Qwen25Config
    VISION = Qwen25Vision
    grounding = JsonGrounding()

    def tensors(self, config: Qwen25Config) -> Iterator[TensorSpec]:
        return tensors(config)


FAMILY = Qwen25VL()
