"""The command `qvl`: dispatches to its subcommands and reports errors of the user in one line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from qvl_runtime.cli.text import FAILURES, message

VERBS = {
    "convert": "Make a .qvl file out of a Hugging Face model.",
    "generate": "Answer a prompt, with pictures if the model supports them.",
    "chat": "Talk with a chat model.",
    "info": "Describe a .qvl file.",
    "verify": "Compare a .qvl file with the original model.",
    "bench": "Measure the speed of a .qvl file.",
    "serve": "Serve a .qvl file over HTTP, with OpenAI's API.",
    "batch": "Answer many rows: a table, a folder of pictures.",
    "demo": "Try the small model that comes with the package.",
    "eval": "Score .qvl files on a published task.",
    "export": "Write a .qvl file's weights as a Hugging Face model.",
}
INTERRUPTED = 130
COMPLETION = "_QVL_COMPLETE"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with status 0, 1 (one line on standard error), 2 (wrong usage) or 130."""
    _repair_streams()
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # a picture that cannot be used gives an error
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # For completions the shell passes the words typed so far in the environment.
    typed = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or ""
    words = typed.split()[1:] if COMPLETION in os.environ else arguments
    verb = next((word for word in words if not word.startswith("-")), None)
    try:
        _app(verb)(arguments, prog_name="qvl")
        status = 0
    except KeyboardInterrupt:  # the imports of a command take a second
        status = INTERRUPTED
    except SystemExit as end:
        status = int(end.code or 0)
    except OSError as error:  # the help cannot be written
        status = _failed(error)
    sys.exit(_written(status))


def _failed(error: BaseException) -> int:
    """Tell what failed, where standard error can be written; return the exit status."""
    with contextlib.suppress(OSError):
        print(f"qvl: {message(error)}", file=sys.stderr)
    return 1


def _written(status: int) -> int:
    """Write the rest of the output; return the exit status."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more when it ends, and would tell of that in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError) and not status:
            return _failed(error)
        return status or 1
    return status


def _repair_streams() -> None:
    """Escape characters that the terminal's encoding lacks, instead of raising an error; write nowhere if closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # This also takes the descriptor, which a file that is written would have otherwise.
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _app(wanted: str | None) -> typer.Typer:
    """Build the app. Only the wanted command is imported; the others have a summary."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_guarded(_root))
    for verb, summary in VERBS.items():
        module = f"{__package__}.{verb}"
        if importlib.util.find_spec(module) is None:
            continue
        function = _guarded(getattr(importlib.import_module(module), verb)) if verb == wanted else _listed
        app.command(verb, short_help=summary)(function)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Ask questions about pictures on your own machine: Qwen3-VL, Qwen2.5-VL, Qwen2-VL or Qwen-VL from one file.

    Each command has its own help: qvl generate --help
    """
    if version:
        from qvl_runtime import __version__

        print(f"qvl {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _listed() -> None:
    """Placeholder of a command that is not run."""


def _guarded(verb: Callable) -> Callable:
    @functools.wraps(verb)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader has closed the pipe
            raise typer.Exit(1) from None
        except FAILURES as error:
            raise typer.Exit(_failed(error)) from None

    return guarded
