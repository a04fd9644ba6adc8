"""Decide whether an answer is right: exact match, or for boxes an IoU of at least 0.5 and the same names."""

from __future__ import annotations

from qvl_runtime.boxes import iou
from qvl_runtime.families.qwen_vl.grounding import GROUNDING

MIN_IOU = 0.5


def overlaps(answer: str, truth: str) -> list[float]:
    """IoU of each true box with the answer's box of the same index.

    0 if there is none, the names differ, or its corners are in the wrong order.
    """
    wanted, found = GROUNDING.parse(truth), GROUNDING.parse(answer)
    scores = [
        iou(box, true) if box.ref == true.ref and box.x1 < box.x2 and box.y1 < box.y2 else 0.0
        for true, box in zip(wanted, found)
    ]
    return [*scores, *[0.0] * (len(wanted) - len(scores))]


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer is right: all boxes and no others, or the same text."""
    if "<box>" not in truth:
        return answer.strip() == truth
    return len(GROUNDING.parse(answer)) == len(GROUNDING.parse(truth)) and min(overlaps(answer, truth)) >= MIN_IOU
