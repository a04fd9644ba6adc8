"""Decide whether an answer is right: exact match, or for boxes an IoU of at least 0.5 and the same names."""

from __future__ import annotations

from qvl_runtime.boxes import Box
from qvl_runtime.families.qwen_vl.grounding import GROUNDING

MIN_IOU = 0.5


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 for a box whose corners are in the wrong order."""
    w, h = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - w * h)


def overlaps(answer: str, truth: str) -> list[float]:
    """IoU of each true box with the answer's box of the same index; 0 if the names differ or there is none."""
    wanted, found = GROUNDING.parse(truth), GROUNDING.parse(answer)
    scores = [iou(box, true) if box.ref == true.ref else 0.0 for true, box in zip(wanted, found)]
    return [*scores, *[0.0] * (len(wanted) - len(scores))]


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer is right: all boxes and no others, or the same text."""
    if "<box>" not in truth:
        return answer.strip() == truth
    return len(GROUNDING.parse(answer)) == len(GROUNDING.parse(truth)) and min(overlaps(answer, truth)) >= MIN_IOU
