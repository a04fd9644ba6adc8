"""A job: computes missing blocks and reports progress."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime import __version__
from qvl_runtime.batch.answers import Answerer
from qvl_runtime.batch.drawn import draw
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.parts import Parts, check_manifest, write_manifest
from qvl_runtime.batch.records import Record, is_failed, tokens, why
from qvl_runtime.batch.rows import Row, Source, rows_at
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.loading import load

ROWS_AT_ONCE = 4096
"""Rows per call of `generate_batch`, which holds the results of all its rows in memory."""


class Task(NamedTuple):
    """A block to compute, or some of its rows by number, in ascending order."""

    block: int
    rows: tuple[int, ...]


class Computed(NamedTuple):
    """The records of a task, in order, and the number of pictures."""

    task: Task
    records: list[Record]
    pictures: int


@dataclasses.dataclass
class Progress:
    """The progress of a job. Rates refer to this run.

    Attributes
    ----------
    rows, failed : int
        Completed rows including earlier runs, and how many of them failed.
    total : int
        Rows of the input.
    new_rows, new_pictures, new_tokens : int
        Numbers of this run.
    """

    total: int
    rows: int = 0
    failed: int = 0
    new_rows: int = 0
    new_pictures: int = 0
    new_tokens: int = 0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def status(self) -> dict[str, Any]:
        """Return the progress as JSON types, with rates per second and the remaining seconds."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = self.new_rows / seconds
        return {
            "rows": self.rows,
            "total": self.total,
            "failed": self.failed,
            "seconds": round(seconds, 3),
            "rows_per_second": round(rate, 3),
            "pictures_per_second": round(self.new_pictures / seconds, 3),
            "tokens_per_second": round(self.new_tokens / seconds, 3),
            "seconds_left": round((self.total - self.rows) / rate, 1) if rate else None,
        }


