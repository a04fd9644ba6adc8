"""The family of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.families.base import Family
from qvl_runtime.families.qwen2_5_vl.config import Qwen25Config
from qvl_runtime.families.qwen2_5_vl.grounding import JsonGrounding
from qvl_runtime.families.qwen2_5_vl.tensors import tensors
from qvl_runtime.families.qwen2_5_vl.vision import Qwen25Vision
from qvl_runtime.families.qwen2_vl.family import QwenFamily
from qvl_runtime.families.specs import TensorSpec
from qvl_runtime.inputs.tokenizer import Tokenizer


class Qwen25VL(QwenFamily[Qwen25Config]):
    """`qvl_runtime.families.base.Family`."""

    TITLE = "Qwen2.5-VL"
    CLASS = "Qwen2_5_VL"
    CONFIG = Qwen25Config
    VISION = Qwen25Vision
    grounding = JsonGrounding()

    def tensors(self, config: Qwen25Config) -> Iterator[TensorSpec]:
        return tensors(config)


FAMILY: Family[Qwen25Config, Tokenizer] = Qwen25VL()
