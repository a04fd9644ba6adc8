"""Options for loading a model, and loading with a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn

from qvl_runtime.cli.progress import progress_bar
from qvl_runtime.loading import load
from qvl_runtime.model import Model

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A .qvl file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or reference.")]
KVCache = Annotated[str, typer.Option(help="fp16, or int8 for half the memory.")]
Activations = Annotated[str, typer.Option(help="CPU: int8 is fast, int16 more exact; auto: int8 for large matrices.")]
ContextTokens = Annotated[
    int | None,
    typer.Option(help="Limit of prompt and answer, in tokens.  [default: the model's window, at most 32768]"),
]
VisionDevice = Annotated[str | None, typer.Option(help="Another device for the pictures, such as cpu.")]
MaxPixels = Annotated[int | None, typer.Option(help="Larger pictures are scaled down to this.  [default: 1280 tokens]")]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Allow pictures from http(s) URLs.")]


def load_shown(path: Path, *arguments: Any, **options: Any) -> Model:
    """Load a model; on a terminal show the progress of the upload to a GPU."""
    columns = ("loading", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with progress_bar(*columns, transient=True) as bar:
        task = bar.add_task("", total=path.stat().st_size if path.is_file() else None, visible=False)
        return load(path, *arguments, progress=lambda nbytes: bar.update(task, advance=nbytes, visible=True), **options)
