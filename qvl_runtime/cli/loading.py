"""Loading a model for a verb, with a progress bar where that takes a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from qvl_runtime.model import Model, load


def load_shown(path: Path, *arguments: Any, **options: Any) -> Model:
    """`load`, showing on a terminal how far the upload to a GPU is."""
    console = Console(stderr=True)
    columns = ("loading", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=path.stat().st_size if path.is_file() else None, visible=False)
        return load(path, *arguments, progress=lambda nbytes: bar.update(task, advance=nbytes, visible=True), **options)
