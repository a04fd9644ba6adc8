"""Comparison of the answers of a quantized model with those of its original.

The original's greedy answers are computed by speculative decoding: the quantized model drafts an answer, one walk of
the original verifies all of it, and the quantized model drafts again from the first difference. The result equals the
original's own answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qvl_convert.calibration import Sample
from qvl_convert.progress import Progress
from qvl_convert.walk import PICTURE_STAGES, Walk, stages
from qvl_runtime.boxes import iou
from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.metrics.text import edit_distance
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.prompt import Slot
from qvl_runtime.model import Model

MAX_ROUNDS = 12


@dataclasses.dataclass
class Answers:
    """Differences of greedy answers to the same prompts.

    Attributes
    ----------
    count, same : int
        Numbers of compared and of equal answers.
    first_difference : list of int
        Tokens before the first difference, for each unequal answer.
    edit_distance : float
        Mean Levenshtein distance divided by the longer text's length.
    boxes : int
        Number of boxes; for each pair the larger number.
    iou_median, iou_p10, iou_under_half : float or None
        Intersection over union of boxes in order (0 for an unmatched box), and the share below 0.5.
    unfinished : int
        Answers left out because the models differed too often.
    """

    count: int
    same: int
    first_difference: list[int]
    edit_distance: float
    boxes: int
    iou_median: float | None
    iou_p10: float | None
    iou_under_half: float | None
    unfinished: int


@dataclasses.dataclass
class _Answer:
    """A prompt and the answers of both models.

    Attributes
    ----------
    first : list of int
        The quantized model's answer, without the stop token.
    agreed, draft : list of int
        The verified prefix of the original's answer, and the quantized model's draft of the rest.
    done : bool
        Whether `agreed` is the original's whole answer.
    """

    sample: Sample
    first: list[int]
    agreed: list[int]
    draft: list[int]
    done: bool = False

    @property
    def ids(self) -> list[int]:
        return self.sample.ids + self.agreed + self.draft

    @property
    def slots(self) -> list[Slot]:
        return self.sample.slots


def compare_answers(
    model: Model,
    reference: Weights,
    samples: Sequence[Sample],
    features: Sequence[np.ndarray],
    max_new_tokens: int,
    progress: Progress,
) -> Answers:
    """Answer the last question of every sample with both models.

    Parameters
    ----------
    model : Model
        The quantized model.
    reference : Weights
        The original's weights.
    samples : sequence of Sample
        Samples with ``asked == 0`` are skipped.
    features : sequence of ndarray
        The original's features of the pictures of all samples, in order.
    max_new_tokens : int
    progress : callable
    """
    answers, seen, left = [], [], list(features)
    for sample in samples:
        mine, left = left[: len(sample.slots)], left[len(sample.slots) :]
        if not sample.asked:
            continue
        slots = [slot for slot in sample.slots if slot.end <= sample.asked]
        prompt = Sample(sample.ids[: sample.asked], slots)
        draft = _propose(model, prompt, [], max_new_tokens)
        answers.append(_Answer(prompt, draft, [], draft))
        seen.append(mine[: len(slots)])
    for round_ in range(MAX_ROUNDS):
        going = [i for i, answer in enumerate(answers) if not answer.done]
        progress(f"answers, {len(going)} open", round_, MAX_ROUNDS)
        if not going:
            break
        _check(model, reference, [answers[i] for i in going], [f for i in going for f in seen[i]], max_new_tokens)
        for i in going:
            if not answers[i].done:
                answers[i].draft = _propose(model, answers[i].sample, answers[i].agreed, max_new_tokens)
    return _summary([answer for answer in answers if answer.done], len(answers), model)


def _propose(model: Model, prompt: Sample, agreed: list[int], limit: int) -> list[int]:
    """Draft with the quantized model, without the stop token."""
    room = limit - len(agreed)
    try:
        result = model.generate(prompt.ids + agreed, prompt.images, max_new_tokens=room, temperature=0)
    except QvlError:  # an untrained model may generate a picture's placeholder, which is invalid in a prompt
        return []
    return result.token_ids


def _check(model: Model, weights: Weights, answers: list[_Answer], features: list[np.ndarray], limit: int) -> None:
    """Extend `agreed` by the original's tokens, up to the first difference from the draft."""
    family, config, stops = model.blob.family, weights.config, model.stop_ids
    walk = Walk(weights.ops, family, config, answers)
    for target, values in zip(walk.features, features):
        target[...] = values
    for stage in stages(family, config):
        if stage.kind not in PICTURE_STAGES:
            walk.run(stage, weights)
    head = weights.matrix(family.decoder_names(config).head)
    for i, answer in enumerate(answers):
        first = len(answer.sample.ids) + len(answer.agreed) - 1
        said = np.concatenate([part.argmax(1) for part in walk.logits(head, i, first)])
        for token, proposed in zip(said.tolist(), [*answer.draft, None]):
            if len(answer.agreed) == limit:
                break
            answer.agreed.append(token)
            if token in stops or token != proposed:
                break
        answer.done = len(answer.agreed) == limit or answer.agreed[-1] in stops


def _summary(answers: list[_Answer], count: int, model: Model) -> Answers:
    tokenizer, stops, parse = model.tokenizer, model.stop_ids, model.blob.family.grounding.parse
    differences, distances, overlaps = [], [], []
    for answer in answers:
        ours, theirs = answer.first, _without_stop(answer.agreed, stops)
        texts = [tokenizer.decode(ids) for ids in (ours, theirs)]
        if ours != theirs:
            pairs = zip([*ours, None], [*theirs, None])
            differences.append(next(i for i, (a, b) in enumerate(pairs) if a != b))
        distances.append(edit_distance(*texts) / max(1, *map(len, texts)))
        pictures = [slot.picture for slot in answer.slots]
        boxes = [parse(text, pictures) for text in texts]
        overlaps += [iou(a, b) for a, b in zip(*boxes)]
        overlaps += [0.0] * abs(len(boxes[0]) - len(boxes[1]))
    return Answers(
        count=len(answers),
        same=len(answers) - len(differences),
        first_difference=differences,
        edit_distance=float(np.mean(distances)) if distances else 0.0,
        boxes=len(overlaps),
        iou_median=float(np.median(overlaps)) if overlaps else None,
        iou_p10=float(np.percentile(overlaps, 10)) if overlaps else None,
        iou_under_half=float(np.mean(np.array(overlaps) < 0.5)) if overlaps else None,
        unfinished=count - len(answers),
    )


def _without_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stops else ids
