"""Evaluation of several models on one task, one after the other, and their comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.answers import AnswerFile
from qvl_runtime.evaluation.comparison import Row, compare
from qvl_runtime.evaluation.export import touchstone
from qvl_runtime.evaluation.prompts import Wording, wording
from qvl_runtime.evaluation.runner import Answered, Questions, ask, made_with, questions
from qvl_runtime.evaluation.tasks import Task, find
from qvl_runtime.file.opening import as_path
from qvl_runtime.loading import load


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes
    ----------
    task : Task
    rows : list of Row
        One per model; empty for a task without a metric.
    exported : list of Path
        Files for the judge of such a task.
    questions : int
    note : str
        How the metric was computed, if that depends on the machine.
    document : dict
        Results and conditions as JSON types.
    """

    task: Task
    rows: list[Row]
    exported: list[Path]
    questions: int
    note: str
    document: dict[str, Any]


def evaluate(
    models: Sequence[Path],
    name: str,
    data: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    prompts: Mapping[str, Any] | None = None,
    max_batch: int = 16,
    device: str = "auto",
    kv_cache: str = "fp16",
    activations: str = "auto",
    max_pixels: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Evaluation:
    """Score models on a published task.

    Parameters
    ----------
    models : sequence of Path
        `.qvl` files; the others are compared with the first.
    name : str
        Name of the task.
    data : Path
        Folder of the tasks' files. Nothing is downloaded, and no picture outside of it is opened.
    limit, seed : int
        Number of random units of the task, and the seed.
    out : Path, optional
        Folder of the answers, by default ``qvl-eval/NAME``. Existing answers are reused.
    prompts : mapping, optional
        Custom prompts; see `qvl_runtime.evaluation.prompts.wording`.
    max_batch : int
        Largest number of concurrent questions, up to 16. The answers do not depend on it.
    device, kv_cache, activations, max_pixels
        As in `qvl_runtime.load`.
    progress : callable
        Called with a model's name, the number of answered questions, and their total.

    Raises
    ------
    QvlError
        An unknown task, a malformed line of its files, missing pictures, answers in `out` with other settings, a
        model that the task does not support, or a missing package of its metric.
    """
    task, labels = find(name), _labels(models)
    task.check()
    asked = questions(task, data, limit=limit, seed=seed)
    wordings = [wording(Blob(path), task.prompt, prompts) for path in models]
    folder = Path("qvl-eval") / name if out is None else as_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QvlError(f"{folder}: cannot be made ({error.strerror}); name another folder with --out") from None
    options: dict[str, Any] = {"kv_cache": kv_cache, "activations": activations}
    if max_pixels is not None:
        options["max_pixels"] = max_pixels

    def answers(path: Path, label: str, words: Wording) -> tuple[Answered, str]:
        model = load(path, device, **options)
        head = made_with(model, name, task, asked, words, options)
        with AnswerFile(folder / f"{label}.jsonl", head) as file:
            answered = ask(model, task, asked, words, file, max_batch=max_batch, progress=partial(progress, label))
            return answered, model.ops.name

    found = [answers(*one) for one in zip(models, labels, wordings)]
    rows, exported, note = _result(task, asked, labels, [one for one, _ in found], models, folder)
    document = {
        "task": name,
        "metric": task.metric,
        "questions": len(asked.samples),
        "limit": limit,
        "seed": seed,
        "device": found[0][1],
        **options,
        "prompts": None if prompts is None else dict(prompts),
        "published": task.published,
        "published_split": task.split,
        "note": note,
        "models": [row.to_dict() for row in rows],
        "exported": [str(path) for path in exported],
    }
    return Evaluation(task, rows, exported, len(asked.samples), note, document)


def _result(
    task: Task, asked: Questions, labels: list[str], found: list[Answered], models: Sequence[Path], folder: Path
) -> tuple[list[Row], list[Path], str]:
    if task.score is None:
        exported = [folder / f"{label}.tsv" for label in labels]
        for path, one in zip(exported, found):
            touchstone(asked.samples, one.answers, path)
        return [], exported, ""
    scores = [task.score(asked.samples, one.answers) for one in found]
    sizes = [path.stat().st_size for path in models]
    rows = compare(labels, scores, [one.seconds for one in found], [one.peak_memory for one in found], sizes)
    return rows, [], scores[0].note


def _labels(models: Sequence[Path]) -> list[str]:
    """Return unique names of the models, from their files."""
    labels = [path.stem for path in models]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise QvlError(f"two models are called {twice[0]}; rename one of the files")
    return labels
