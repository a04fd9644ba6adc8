"""The tasks: files, prompt, answer length, metric, and published scores of the originals."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation import readers, scores
from qvl_runtime.evaluation.metrics import cider
from qvl_runtime.evaluation.readers import Read
from qvl_runtime.evaluation.scores import Score

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclasses.dataclass(frozen=True)
class Task:
    """A published task.

    Attributes
    ----------
    title : str
    metric : str
        Display name of the metric.
    read : callable
        Reads the samples from files below the data folder.
    prompt : str
        A kind of `prompts`.
    score : callable or None
        None for a task that only exports its answers.
    longest, shortest : int
        Limits of an answer in tokens; 0 for a task scored by likelihood.
    published : dict
        Scores of the originals, by model.
    split : str
        The part of the data of the published scores, if different.
    check : callable
        Raises a QvlError if the metric cannot be computed here; called before hours of work.
    """

    title: str
    metric: str
    read: Read
    prompt: str
    score: Score | None
    longest: int = 0
    shortest: int = 0
    published: dict[str, float] = dataclasses.field(default_factory=dict)
    split: str = ""
    check: Callable[[], None] = lambda: None


def _both(base: float, chat: float) -> dict[str, float]:
    return {"Qwen-VL": base, "Qwen-VL-Chat": chat}


def _caption(title: str, name: str, base: float, chat: float) -> Task:
    read, published = readers.captions(name), _both(base, chat)
    return Task(title, "CIDEr", read, "caption", scores.captions, 30, 8, published, check=cider.check)


def _people(title: str, name: str, questions: str, published: dict[str, float], split: str = "") -> Task:
    read = readers.annotated(f"{name}.jsonl", questions)
    return Task(title, "VQA accuracy", read, "question", scores.each(scores.people), 10, 1, published, split)


def _phrases(title: str, name: str, base: float, chat: float) -> Task:
    read, published = readers.phrases(f"{name}.jsonl"), _both(base, chat)
    return Task(title, "IoU >= 0.5", read, "phrase", scores.each(scores.box), 28, 10, published)


def _mme(title: str, subtasks: tuple[str, ...], chat: float) -> Task:
    read = readers.yes_no("mme", subtasks)
    published = {"Qwen-VL-Chat": chat}
    return Task(title, "points", read, "yes or no", scores.both_questions, 512, published=published)


TASKS = {
    "flickr30k": _caption("Flickr30K, Karpathy's test", "flickr30k/flickr30k_karpathy_test.json", 85.8, 81.0),
    "nocaps": _caption("NoCaps, val", "nocaps/nocaps_val.json", 121.4, 120.2),
    "vqav2": _people(
        "VQAv2, val", "vqav2/vqav2_val", "vqav2/v2_mscoco_val2014_annotations.json", _both(78.8, 78.2), "test-dev"
    ),
    "okvqa": _people("OK-VQA, val", "okvqa/okvqa_val", "okvqa/mscoco_val2014_annotations.json", _both(58.6, 56.6)),
    "textvqa": _people(
        "TextVQA, val", "textvqa/textvqa_val", "textvqa/textvqa_val_annotations.json", {"Qwen-VL": 63.8}
    ),
    "vizwiz": _people(
        "VizWiz, val", "vizwiz/vizwiz_val", "vizwiz/vizwiz_val_annotations.json", _both(35.2, 38.9), "test-dev"
    ),
    "gqa": Task(
        "GQA, balanced test-dev", "accuracy", readers.questions("gqa/testdev_balanced.jsonl"), "question",
        scores.each(scores.short), 10, 1, _both(59.3, 57.5),
    ),
    "ocrvqa": Task(
        "OCR-VQA, test", "accuracy", readers.questions("ocrvqa/ocrvqa_test.jsonl"), "question",
        scores.each(scores.exact), 100, 1, {"Qwen-VL": 75.7},
    ),
    "ai2d": Task(
        "AI2D, test", "accuracy", readers.questions("ai2diagram/test.jsonl"), "question",
        scores.each(scores.exact), 10, 1, {"Qwen-VL": 62.3},
    ),
    "scienceqa": Task(
        "ScienceQA with pictures, test", "accuracy", readers.choices("scienceqa/scienceqa_test_img.jsonl"), "choice",
        scores.each(scores.option), published=_both(67.1, 68.2),
    ),
    "docvqa": Task(
        "DocVQA, val", "ANLS x 100", readers.documents("docvqa/val.jsonl", "docvqa/val/val_v1.0.json"), "question",
        scores.each(scores.document), 100, 1, {"Qwen-VL": 65.1}, "test",
    ),
    "chartqa": Task(
        "ChartQA, test", "relaxed accuracy, mean of its halves",
        readers.halves(human="chartqa/test_human.jsonl", augmented="chartqa/test_augmented.jsonl"), "question",
        scores.each(scores.relaxed, "mean of groups"), 100, 1, {"Qwen-VL": 65.7},
    ),
    "refcoco_val": _phrases("RefCOCO, val", "refcoco/refcoco_val", 89.36, 88.55),
    "refcoco_testA": _phrases("RefCOCO, test A", "refcoco/refcoco_testA", 92.26, 92.27),
    "refcoco_testB": _phrases("RefCOCO, test B", "refcoco/refcoco_testB", 85.34, 84.51),
    "refcoco+_val": _phrases("RefCOCO+, val", "refcoco+/refcoco+_val", 83.12, 82.82),
    "refcoco+_testA": _phrases("RefCOCO+, test A", "refcoco+/refcoco+_testA", 88.25, 88.59),
    "refcoco+_testB": _phrases("RefCOCO+, test B", "refcoco+/refcoco+_testB", 77.21, 76.79),
    "refcocog_val": _phrases("RefCOCOg, val", "refcocog/refcocog_val", 85.58, 85.96),
    "refcocog_test": _phrases("RefCOCOg, test", "refcocog/refcocog_test", 85.48, 86.32),
    "mme_perception": _mme("MME, perception", PERCEPTION, 1487.57),
    "mme_cognition": _mme("MME, cognition", COGNITION, 360.71),
    "mmbench_dev": Task(
        "MMBench, dev", "circular accuracy",
        readers.circular("mmbench/mmbench_dev_20230712/mmbench_dev_20230712"), "choice", scores.every_turn,
    ),
    "seed_image": Task(
        "SEED-Bench, pictures", "accuracy", readers.prompted("seed_bench/image_input.jsonl"), "ready",
        scores.each(scores.option),
    ),
    "seed_video": Task(
        "SEED-Bench, videos as four pictures", "accuracy", readers.prompted("seed_bench/video_input_4.jsonl"), "ready",
        scores.each(scores.option),
    ),
    "touchstone": Task(
        "TouchStone", "none: its judge is GPT-4", readers.conversations("touchstone/touchstone_20230831.tsv"), "talk",
        None, 512,
    ),
}  # fmt: skip


def find(name: str) -> Task:
    """Find a task by name.

    Raises
    ------
    QvlError
        For an unknown name; lists the tasks.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1)
        raise QvlError(f"{name!r} is no task" + (f"; {close[0]}?" if close else "") + f"; there are {', '.join(TASKS)}")
    return TASKS[name]
