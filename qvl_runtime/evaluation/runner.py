"""Answers all questions of a task with a model and stores every answer; resumes an interrupted run."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvl_runtime import __version__
from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.answers import AnswerFile
from qvl_runtime.evaluation.data import Data, Sample, check_pictures, unique
from qvl_runtime.evaluation.prompts import Wording
from qvl_runtime.evaluation.scores import Answer, by_unit
from qvl_runtime.evaluation.tasks import Task
from qvl_runtime.model import Model
from qvl_runtime.results import Result

PROMPTS_VERSION = 1
"""Increment when `prompts` or the processing of answers changes: this invalidates stored answers."""

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions: all samples of a task, or some.

    Attributes
    ----------
    samples : list of Sample
    fingerprint : dict
        Hashes of their files, and the selection.
    """

    samples: list[Sample]
    fingerprint: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answered:
    """The answers of a model to the questions.

    Attributes
    ----------
    answers : list of Answer
        Answers in the order of the samples.
    seconds : float
        Time of the answers, in this and earlier runs.
    peak_memory : int or None
        Peak resident bytes of the run, including the mapped file; None if unknown.
    """

    answers: list[Answer]
    seconds: float
    peak_memory: int | None


def questions(task: Task, folder: Path, *, limit: int | None = None, seed: int = 0) -> Questions:
    """Read a task's files, and select `limit` random units, deterministic in the seed.

    Raises
    ------
    QvlError
        A malformed line, a duplicate id, or missing pictures.
    """
    data = Data(folder)
    samples = unique(task.read(data))
    if not samples:
        raise QvlError(f"{folder}: the task's files hold no question; download them again")
    units = list(by_unit(samples).values())
    if limit is not None and limit < len(units):
        drawn = np.sort(np.random.default_rng(seed).choice(len(units), limit, replace=False))
        samples = [samples[place] for unit in drawn for place in units[unit]]
    pictures = [(data.relative(picture), size) for picture, size in check_pictures(samples)]
    facts = json.dumps([[sample.id for sample in samples], pictures]).encode()
    return Questions(samples, {"files": data.hashes, "samples": hashlib.sha256(facts).hexdigest()})


def made_with(
    model: Model, name: str, task: Task, asked: Questions, words: Wording, load_options: dict[str, Any]
) -> dict[str, Any]:
    """Return the facts that answers depend on, as JSON types; the header of the file of answers."""
    blob = model.blob
    facts = [blob.hashes(), blob.config.to_dict(), blob.generation_config.to_dict(), blob.metadata["preprocessing"]]
    return {
        "task": name,
        "version of qvl": __version__,
        "model": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "device": model.ops.name,
        "options": {**load_options, "longest": task.longest, "shortest": task.shortest, "version": PROMPTS_VERSION},
        "prompt": words.templates[task.prompt],
        "turns": task.prompt in words.turns,
        "data": asked.fingerprint,
    }


def ask(
    model: Model,
    task: Task,
    asked: Questions,
    words: Wording,
    file: AnswerFile,
    *,
    max_batch: int,
    progress: Progress,
) -> Answered:
    """Answer the questions without an answer in `file`.

    Raises
    ------
    QvlError
        An invalid question; names its line. An answer in `file` of another kind than the task's.
    """
    samples = asked.samples
    for sample in samples:
        if sample.id in file.answers and not _is_answer_to(task, sample, file.answers[sample.id]):
            raise QvlError(
                f"{file.path}: the answer {sample.id!r:.80} is none of this task; remove the file, or name another "
                "folder with --out"
            )
    left = [sample for sample in samples if sample.id not in file.answers]
    reset_peak()
    file.begin()
    done = len(samples) - len(left)
    progress(done, len(samples))

    def keep(sample: Sample, answer: Answer) -> None:
        nonlocal done
        file.add(sample.id, answer)
        done += 1
        progress(done, len(samples))

    if task.longest:
        _generate(model, task, words, left, max_batch, keep)
    else:
        for sample in left:
            keep(sample, {"likelihoods": _likelihoods(model, task, words, sample)})
    answers: list[Answer] = [file.answers[sample.id] for sample in samples]
    return Answered(answers, sum(answer["seconds"] for answer in answers), peak_since_reset())


def _is_answer_to(task: Task, sample: Sample, answer: Answer) -> bool:
    """Whether an answer from a file has what the task's metric reads: a text, or a likelihood for each option."""
    return "text" in answer if task.longest else len(answer.get("likelihoods", ())) == len(sample.letters)


def _generate(
    model: Model,
    task: Task,
    words: Wording,
    samples: Sequence[Sample],
    max_batch: int,
    keep: Callable[[Sample, Answer], None],
) -> None:
    lengths = words.lengths(task.prompt, task.longest, task.shortest)
    requests = (
        {"prompt": words.prompt(task.prompt, sample), "images": list(sample.pictures), **lengths} for sample in samples
    )

    def on_result(index: int, result: Result | QvlError) -> None:
        if isinstance(result, QvlError):
            with _named(samples[index]):
                raise result
        keep(samples[index], _record(model, result, boxes=not words.tagged))

    model.generate_batch(requests, max_batch=max_batch, on_result=on_result)


def _record(model: Model, result: Result, *, boxes: bool) -> dict[str, Any]:
    """Return an answer without special tokens, as decoded by the published evaluation."""
    ordinary = [token for token in result.token_ids if token < model.tokenizer.eod_id]
    record: dict[str, Any] = {"text": model.tokenizer.decode(ordinary).strip(), "tokens": len(result.token_ids)}
    if boxes:
        corners = ((box.x1, box.y1, box.x2, box.y2, *box.scale) for box in result.boxes)
        record["boxes"] = [[x1 / w, y1 / h, x2 / w, y2 / h] for x1, y1, x2, y2, w, h in corners]
    return record


def _likelihoods(model: Model, task: Task, words: Wording, sample: Sample) -> list[float]:
    """Compute the mean token log probability of every option."""
    with _named(sample):
        made, letters = words.prompt(task.prompt, sample), words.letters(task.prompt, sample)
        found = model.score(made, letters, list(sample.pictures))
    return [sum(tokens) / len(tokens) for tokens in found]


@contextlib.contextmanager
def _named(sample: Sample) -> Iterator[None]:
    try:
        yield
    except QvlError as error:
        raise QvlError(f"{sample.where}: {error}") from None


def reset_peak() -> None:
    """Reset `peak_since_reset`, if the system supports that."""
    gc.collect()
    with contextlib.suppress(OSError):
        CLEAR.write_text(RESET_PEAK)


def peak_since_reset() -> int | None:
    """Return the peak resident bytes since `reset_peak`, or None if unknown."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return None
