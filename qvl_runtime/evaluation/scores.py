"""From answers to a score: the value of every unit of a task, and what they make together."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qvl_runtime.evaluation.data import Sample
from qvl_runtime.evaluation.metrics.boxes import first_box, hit
from qvl_runtime.evaluation.metrics.cider import cider
from qvl_runtime.evaluation.metrics.text import anls, exact_match, relaxed_match, says, short_answer
from qvl_runtime.evaluation.metrics.vqa import vqa_accuracy

Answer = Mapping[str, Any]
"""A line of the file of answers: ``text``; ``boxes``, as shares of the picture's sides, where the family writes them
in another way than Qwen-VL; or ``likelihoods``, one mean log probability an option."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model reached in a task.

    Attributes
    ----------
    values : numpy.ndarray
        float64 ``[units]``: points of every unit, in the order of `units`.
    groups : numpy.ndarray
        int64 ``[units]``: the group of each.
    names : list of str
        Of the groups.
    combine : str
        "mean" of all units; or of every group, and then the "mean of groups" or "sum of groups".
    note : str
        How it was computed, where that may differ from machine to machine.
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
        """The score of every group, where there are several."""
        if len(self.names) < 2:
            return {}
        return {name: float(self.values[self.groups == i].mean()) for i, name in enumerate(self.names)}


def total(values: np.ndarray, groups: np.ndarray, combine: str) -> np.ndarray:
    """The score of ``[rows, units]`` values: float64 ``[rows]``."""
    if combine == "mean":
        return values.mean(axis=1)
    means = np.stack([values[:, groups == group].mean(axis=1) for group in np.unique(groups)], axis=1)
    return means.sum(axis=1) if combine == "sum of groups" else means.mean(axis=1)


def by_unit(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """The samples of every unit, by their places; a sample without a unit is one by itself."""
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
    """The mean of a value a sample, times `points`."""

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
    """Whether the first box of an answer is the true one."""
    width, height = truth["size"]
    if "boxes" not in answer:
        return hit(first_box(answer["text"], width, height), truth["box"])
    shares = answer["boxes"][0] if answer["boxes"] else [0.0] * 4
    return hit([share * side for share, side in zip(shares, (width, height) * 2)], truth["box"])


def option(answer: Answer, truth: Any) -> float:
    """Whether the likeliest option is the right one; the first of equally likely ones counts."""
    return float("ABCDE"[int(np.argmax(answer["likelihoods"]))] == truth)


def every_turn(samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
    """A question counts when all its turns are answered right."""
    values = [option(answer, sample.truth) for sample, answer in zip(samples, answers, strict=True)]
    return _scores(samples, values, "mean", lambda found: 100 * min(found))


def both_questions(samples: Sequence[Sample], answers: Sequence[Answer]) -> Scores:
    """MME: accuracy over questions and over pictures with both right, 200 points a subtask together."""
    values = [float(says(a["text"]) == sample.truth) for sample, a in zip(samples, answers, strict=True)]
    return _scores(
        samples, values, "sum of groups", lambda found: 100 * (sum(found) / len(found) + float(min(found) == 1))
    )
