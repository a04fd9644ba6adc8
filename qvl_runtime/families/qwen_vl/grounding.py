"""The box notation of Qwen-VL: ``<ref>dog</ref><box>(10,20),(300,400)</box>``, in thousandths of the picture."""

from __future__ import annotations

import re

from qvl_runtime.boxes import Box
from qvl_runtime.families.tagged_boxes import TaggedGrounding

GROUNDING = TaggedGrounding(
    "<ref>", "</ref>", "<box>", "</box>", re.compile(r"<(ref|box|quad|img)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)
)


def format_box(box: Box) -> str:
    """Format a box in the model's notation: ``<ref>dog</ref><box>(10,20),(300,400)</box>``."""
    ref = "" if box.ref is None else f"<ref>{box.ref}</ref>"
    return f"{ref}<box>({box.x1},{box.y1}),({box.x2},{box.y2})</box>"
