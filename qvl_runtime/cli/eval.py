"""`qvl eval`: score models on published tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qvl_runtime.cli.loading import Activations, Device, KVCache, MaxPixels
from qvl_runtime.cli.progress import progress_bar
from qvl_runtime.cli.screen import console
from qvl_runtime.cli.text import duration, one_line, size
from qvl_runtime.engine.scheduler import MAX_BATCH
from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.evaluate import Evaluation, evaluate
from qvl_runtime.evaluation.plot import draw
from qvl_runtime.evaluation.tasks import TASKS, find
from qvl_runtime.file.json_text import MAX_JSON, parse_object
from qvl_runtime.file.opening import read_regular
from qvl_runtime.saving import check_path

WIDTH = 120
"""Columns of a table that is not shown on a terminal."""


def eval(
    models_and_task: Annotated[
        list[str], typer.Argument(metavar="MODEL... TASK", help=f".qvl files, then one of {', '.join(TASKS)}.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of the tasks' files; nothing is downloaded.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Number of random questions; all by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random questions.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the answers; qvl-eval/TASK by default.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON file of a model's own prompts.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Questions to compute concurrently.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Save a plot of the scores here.")] = None,
    device: Device = "auto",
    kv_cache: KVCache = "fp16",
    activations: Activations = "auto",
    max_pixels: MaxPixels = None,
) -> None:
    """Score models on a published task with its published method.

    Prompts, lengths and metrics are those of the published evaluation. docs/evaluation.md lists the files of each
    task. Every answer is stored in --out; the same command resumes an interrupted run. Prints a table, then one JSON
    document as the last line.

    \b
    Examples:
      qvl eval int4.qvl textvqa --data data --limit 500
      qvl eval fp16.qvl int4.qvl refcoco_val --data data --plot refcoco.png
    """
    *models, name = models_and_task
    if name.endswith(".qvl") or not models:
        raise typer.BadParameter("name at least one .qvl file, and a task as the last word")
    if plot is not None:
        check_path(plot)
        if find(name).score is None:
            raise QvlError(f"--plot: {name} has no score that a plot could show; leave out --plot")
    own = None if prompts is None else parse_object(read_regular(prompts, limit=MAX_JSON), str(prompts), "correct it")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bar(*columns, transient=True) as bar:
        shown = bar.add_task("reading", total=None)
        found = evaluate(
            [Path(model) for model in models],
            name,
            data,
            limit=limit,
            seed=seed,
            out=out,
            prompts=own,
            max_batch=max_batch,
            device=device,
            kv_cache=kv_cache,
            activations=activations,
            max_pixels=max_pixels,
            progress=lambda name, done, total: bar.update(
                shown, description=one_line(name), completed=done, total=total
            ),
        )
    for path in found.exported:
        print(one_line(f"{path}: {found.questions} answers for the task's own judge"))
    if found.rows:
        console(width=WIDTH).print(table(found))
    if plot is not None:
        title = f"{found.task.title}: {found.task.metric}"
        draw(found.rows, plot, title=title, published=found.task.published)
    print(json.dumps(found.document))


def table(found: Evaluation) -> Group:
    """Format a comparison as a table with a column for each model, which fits narrow terminals."""
    task, made = found.task, Table()
    made.add_column("", overflow="fold")
    for row in found.rows:
        made.add_column(Text(one_line(row.name)), justify="right", overflow="fold")  # brackets are no style
    made.add_row("score", *(f"{row.score:.2f}" for row in found.rows))
    made.add_row("95%", *("{:.2f} to {:.2f}".format(*row.interval) for row in found.rows))
    if len(found.rows) > 1:
        made.add_row("difference", *("" if row.difference is None else f"{row.difference:+.2f}" for row in found.rows))
        intervals = [row.difference_interval for row in found.rows]
        made.add_row("95%", *("" if one is None else "{:+.2f} to {:+.2f}".format(*one) for one in intervals))
    for part in found.rows[0].parts:
        made.add_row(part, *(f"{row.parts[part]:.2f}" for row in found.rows))
    made.add_row("time", *(duration(row.seconds) for row in found.rows))
    made.add_row("memory", *("" if row.peak_memory is None else size(row.peak_memory) for row in found.rows))
    made.add_row("file", *(size(row.size) for row in found.rows))
    published = ", ".join(f"{name} {score:.2f}" for name, score in task.published.items())
    split = f" ({task.split})" if task.split else ""
    above = f"{task.title}: {task.metric}, {found.questions} questions"
    below = filter(None, [published and f"published: {published}{split}", found.note])
    return Group(Text(above), made, *map(Text, below))
