"""Comparison of models: scores, differences from the first with intervals, time, memory, published scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvl_runtime.evaluation.scores import Scores, total

DRAWS = 1000
CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Attributes
    ----------
    name : str
    score : float
    interval : (float, float)
        95% confidence interval of the score.
    difference : float or None
        Difference from the first model; None for the first.
    difference_interval : (float, float) or None
        95% confidence interval of the difference (paired bootstrap).
    parts : dict
        The score of every group, if the task has several.
    seconds : float
    peak_memory : int or None
        Bytes.
    size : int
        File size in bytes.
    """

    name: str
    score: float
    interval: Interval
    difference: float | None
    difference_interval: Interval | None
    parts: dict[str, float]
    seconds: float
    peak_memory: int | None
    size: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resampled(scores: Sequence[Scores], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Compute bootstrap scores, with replacement within each group: float64 ``[models, draws]``.

    All models use the same samples, so that differences of rows are paired.
    """
    values, groups = np.stack([one.values for one in scores]), scores[0].groups
    random, places = np.random.default_rng(seed), [np.flatnonzero(groups == g) for g in np.unique(groups)]
    drawn_groups = np.concatenate([np.full(len(place), g) for g, place in enumerate(places)])
    found = np.empty((len(scores), draws))
    for draw in range(draws):
        chosen = np.concatenate([random.choice(place, len(place)) for place in places])
        found[:, draw] = total(values[:, chosen], drawn_groups, scores[0].combine)
    return found


def interval(values: np.ndarray) -> Interval:
    """Return the central `CONFIDENCE` interval of some values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def compare(
    names: Sequence[str],
    scores: Sequence[Scores],
    seconds: Sequence[float],
    memory: Sequence[int | None],
    sizes: Sequence[int],
    *,
    seed: int = 0,
) -> list[Row]:
    """Return the rows of a comparison. All models must have answered the same questions."""
    drawn = resampled(scores, seed=seed)
    return [
        Row(
            name=name,
            score=scores[i].total,
            interval=interval(drawn[i]),
            difference=scores[i].total - scores[0].total if i else None,
            difference_interval=interval(drawn[i] - drawn[0]) if i else None,
            parts=scores[i].parts,
            seconds=seconds[i],
            peak_memory=memory[i],
            size=sizes[i],
        )
        for i, name in enumerate(names)
    ]
