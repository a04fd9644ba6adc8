"""Output of answers to a terminal or a pipe."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.text import Text

from qvl_runtime.cli.text import one_line, printable


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return standard output or standard error, as a terminal only if it is one.

    Rich believes the variables FORCE_COLOR and TTY_COMPATIBLE, which notebooks and build servers set for their pipes,
    too: an answer in a pipe would have a spinner's control sequences before it. `width` counts where there is none.
    """
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    return Console(stderr=stderr, force_terminal=is_terminal, width=None if is_terminal else width)


class Screen:
    """Standard output: answers, and on a terminal also messages."""

    def __init__(self, output: Console | None = None):
        self.console = console() if output is None else output

    def say(self, text: str) -> None:
        """Print a message of the program, on a terminal only."""
        if self.console.is_terminal:
            # The terminal wraps the line, so that a path can be copied whole.
            self.console.print(printable(text), style="dim", markup=False, highlight=False, emoji=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a message about an answer: for a pipe on standard error."""
        (self.say if self.console.is_terminal else self.complain)(text)

    def complain(self, text: str) -> None:
        """Print an error in one line on standard error."""
        print(f"qvl: {one_line(text)}", file=sys.stderr)

    def answering(self, waiting_for: str) -> AnswerOutput:
        """Return the output of one answer, with a spinner until the first text."""
        return AnswerOutput(self.console, waiting_for)

    def picture(self, path: Path) -> None:
        """Show a PNG in the terminal if it supports that."""
        if self.console.is_terminal and (sequence := _inline(path)):
            sys.stdout.write(sequence + "\n")
            sys.stdout.flush()


class AnswerOutput:
    """Writes an answer as it is generated: a pipe gets every character, a terminal the printable ones."""

    def __init__(self, console: Console, waiting_for: str):
        self._console, self._is_terminal = console, console.is_terminal
        self._spinner = console.status(waiting_for, spinner="line") if self._is_terminal else None
        self._reasoned = False

    def __enter__(self) -> AnswerOutput:
        if self._spinner is not None and not self._console.is_dumb_terminal:
            self._spinner.start()
        return self

    def reason(self, text: str) -> None:
        """Show reasoning: dim on a terminal, not at all in a pipe."""
        if self._is_terminal:
            self._stop_spinner()
            self._reasoned = True
            self._console.print(Text(printable(text), style="dim"), end="", soft_wrap=True)

    def show(self, text: str) -> None:
        """Append to the answer."""
        if self._reasoned and text:
            self._console.file.write("\n\n")
            self._reasoned = False
        if self._spinner is not None:
            text = text.lstrip()
            if not text:
                return
            self._stop_spinner()
        self._console.file.write(printable(text) if self._is_terminal else text)
        self._console.file.flush()

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_spinner()
        self._console.file.write("\n")
        self._console.file.flush()


def _inline(path: Path) -> str | None:
    """Return the escape sequence that shows a PNG, for terminals that support it."""
    data = base64.standard_b64encode(path.read_bytes()).decode()
    if os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return f"\x1b]1337;File=inline=1:{data}\x07"
    if os.environ.get("KITTY_WINDOW_ID") or os.environ.get("TERM") == "xterm-ghostty":
        chunks = [data[i : i + 4096] for i in range(0, len(data), 4096)]
        heads = [f"f=100,a=T,m={int(len(chunks) > 1)}"] + [
            f"m={int(i < len(chunks) - 1)}" for i in range(1, len(chunks))
        ]
        return "".join(f"\x1b_G{head};{chunk}\x1b\\" for head, chunk in zip(heads, chunks))
    return None
