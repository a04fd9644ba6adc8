"""`qvl export`: write a file as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvl_convert.export import export as run
from qvl_runtime.blob import Blob
from qvl_runtime.cli.loading import ModelFile
from qvl_runtime.cli.text import one_line, size


def export(
    model: ModelFile,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to create.")],
    force: Annotated[bool, typer.Option("--force", help="Replace FOLDER, complete or partial, if an export.")] = False,
) -> None:
    """Write a .qvl file's weights as a Hugging Face model.

    The decoder's integer weights are written in AutoGPTQ's layout, which other tools read; everything else becomes
    fp16. Some tools also need the model's Python files: take them from the original repository.

    \b
    Examples:
      qvl export qwen-vl-chat.qvl Qwen-VL-Chat-Int4
    """
    run(Blob(model), folder, force=force)
    print(one_line(f"{folder}: {size(sum(path.stat().st_size for path in folder.iterdir()))}"))
