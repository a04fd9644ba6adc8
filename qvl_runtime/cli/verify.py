"""`qvl verify`: compare a file with the original model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

import qvl_runtime as qvl
from qvl_convert import calibration
from qvl_convert.verify import Report, mismatch, open_reference
from qvl_convert.verify import verify as run
from qvl_convert.verify_plot import plot as draw
from qvl_runtime.cli.loading import Device, ModelFile
from qvl_runtime.cli.progress import progress_bar
from qvl_runtime.cli.text import one_line
from qvl_runtime.errors import QvlError
from qvl_runtime.saving import check_path


def verify(
    model: ModelFile,
    reference: Annotated[Path, typer.Option(help="The original: a folder, or a 16-bit .qvl file.")],
    lora: Annotated[Path | None, typer.Option(help="Folder of the merged adapter.")] = None,
    data: Annotated[
        str, typer.Option(help="'builtin', fine-tuning JSON, JSON lines, or a folder of pictures.")
    ] = "builtin",
    samples: Annotated[int, typer.Option(help="Number of conversations.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Length of the compared answers; 0 compares none.")] = 64,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Save a plot of KL by position and error by layer here.")] = None,
) -> None:
    """Compare a .qvl file with the original model.

    The original runs layer by layer from its own files, so it may be larger than memory. The built-in data differ
    from the calibration data.

    \b
    Examples:
      qvl verify qwen-vl-chat.qvl --reference Qwen-VL-Chat
      qvl verify qwen-vl-chat.qvl --reference Qwen-VL-Chat --data my-conversations.json --plot error.png
    """
    if plot is not None:
        check_path(plot)
    loaded = qvl.load(model, device=device)
    original = open_reference(reference, lora)
    if (reason := mismatch(loaded.blob, original)) is not None:
        print(one_line(f"qvl: warning: {model} {reason}"), file=sys.stderr)
    found = calibration.load(data, loaded, count=samples, seed=1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bar(*columns, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        report = run(
            loaded,
            original,
            found,
            max_new_tokens=max_new_tokens,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )
    print(json.dumps(report.to_dict()) if as_json else text(report))
    if plot is not None:
        draw(report, plot, title=model.name)
    if failures := report.failures():
        raise QvlError(f"{model}: does not answer as {reference} does: {'; '.join(failures)}; convert it again")


def text(report: Report) -> str:
    """Format a report as a table."""
    lines = [
        f"samples {report.samples}, tokens {report.positions}; perplexity of the original "
        f"{report.reference_perplexity:.4f}",
        f"{'':<26}{'this file':>12}{'noise floor':>14}",
    ]
    for label, name, form in (
        ("KL divergence, mean", "kl_mean", ".6f"),
        ("               median", "kl_median", ".6f"),
        ("               p90", "kl_p90", ".6f"),
        ("               p99", "kl_p99", ".6f"),
        ("same most likely token", "same_top", ".2%"),
        ("perplexity", "perplexity", ".4f"),
        ("error of picture features", "features", ".2%"),
    ):
        values = [getattr(part, name) for part in (report.model, report.floor)]
        if None not in values:
            lines.append(f"{label:<26}{values[0]:>12{form}}{values[1]:>14{form}}")
    answers = report.answers
    if answers is not None:
        lines.append(
            f"answers: {answers.same} of {answers.count} the same, edit distance {answers.edit_distance:.2%}"
            + (f", not compared for too many differences: {answers.unfinished}" if answers.unfinished else "")
        )
        if answers.first_difference:
            equal = ", ".join(map(str, answers.first_difference))
            lines.append(f"  tokens before the first difference of the others: {equal}")
        if answers.boxes:
            lines.append(
                f"  boxes {answers.boxes}: IoU median {answers.iou_median:.3f}, p10 {answers.iou_p10:.3f}, "
                f"{answers.iou_under_half:.1%} under 0.5"
            )
    lines.append("noise floor: the original with every result rounded to bfloat16, against itself in full precision")
    return "\n".join(lines)
