"""The box notation of Qwen2-VL: that of Qwen-VL with other tags."""

from __future__ import annotations

import re

from qvl_runtime.families.tagged_boxes import TaggedGrounding

GROUNDING = TaggedGrounding(
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    re.compile(r"<\|(object_ref|box|quad)_start\|>((?:(?!<\|\1_start\|>).)*?)<\|\1_end\|>", re.DOTALL),
)
