"""What a terminal shows of an answer while it comes, and what a pipe gets instead."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.spinner import Spinner


class Screen:
    """Standard output: answers as Markdown on a terminal, as plain text in a pipe."""

    def __init__(self, console: Console | None = None):
        self.console = Console() if console is None else console

    def say(self, text: str) -> None:
        """A line that is not the model's; a pipe does not get it."""
        if self.console.is_terminal:
            self.console.print(text, style="dim", markup=False, highlight=False)

    def complain(self, text: str) -> None:
        """What went wrong, on one line, on standard error."""
        print(f"qvl: {' '.join(text.split())}", file=sys.stderr)

    def answering(self, waiting_for: str) -> Answering:
        """A place for one answer; until its first text a spinner says what is waited for."""
        return Answering(self.console, waiting_for)

    def picture(self, path: Path) -> None:
        """Show a PNG inside the terminal, where it is one of those that can."""
        if self.console.is_terminal and (sequence := _inline(path)):
            sys.stdout.write(sequence + "\n")
            sys.stdout.flush()


class Answering:
    """Shows an answer as it grows."""

    def __init__(self, console: Console, waiting_for: str):
        self._console, self._text = console, ""
        self._live: Live | None = None
        if console.is_terminal:
            spinner = Spinner("dots", waiting_for)
            self._live = Live(spinner, console=console, refresh_per_second=8, vertical_overflow="visible")

    def __enter__(self) -> Answering:
        if self._live is not None:
            self._live.start()
        return self

    def show(self, text: str) -> None:
        """Append to the answer."""
        self._text += text
        if self._live is None:
            self._console.file.write(text)
            self._console.file.flush()
        elif self._text.strip():
            self._live.update(Markdown(shown(self._text)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is None:
            self._console.file.write("\n")
            return
        if not self._text.strip():
            self._live.update("")
        self._live.stop()


def shown(text: str) -> str:
    """An answer as Markdown may show it: Markdown takes the model's tags for HTML and would drop them."""
    return text.replace("<", "\\<")


def _inline(path: Path) -> str | None:
    """The escape sequence that shows a PNG, for the terminals known to understand one."""
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
