"""Scores of answers: the value of every unit of a task, and their combination."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qvl_runtime.evaluation.data import LETTERS, Sample
from qvl_runtime.evaluation.metrics.boxes import first_box, hit
from qvl_runtime.evaluation.metrics.cider import cider
from qvl_runtime.evaluation.metrics.text import anls, exact_match, relaxed_match, says, short_answer
from qvl_runtime.evaluation.metrics.vqa import vqa_accuracy

Answer = Mapping[str, Any]
"""A line of the file of answers: ``text``; ``boxes``, relative to the picture's size, if the family's notation differs
from Qwen-VL's; or ``likelihoods``, one mean log probability per option."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a model in a task.

    Attributes
    ----------
    values : numpy.ndarray
        float64 ``[units]``: points of every unit, in order.
    groups : numpy.ndarray
        int64 ``[units]``: the group of each unit.
    names : list of str
        Names of the groups.
    combine : str
        "mean" of all units; "mean of groups" or "sum of groups" of the groups' means.
    note : str
        How the scores were computed, if that depends on the machine.
    """

    values: np.ndarray
    groups: np.ndarray
    names: list[str]
    combine: str
    note: str = ""

    @property
    def total(self) -> float:
        return float(total(self.values[None], self.groups, self.combine)[0])

    @property
    def parts(self) -> dict[str, float]:
        """Return the score of every group, if there are several."""
        if len(self.names) < 2:
            return {}
        return {name: float(self.values[self.groups == i].mean()) for i, name in enumerate(self.names)}


def total(values: np.ndarray, groups: np.ndarray, combine: str) -> np.ndarray:
    """Compute the score of ``[rows, units]`` values: float64 ``[rows]``."""
    if combine == "mean":
        return values.mean(axis=1)
    means = np.stack([values[:, groups == group].mean(axis=1) for group in np.unique(groups)], axis=1)
    return means.sum(axis=1) if combine == "sum of groups" else means.mean(axis=1)


def by_unit(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the sample indices of every unit; a sample without a unit is its own unit."""
    units: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        units[sample.unit or sample.id].append(place)
    return units


Score = Callable[[Sequence[Sample], Sequence[Answer]], Scores]


def _scores(
    samples: Sequence[Sample],
    values: Sequence[float],
    combine: str,
    join: Callable[[list[float]], float],
    note: str = "",
) -> Scores:
    units = by_unit(samples)
    names = sorted({sample.group for sample in samples})
    points = [join([values[place] for place in places]) for places in units.values()]
    groups = [names.index(samples[places[0]].group) for places in units.values()]
    return Scores(np.array(points, np.float64), np.array(groups, np.int64), names, combine, note)


def each(value: Callable[[Answer, Any], float], combine: str = "mean", points: float = 100.0) -> Score:
    """Return a score: the mean of `value` over samples, times `points`."""

    def score(samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
        values = [value(answer, sample.truth) for sample, answer in zip(samples, answers, strict=True)]
        return _scores(samples, values, combine, lambda found: points * found[0])

    return score


def captions(samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
    """CIDEr x 100."""
    found, tokenizer = cider([answer["text"] for answer in answers], [sample.truth for sample in samples])
    return _scores(samples, [float(v) for v in found], "mean", lambda v: 100 * v[0], f"tokenizer: {tokenizer}")


def people(answer: Answer, truth: Any) -> float:
    return vqa_accuracy(answer["text"], truth)


def exact(answer: Answer, truth: Any) -> float:
    return exact_match(answer["text"], truth)


def short(answer: Answer, truth: Any) -> float:
    return exact_match(short_answer(answer["text"]), truth)


def relaxed(answer: Answer, truth: Any) -> float:
    return relaxed_match(answer["text"], truth)


def document(answer: Answer, truth: Any) -> float:
    return anls(answer["text"], truth)


def box(answer: Answer, truth: Any) -> float:
    """Whether the first box of an answer matches the reference."""
    width, height = truth["size"]
    if "boxes" not in answer:
        return hit(first_box(answer["text"], width, height), truth["box"])
    shares = answer["boxes"][0] if answer["boxes"] else [0.0] * 4
    return hit([share * side for share, side in zip(shares, (width, height) * 2)], truth["box"])


def option(answer: Answer, truth: Any) -> float:
    """Whether the most likely option is correct; ties go to the first option."""
    return float(LETTERS[int(np.argmax(answer["likelihoods"]))] == truth)


def every_turn(samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
    """MMBench: a question counts if it is correct in all rotations of its options."""
    values = [option(answer, sample.truth) for sample, answer in zip(samples, answers, strict=True)]
    return _scores(samples, values, "mean", lambda found: 100 * min(found))


def both_questions(samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
    """MME: accuracy of questions plus that of pictures with both correct, 200 points per subtask."""
    values = [float(says(a["text"]) == sample.truth) for sample, a in zip(samples, answers, strict=True)]
    return _scores(
        samples, values, "sum of groups", lambda found: 100 * (sum(found) / len(found) + float(min(found) == 1))
    )
