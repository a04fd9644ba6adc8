"""The box notation of Qwen3-VL: that of Qwen2.5-VL with coordinates in thousandths of the picture."""

from __future__ import annotations

from collections.abc import Sequence

from qvl_runtime.families.qwen2_5_vl.grounding import JsonGrounding
from qvl_runtime.inputs.pictures import Picture


class RelativeGrounding(JsonGrounding):
    """`qvl_runtime.families.base.Grounding` for coordinates from 0 to 1000."""

    NUMBER = "(0|[1-9][0-9]{0,2}|1000)"
    LONGEST = "1000"

    def scale(self, pictures: Sequence[Picture]) -> tuple[int, int]:
        return (1000, 1000)
