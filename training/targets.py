"""Targets for every cell of the feature grid, for training only: the contents of the cell and their box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from lexicon import CHARSET
from torch import nn

from qvl_runtime.demo.scenes import COLORS, SHAPES, Scene

KINDS, HUES, SIZES = len(SHAPES) + 2, len(COLORS) + 1, 3
"""Classes of a cell: nothing, the shapes, printed text; nothing, the colors; nothing, small, large."""
GLYPHS = len(CHARSET) + 1
PLACES = 24
"""Number of distinct places in the reading order."""
WIDTHS = {
    "shape": KINDS, "color": HUES, "size": SIZES, "box": 4, "digits": 80, "center": 1,
    "first": GLYPHS, "second": GLYPHS, "place": PLACES + 1,
}  # fmt: skip
CLASSES = {"shape": 0, "color": 1, "size": 2, "first": 8, "second": 9, "place": 10}
COLOR_NAMES = list(COLORS)


def cell_of(x: float, y: float, grid: int) -> tuple[int, int]:
    """Row and column of the cell that holds a point of the unit square."""
    return min(int(y * grid), grid - 1), min(int(x * grid), grid - 1)


def covered(box: Sequence[float], grid: int) -> np.ndarray:
    """The cells whose center, or the box's own center, lies in a box of the unit square: bool [grid, grid]."""
    x1, y1, x2, y2 = box
    centers = (np.arange(grid) + 0.5) / grid
    rows, columns = (centers > y1) & (centers < y2), (centers > x1) & (centers < x2)
    row, column = cell_of((x1 + x2) / 2, (y1 + y2) / 2, grid)
    rows[row], columns[column] = True, True
    return rows[:, None] & columns


def cell_targets(scene: Scene, grid: int) -> np.ndarray:
    """What every cell of the grid shows, float32 [grid * grid, 11].

    Shape, color, size; box x1 y1 x2 y2 of the thing (or the text's plate) that covers the cell, in the unit square;
    whether the thing's center lies here; the first and the second character whose center lies here, and the first
    one's place in the reading order. Zero is nothing, everywhere.
    """
    out = np.zeros((grid, grid, 11), np.float32)

    def fill(box: tuple[float, float, float, float], values: tuple[int, int, int]) -> None:
        x1, y1, x2, y2 = box
        out[covered(box, grid)] = (*values, *box, 0, 0, 0, 0)
        out[(*cell_of((x1 + x2) / 2, (y1 + y2) / 2, grid), 7)] = 1

    if scene.text:
        fill(scene.text.box, (KINDS - 1, 0, 0))
    for thing in scene.things:
        fill(
            thing.box, (SHAPES.index(thing.shape) + 1, COLOR_NAMES.index(thing.color) + 1, 1 + (thing.size == "large"))
        )
    if scene.text:
        for place, (char, x, y) in enumerate(scene.text.marks):
            cell = out[cell_of(x, y, grid)]
            if not cell[8]:
                cell[8], cell[10] = CHARSET.index(char) + 1, min(place + 1, PLACES)
            elif not cell[9]:
                cell[9] = CHARSET.index(char) + 1
    return out.reshape(grid * grid, -1)


def box_digits(box: torch.Tensor) -> torch.Tensor:
    """The tens and the units, as they are written in an answer, of unit-square boxes [..., 4]: int64 [..., 8]."""
    hundredths = (box * 100).round().clamp(0, 99).long()
    return torch.cat([hundredths // 10, hundredths % 10], -1)


class CellHead(nn.Linear):
    """A linear probe from a cell's feature to its targets.

    A box is predicted as numbers and as the digits of an answer: the decoder can copy what the probe can read from a
    feature.
    """

    def __init__(self, width: int):
        super().__init__(width, sum(WIDTHS.values()))

    def loss(self, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, str]:
        """The summed losses over features [N, cells, width], and accuracies for the log."""
        said = dict(zip(WIDTHS, self(features.float()).split(list(WIDTHS.values()), -1)))
        index = {k: target[..., i].long() for k, i in CLASSES.items()}
        filled, marked = target[..., 0] > 0, target[..., 8] > 0
        parts = [balanced(said[k], index[k]) for k in ("shape", "color", "size", "first")]
        box, true_box = said["box"][filled], target[..., 3:7][filled]
        parts.append(F.smooth_l1_loss(box, true_box, beta=0.02) * 40)
        digits, true_digits = said["digits"][filled].unflatten(-1, (8, 10)), box_digits(true_box)
        parts.append(F.cross_entropy(digits.flatten(0, 1), true_digits.flatten()))
        parts.append(F.binary_cross_entropy_with_logits(said["center"][..., 0], target[..., 7]) * 4)
        if marked.any():
            parts += [F.cross_entropy(said[k][marked], index[k][marked]) * 0.5 for k in ("second", "place")]
        right = (digits.argmax(-1) == true_digits).float()
        log = {
            **{k: (said[k].argmax(-1) == index[k])[filled].float().mean() for k in ("shape", "color")},
            "box": (box - true_box).abs().mean(),
            "tens": right[:, :4].mean(),
            "units": right[:, 4:].mean(),
            **{k: (said[k].argmax(-1) == index[k])[marked].float().mean() for k in ("first", "second", "place")},
        }
        return torch.stack(parts).sum(), " ".join(f"{k} {v.item():.3f}" for k, v in log.items())


def balanced(scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where class 0 (nothing) and all others count half each."""
    loss = F.cross_entropy(scores.flatten(0, -2), index.flatten(), reduction="none")
    empty = (index == 0).flatten()
    return (loss * empty).sum() / (empty.sum() + 1) / 2 + (loss * ~empty).sum() / ((~empty).sum() + 1)
