"""Training-only targets for every cell of the feature grid: what lies there and where its box ends."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lexicon import CHARSET
from torch import nn

from qvl_runtime.demo.scenes import COLORS, SHAPES, Scene

KINDS, HUES, SIZES = len(SHAPES) + 1, len(COLORS) + 1, 3
WIDTHS = (KINDS, HUES, SIZES, 4, 1, len(CHARSET) + 1)
COLOR_NAMES = list(COLORS)


def cell_targets(scene: Scene, grid: int) -> np.ndarray:
    """Float32 [grid * grid, 8 + charset]: shape, colour, size, box minus cell centre, centre flag, characters."""
    out = np.zeros((grid, grid, 8 + len(CHARSET)), np.float32)
    centres = (np.arange(grid) + 0.5) / grid
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        columns = (centres > x1) & (centres < x2)
        rows = (centres > y1) & (centres < y2)
        column, row = (min(int(c * grid), grid - 1) for c in thing.center)
        columns[column], rows[row] = True, True
        area = np.ix_(rows, columns)
        out[..., 0][area] = SHAPES.index(thing.shape) + 1
        out[..., 1][area] = COLOR_NAMES.index(thing.color) + 1
        out[..., 2][area] = 1 + (thing.size == "large")
        out[..., 3][area], out[..., 5][area] = (
            np.broadcast_to(v - centres[columns], (rows.sum(), columns.sum())) for v in (x1, x2)
        )
        out[..., 4][area], out[..., 6][area] = (
            np.broadcast_to((v - centres[rows])[:, None], (rows.sum(), columns.sum())) for v in (y1, y2)
        )
        out[row, column, 7] = 1
    if scene.text:
        for char, x, y in scene.text.marks:
            out[int(y * grid), int(x * grid), 8 + CHARSET.index(char)] = 1
    return out.reshape(grid * grid, -1)


class CellHead(nn.Linear):
    """A linear probe from a cell's feature to its targets."""

    def __init__(self, width: int):
        super().__init__(width, sum(WIDTHS))

    def loss(self, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, str]:
        """The summed losses over features [N, cells, width], and accuracies for the log."""
        shape, color, size, box, centre, chars = self(features.float()).split(WIDTHS, -1)
        index, filled = target[..., :3].long(), target[..., 0] > 0
        parts = [balanced(F.one_hot(index[..., i], x.shape[-1]).float(), x) for i, x in enumerate((shape, color, size))]
        parts.append(F.smooth_l1_loss(box[filled], target[..., 3:7][filled], beta=0.02) * 10)
        parts.append(F.binary_cross_entropy_with_logits(centre[..., 0], target[..., 7]) * 4)
        marks = torch.cat([(target[..., 8:].sum(-1, keepdim=True) == 0).float(), target[..., 8:]], -1)
        parts.append(balanced(marks / marks.sum(-1, keepdim=True), chars))
        marked = target[..., 8:].sum(-1) == 1
        log = {
            "shape": (shape.argmax(-1) == index[..., 0])[filled].float().mean().item(),
            "color": (color.argmax(-1) == index[..., 1])[filled].float().mean().item(),
            "box": (box[filled] - target[..., 3:7][filled]).abs().mean().item(),
            "centre": ((centre[..., 0] > 0) == (target[..., 7] > 0)).all(-1).float().mean().item(),
            "char": (chars.argmax(-1) == marks.argmax(-1))[marked].float().mean().item(),
        }
        return torch.stack(parts).sum(), " ".join(f"{k} {v:.3f}" for k, v in log.items())


def balanced(target: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against target distributions, where class 0 (nothing) and all others count half each."""
    loss = -(target * scores.log_softmax(-1)).sum(-1)
    empty = target[..., 0]
    return (loss * empty).sum() / (empty.sum() + 1) / 2 + (loss * (1 - empty)).sum() / ((1 - empty).sum() + 1)
