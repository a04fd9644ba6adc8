"""Bars of progress."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress, ProgressColumn

from qvl_runtime.cli.screen import console


def progress_bar(*columns: str | ProgressColumn, transient: bool = False, **options: Any) -> Progress:
    """Create a bar on standard error, which is shown on a terminal only; `options` are those of `Progress`."""
    output = console(stderr=True)
    return Progress(*columns, console=output, transient=transient, disable=not output.is_terminal, **options)