class Worker:
    """Computes tasks with its own model.

    Parameters
    ----------
    model : ModelSpec
    source : Source
    options : Options
    """

    def __init__(self, model: ModelSpec, source: Source, options: Options):
        # Without a prefix cache an answer does not depend on earlier rows, at any precision.
        self._source = source
        loaded = load(model.path, conversations=0, max_batch=options.max_batch, prompts_first=True, **model.load)
        self._answer = Answerer(loaded, source.root, options)

    def __call__(
        self,
        tasks: Iterable[Task],
        on_computed: Callable[[Computed], None],
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """Compute tasks; call `on_computed` with each completed task, `on_record` with every record.

        A task is taken when there is room for its rows beside those in progress.
        """
        left = iter(tasks)
        for first in left:
            self._run(_some(first, left), on_computed, on_record)

    def _run(
        self, tasks: Iterable[Task], on_computed: Callable[[Computed], None], on_record: Callable[[Record], None]
    ) -> None:
        begun: dict[int, tuple[Task, int]] = {}

        def blocks() -> Iterator[list[Row]]:
            for index, task in enumerate(tasks):
                rows = rows_at(self._source, task.rows)
                begun[index] = task, sum(row.picture_count for row in rows)
                yield rows

        def complete(index: int, records: list[Record]) -> None:
            task, pictures = begun.pop(index)
            on_computed(Computed(task, records, pictures))

        self._answer(blocks(), complete, on_record)


def _some(first: Task, left: Iterator[Task]) -> Iterator[Task]:
    """Yield a task, and those left until there are about `ROWS_AT_ONCE` rows."""
    yield first
    rows = len(first.rows)
    while rows < ROWS_AT_ONCE and (task := next(left, None)) is not None:
        rows += len(task.rows)
        yield task


Runner = Callable[[Sequence[Task], Callable[[Computed], None]], None]
"""Computes tasks in any order, with a callback for each."""


class Job:
    """A job over the rows of an input.

    Parameters
    ----------
    model : ModelSpec
    source : Source
    out : Path
    options : Options
    block : int
        Rows per block.
    form : str
        Output format: "jsonl" or "parquet".
    max_failures : float
        Share of the rows that may fail before the job stops.
    drawings : Path, optional
        Folder for pictures with the boxes of their answers, also those of earlier runs that it lacks.
    """

    def __init__(
        self,
        model: ModelSpec,
        source: Source,
        out: Path,
        options: Options,
        *,
        block: int,
        form: str = "jsonl",
        max_failures: float = 0.1,
        drawings: Path | None = None,
    ):
        self._source, self._block, self._max_failures, self._drawings = source, block, max_failures, drawings
        self._options = options
        if source.openai and form != "jsonl":
            raise QvlError(f"--format {form} has no place for the answers to OpenAI's lines; take jsonl")
        self._parts = Parts(out, form, -(-len(source) // block))
        blob = Blob(model.path)
        options.check(blob)
        self._upright = blob.family.upright
        hashes = json.dumps(blob.hashes(), sort_keys=True)
        self._facts = {
            "qvl": __version__,
            "model": hashlib.sha256(hashes.encode()).hexdigest(),
            "load": {name: str(value) for name, value in model.load.items() if value is not None},
            "input": source.fingerprint(),
            "rows": len(source),
            "block": block,
            "format": form,
            "options": options.fingerprint(),
        }
        for folder in (out,) if drawings is None else (out, drawings):
            check_manifest(folder, self._facts)
        if drawings is not None:
            drawings.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        runner: Runner,
        *,
        retry_failed: bool = False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Progress:
        """Compute missing blocks; call `on_progress` after every block.

        With `retry_failed` failed rows of earlier runs are answered again.

        Raises
        ------
        QvlError
            If too many rows fail, or an output file cannot be written.
        """
        with self._parts.held():
            check_manifest(self._parts.folder, self._facts)  # again: another job may have begun
            progress, tasks = self._planned(retry_failed)
            self._check_failures(progress, None)
            on_progress(progress)

            def computed(done: Computed) -> None:
                write_manifest(self._parts.folder, self._facts)  # not before: a job that cannot begin binds no folder
                self._write(done)
                _count(progress, done)
                on_progress(progress)
                self._check_failures(progress, next(filter(is_failed, done.records), None))

            if tasks:
                runner(tasks, computed)
        return progress

    def _planned(self, retry_failed: bool) -> tuple[Progress, list[Task]]:
        """Return the progress of earlier runs, and the remaining tasks; draw what is not drawn yet."""
        progress, tasks, missing = Progress(len(self._source)), [], set(self._parts.missing())
        for first in range(0, len(self._source), self._block):
            block, end = first // self._block, min(first + self._block, len(self._source))
            if block in missing:
                tasks.append(Task(block, tuple(range(first, end))))
                continue
            records = self._parts.read(block, end - first)
            failures = tuple(first + i for i, record in enumerate(records) if is_failed(record))
            progress.rows += len(records)
            progress.failed += len(failures)
            self._draw(Task(block, tuple(range(first, end))), records, again=False)
            if retry_failed and failures:
                progress.rows -= len(failures)
                progress.failed -= len(failures)
                tasks.append(Task(block, failures))
        return progress, tasks

    def _write(self, done: Computed) -> None:
        first, records = done.task.block * self._block, done.records
        count = min(self._block, len(self._source) - first)
        if len(records) < count:
            again = dict(zip(done.task.rows, records))
            records = [again.get(first + i, old) for i, old in enumerate(self._parts.read(done.task.block, count))]
        self._parts.write(done.task.block, records)
        self._draw(done.task, done.records, again=True)  # after the answers, which took longer

    def _draw(self, task: Task, records: Sequence[Record], *, again: bool) -> None:
        if self._drawings is not None:
            write_manifest(self._drawings, self._facts)
            draw(self._source, task.rows, records, self._drawings, self._options, exif=self._upright, again=again)

    def _check_failures(self, progress: Progress, example: Record | None) -> None:
        if progress.failed > self._max_failures * progress.total:
            told = "" if example is None else f" (the last: {why(example)[:300]})"
            raise QvlError(
                f"{progress.failed} of {progress.total} rows failed, more than a share of {self._max_failures:g}"
                f"{told}; correct them and run again with --retry-failed, or raise --max-failures"
            )


def _count(progress: Progress, done: Computed) -> None:
    progress.rows += len(done.records)
    progress.new_rows += len(done.records)
    progress.failed += sum(map(is_failed, done.records))
    progress.new_pictures += done.pictures
    progress.new_tokens += sum(map(tokens, done.records))
