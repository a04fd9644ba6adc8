"""One conversation: what was said, the pictures that wait for the next question, and the commands between them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from qvl_runtime.boxes import Box
from qvl_runtime.cli.screen import Screen
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.grounding import format_box
from qvl_runtime.file.atomic import replacing
from qvl_runtime.inputs.images import load_image
from qvl_runtime.inputs.tokenizer import split_images
from qvl_runtime.model import Model

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_new_tokens": int,
    "seed": int,
}
FORMAT = "qvl conversation 1"


class Conversation:
    """A chat with its state; `take` is given one line after the other.

    Attributes
    ----------
    open : bool
        False once the user has left.
    history : list of (query, answer)
    """

    def __init__(self, model: Model, screen: Screen, *, system: str | None = None):
        if not model.is_chat:
            raise QvlError(f"{model.blob.path}: is a base model and has no chat turns; use qvl generate")
        self.model, self.screen = model, screen
        self.system = system
        self.open = True
        self.history: list[tuple[Any, str | None]] = []
        self.settings: dict[str, Any] = {}
        self._waiting: list[str] = []
        self._boxes: list[Box] = []
        self._left_out = 0
        self._commands = {
            name.removeprefix("_do_"): getattr(self, name) for name in dir(self) if name.startswith("_do_")
        }

    def greet(self) -> None:
        """Say what this is."""
        self.screen.say(f"{self.model.blob.path.name} on {self.model.ops.name}. /help for commands, Ctrl-D to leave.")

    def take(self, line: str) -> None:
        """Do what one line says; what the user can mend is said and the conversation goes on."""
        line = line.strip()
        if not line:
            return
        try:
            if path := dropped_file(line):
                self.attach(path)
            elif line.startswith("/"):
                self._command(line)
            else:
                self._ask(line)
        except QvlError as error:
            self.screen.complain(str(error))

    def attach(self, path: str | os.PathLike) -> None:
        """Add a picture to the next question."""
        if self.model.pictures is None:
            raise QvlError("this model sees no pictures")
        width, height = load_image(Path(path).expanduser()).size
        self._waiting.append(str(Path(path).expanduser()))
        self.screen.say(f"{path}: {width} x {height}, goes with your next question")

    # what a line can ask for

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise QvlError(f"/{name} is no command; /help lists them")
        self._commands[name](rest.strip())

    def _do_help(self, rest: str) -> None:
        """/help                     this list"""
        for command in self._commands.values():
            self.screen.say(command.__doc__)
        self.screen.say("A line that is the path of a picture attaches it. Ctrl-C stops an answer, Ctrl-D leaves.")

    def _do_image(self, rest: str) -> None:
        """/image FILE               attach a picture to your next question"""
        if not rest:
            raise QvlError("/image needs the path of a picture")
        self.attach(_unquoted(rest))

    def _do_box(self, rest: str) -> None:
        """/box X1 Y1 X2 Y2 [QUESTION]  ask about a rectangle of the last picture, in its pixels"""
        words = rest.split(maxsplit=4)
        try:
            corners = [float(word) for word in words[:4]]
            if len(corners) != 4:
                raise ValueError
        except ValueError:
            raise QvlError("/box needs four numbers, x1 y1 x2 y2, in pixels of the picture") from None
        width, height = load_image(self._picture()).size
        scaled = [min(999, max(0, int(v / size * 1000))) for v, size in zip(corners, (width, height) * 2)]
        question = words[4] if len(words) > 4 else "What is this?"
        self._ask(f"{format_box(Box(None, *scaled))}{question}")

    def _do_show(self, rest: str) -> None:
        """/show [FILE.png]          draw the last answer's boxes on its picture"""
        if not self._boxes:
            raise QvlError("the last answer has no boxes to show")
        out = Path(_unquoted(rest) or "boxes.png").expanduser()
        for number, label in draw_boxes(self._picture(), self._boxes, out).legend.items():
            self.screen.say(f"{number}: {label}")
        self.screen.say(f"saved {out}")
        if out.suffix.lower() == ".png":
            self.screen.picture(out)

    def _do_undo(self, rest: str) -> None:
        """/undo                     take back your last question and its answer"""
        if not self.history:
            raise QvlError("there is nothing to undo")
        self.history.pop()
        self._boxes = []

    def _do_retry(self, rest: str) -> None:
        """/retry                    ask the last question again"""
        if not self.history:
            raise QvlError("there is nothing to retry")
        query, answer = self.history.pop()
        try:
            self._answer(query)
        finally:
            if not self.history or self.history[-1][0] is not query:
                self.history.append((query, answer))

    def _do_set(self, rest: str) -> None:
        """/set NAME VALUE           temperature, top_p, top_k, max_new_tokens, seed, …; no VALUE: the model's own"""
        name, _, value = rest.replace("=", " ").partition(" ")
        if not name:
            own = {k: v for k, v in self.model.generation_config.to_dict().items() if k in SETTINGS}
            self.screen.say(", ".join(f"{k} {v}" for k, v in (own | self.settings).items()))
            return
        if name not in SETTINGS:
            raise QvlError(f"{name} is no setting; there are {', '.join(SETTINGS)}")
        if not value.strip():
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = SETTINGS[name](value.strip())
        except ValueError:
            raise QvlError(f"{name} is {value.strip()!r}, expected a number") from None

    def _do_save(self, rest: str) -> None:
        """/save FILE.json           save the conversation, and beside it what the model remembers of it (large)"""
        if not rest:
            raise QvlError("/save needs a file name")
        document = {"format": FORMAT, "system": self.system, "settings": self.settings, "history": self.history}
        path = Path(_unquoted(rest)).expanduser()
        try:
            with replacing(path) as file:
                file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())
        except OSError as error:
            raise QvlError(f"{path}: cannot be written ({error.strerror})") from None
        self.screen.say(f"saved {path}")
        if tokens := self.model.save_past(_past(path), self.history, system=self.system):
            size = _past(path).stat().st_size / 1e6
            self.screen.say(f"saved {_past(path)}: {size:.1f} MB, so that {tokens} tokens need not be computed again")

    def _do_load(self, rest: str) -> None:
        """/load FILE.json           go on with a saved conversation"""
        path = Path(_unquoted(rest)).expanduser()
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError
            history = [(query, answer) for query, answer in document["history"]]
            settings = {name: SETTINGS[name](value) for name, value in document["settings"].items()}
            system = None if document["system"] is None else str(document["system"])
        except OSError as error:
            raise QvlError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise QvlError(f"{path}: is no conversation saved with /save") from None
        self.history, self.settings, self.system = history, settings, system
        self._boxes, self._waiting = [], []
        self.screen.say(f"{len(history)} turns")
        if _past(path).exists():
            try:
                self.screen.say(f"{self.model.load_past(_past(path))} tokens need not be computed again")
            except QvlError as error:
                raise QvlError(f"{error}; the conversation is computed anew") from None

    def _do_quit(self, rest: str) -> None:
        """/quit                     leave"""
        self.open = False

    # answering

    def _ask(self, text: str) -> None:
        pieces: Any = text
        if self._waiting:
            pieces = [*({"image": path} for path in self._waiting), {"text": text}]
        self._answer(pieces)
        self._waiting = []

    def _answer(self, query: Any) -> None:
        """Answer and remember; Ctrl-C ends the answer early and keeps what there is of it."""
        said: list[str] = []
        with self.screen.answering("looking" if self._waiting else "thinking") as place:

            def show(piece) -> None:
                said.append(piece.text)
                place.show(piece.text)

            try:
                result = self.model.chat(query, self.history, system=self.system, on_piece=show, **self.settings)
            except KeyboardInterrupt:
                self.history = [*self.history, (query, "".join(said).strip())]
                self._boxes = []
                return
        if result.left_out > self._left_out:
            self.screen.say(f"(the context is full: the model no longer sees the oldest {result.left_out} turns)")
        self._left_out, self.history, self._boxes = result.left_out, result.history, result.boxes

    def _picture(self) -> str:
        """The picture last spoken of."""
        if self._waiting:
            return self._waiting[-1]
        for query, _ in reversed(self.history):
            if isinstance(query, str):
                found = split_images(query)[1::2]
            else:
                found = [piece["image"] for piece in query if "image" in piece]
            if found:
                return found[-1]
        raise QvlError("there is no picture yet; attach one with /image FILE")


def _past(path: Path) -> Path:
    """Where the keys and values of a saved conversation lie."""
    return path.with_name(f"{path.name}.past")


def dropped_file(line: str) -> Path | None:
    """The picture a line names, if nothing else: a path as terminals paste it (quoted, escaped) or a file URL."""
    path = unquote(urlparse(line).path) if line.startswith("file://") else _unquoted(line)
    return Path(path).expanduser() if Path(path).suffix and _exists(path) else None


def _unquoted(text: str) -> str:
    """A path without the quotes or backslashes a shell would want."""
    if _exists(text):
        return text
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    return words[0] if len(words) == 1 else text


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # longer than a path may be, a NUL in it, no such user
        return False
