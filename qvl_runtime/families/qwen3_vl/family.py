"""The family of Qwen3-VL."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.families.base import Family
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.qwen2_vl.family import QwenFamily
from qvl_runtime.families.qwen2_vl.preprocessing import VideoLimits
from qvl_runtime.families.qwen3_vl.calling import CALLING
from qvl_runtime.families.qwen3_vl.config import Qwen3Config
from qvl_runtime.families.qwen3_vl.grounding import RelativeGrounding
from qvl_runtime.families.qwen3_vl.template import Qwen3Template
from qvl_runtime.families.qwen3_vl.tensors import deepstack_level, tensors
from qvl_runtime.families.qwen3_vl.vision import Qwen3Vision
from qvl_runtime.families.specs import MatrixSpec, TensorSpec
from qvl_runtime.inputs.tokenizer import Tokenizer


class Qwen3VL(QwenFamily[Qwen3Config]):
    """`qvl_runtime.families.base.Family`."""

    TITLE = "Qwen3-VL"
    CLASS = "Qwen3VL"
    CONFIG = Qwen3Config
    VISION = Qwen3Vision
    VIDEO = VideoLimits(4096, 25165824, whole=True)
    grounding = RelativeGrounding()
    calling = CALLING

    def title(self, config: Qwen3Config, generation: GenerationConfig) -> str:
        return f"{self.TITLE}-Thinking" if generation.thinking else self.TITLE

    def tensors(self, config: Qwen3Config) -> Iterator[TensorSpec]:
        return tensors(config)

    def stage_of(self, spec: MatrixSpec) -> tuple[str, int]:
        level = deepstack_level(spec.name)
        return super().stage_of(spec) if level is None else ("adapter", level)

    def template(self, generation: GenerationConfig) -> Qwen3Template:
        return Qwen3Template(generation.thinking)


FAMILY: Family[Qwen3Config, Tokenizer] = Qwen3VL()
