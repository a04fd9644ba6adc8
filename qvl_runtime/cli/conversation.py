"""One conversation: its turns, the pictures for the next question, and the commands."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from qvl_kernels.atomic import replacing
from qvl_runtime.boxes import Box
from qvl_runtime.cli.saved_chat import FORMAT, is_past, is_saved, read_saved
from qvl_runtime.cli.screen import Screen
from qvl_runtime.cli.settings import SETTINGS, check_name, read_setting
from qvl_runtime.cli.text import FAILURES, message, size
from qvl_runtime.cli.turns import is_file, pictures, portable, user_path, words
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.engine.generation import Piece
from qvl_runtime.errors import QvlError
from qvl_runtime.file.writing import unwritable
from qvl_runtime.inputs.images import ImageSource, is_url, load_image, local_path
from qvl_runtime.inputs.pictures import Access, PictureEncoder
from qvl_runtime.model import Model
from qvl_runtime.saving import check_no_input

COMMANDS = {
    "/box X1 Y1 X2 Y2 [QUESTION]": "ask about a rectangle of the last picture, in its pixels",
    "/clear": "begin a new conversation; settings stay",
    "/help": "this list",
    "/image FILE": "attach a picture to your next question",
    "/load FILE.json": "continue a saved conversation",
    "/quit": "leave",
    "/retry": "ask the last question again",
    "/save FILE.json": "save the conversation and its keys and values (a large file)",
    "/set NAME VALUE": "temperature, top_p, top_k, max_new_tokens, seed, …; no VALUE: the model's own",
    "/show [FILE.png]": "draw the last answer's boxes on its picture",
    "/undo": "take back your last question and its answer",
}
"""What a user types, and what it does."""


class Conversation:
    """A chat with its state; `take` handles one line at a time.

    Attributes
    ----------
    open : bool
        False once the user has quit.
    failed : bool
        Whether a line failed.
    history : list of (query, answer)
    """

    def __init__(self, model: Model, screen: Screen, *, system: str | None = None, allow_urls: bool = False):
        if not model.is_chat:
            raise QvlError(f"{model.blob.path}: is a base model and has no chat turns; use qvl generate")
        self.model, self.screen, self.allow_urls = model, screen, allow_urls
        self.system = system
        self.open, self.failed = True, False
        self.history: list[tuple[Any, str | None]] = []
        self.settings: dict[str, Any] = {}
        self._waiting: list[ImageSource] = []
        self._boxes: list[Box] = []
        self._left_out = 0
        names = [usage.split()[0].removeprefix("/") for usage in COMMANDS]
        self._commands = {name: getattr(self, f"_do_{name}") for name in names}

    def greet(self) -> None:
        """Show the model and the most important commands."""
        self.screen.say(f"{self.model.blob.path.name} on {self.model.ops.name}. /help for commands, Ctrl-D to leave.")

    def take(self, line: str) -> None:
        """Run one line. Errors of the user and of the system are shown, and the conversation continues.

        Raises
        ------
        KeyboardInterrupt
            When interrupted. The history then holds the partial answer.
        """
        line = line.strip()
        if not line:
            return
        try:
            if paths := dropped_files(line):
                for path in paths:
                    self.attach(str(path))
            elif line.startswith("/"):
                self._command(line)
            else:
                self._ask(line)
        except BrokenPipeError:  # nobody reads the answers
            raise
        except FAILURES as error:
            self.failed = True
            self.screen.complain(message(error))

    def attach(self, source: str) -> None:
        """Add a picture, by its path or URL, to the next question."""
        self._encoder()
        if is_url(source):
            image = load_image(source, allow_urls=self.allow_urls)
            self._waiting.append(image)
        else:
            path = str(user_path(str(local_path(source))).absolute())
            image = self._opened(path)
            self._waiting.append(path)
        width, height = image.size
        self.screen.say(f"{source}: {width} x {height}, goes with your next question")

    # commands

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            if "/" in name:  # the path of a picture, and a question, as other programs take them
                raise QvlError(f"/{name} is no command; give a picture alone on a line, then the question")
            raise QvlError(f"/{name} is no command; /help lists them")
        command, rest = self._commands[name], rest.strip()
        if inspect.signature(command).parameters:
            command(rest)
        elif rest:
            raise QvlError(f"/{name} takes no argument; leave out {rest!r:.100}")
        else:
            command()

    def _do_help(self) -> None:
        width = max(24, self.screen.console.width)  # a narrower terminal wraps the lines itself
        for usage, text in COMMANDS.items():
            self.screen.say(f"{usage}\n{textwrap.indent(textwrap.fill(text, width - 4), '    ')}")
        self.screen.say("A line of paths of pictures attaches them. Ctrl-C stops an answer, Ctrl-D leaves.")

    def _do_image(self, rest: str) -> None:
        if not rest:
            raise QvlError("/image needs the path of a picture")
        self.attach(rest if is_url(rest) else _unquoted(rest))

    def _do_box(self, rest: str) -> None:
        parts = rest.split(maxsplit=4)
        try:
            x1, y1, x2, y2 = (float(part) for part in parts[:4])
        except ValueError:
            raise QvlError("/box needs four numbers, x1 y1 x2 y2 (left, top, right, bottom), in pixels") from None
        picture = self._last_picture()
        read = self._encoder().reader.read(picture, Access(urls=self.allow_urls))
        width, height = read.size
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):  # also refuses nan
            raise QvlError(
                f"/box {' '.join(parts[:4])} is no box on a picture of {width} x {height} pixels; "
                "expected 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height"
            )
        box = self.model.blob.family.grounding.mark((x1, y1, x2, y2), read)
        question = parts[4] if len(parts) > 4 else "What is this?"
        self._ask([{"type": "box", "text": box}, {"text": question}])

    def _do_show(self, rest: str) -> None:
        if not self._boxes:
            raise QvlError("the last answer has no boxes to show")
        out = user_path(_unquoted(rest) or "boxes.png")
        seen = [source for query, _ in self.history for source in pictures(query)]
        check_no_input(out, [self.model.blob.path, *seen, *self._waiting])
        picture = self._opened(self._spoken_of())
        if note := draw_boxes(picture, self._boxes, out).note:
            self.screen.say(note)
        self.screen.say(f"saved {out}")
        if out.suffix.lower() == ".png":
            self.screen.picture(out)

    def _do_undo(self) -> None:
        if not self.history:
            raise QvlError("there is nothing to undo")
        query, _ = self.history.pop()
        self._boxes = []
        self.screen.say(f"took back {_shortened(query)}; turns left: {len(self.history)}")

    def _do_retry(self) -> None:
        if not self.history:
            raise QvlError("there is nothing to retry")
        before, self.history = self.history, self.history[:-1]
        try:
            self._answer(before[-1][0])
        except FAILURES:
            self.history = before
            raise

    def _do_clear(self) -> None:
        self.history, self._boxes, self._waiting, self._left_out = [], [], [], 0
        self.screen.say("a new conversation")

    def _do_set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").partition(" ")
        if not name:
            config = self.model.generation_config
            own = {k: v for k, v in config.to_dict().items() if k in SETTINGS}
            own |= {} if config.do_sample else {"temperature": 0}
            self.screen.say(", ".join(f"{k} {v}" for k, v in (own | self.settings).items()))
            return
        check_name(name)
        if value := value.strip():
            self.settings[name] = read_setting(name, value)
            self.screen.say(f"{name} {self.settings[name]}")
        else:
            self.settings.pop(name, None)
            self.screen.say(f"{name}: the model's own")

    def _do_save(self, rest: str) -> None:
        if not rest:
            raise QvlError("/save needs a file name")
        path = user_path(_unquoted(rest))
        if os.path.exists(path) and not is_saved(path):
            raise QvlError(f"{path}: exists and is no conversation saved with /save; name another file")
        if os.path.exists(_past(path)) and not is_past(_past(path)):
            raise QvlError(f"{_past(path)}: exists and holds no keys and values saved with /save; name another file")
        history = [(portable(query), answer) for query, answer in self.history]
        document = {"format": FORMAT, "system": self.system, "settings": self.settings, "history": history}
        try:
            with replacing(path) as file:
                file.write(json.dumps(document, ensure_ascii=False, indent=1).encode(errors="backslashreplace"))
        except OSError as error:
            raise unwritable(path, error, "name a file elsewhere") from None
        self.screen.say(f"saved {path}")
        if tokens := self.model.save_past(_past(path), self.history, system=self.system):
            nbytes = size(_past(path).stat().st_size)
            self.screen.say(f"saved {_past(path)}: {nbytes}, so that {tokens} tokens need not be computed again")

    def _do_load(self, rest: str) -> None:
        if not rest:
            raise QvlError("/load needs the name of a file that /save made")
        path = user_path(_unquoted(rest))
        self.system, self.settings, self.history = read_saved(path)
        self._boxes, self._waiting, self._left_out = [], [], 0
        self._tell_loaded(path)
        if _past(path).exists():
            try:
                self.screen.say(f"{self.model.load_past(_past(path))} tokens need not be computed again")
            except QvlError as error:
                raise QvlError(f"{error}; the conversation is computed again") from None

    def _do_quit(self) -> None:
        self.open = False

    def _tell_loaded(self, path: Path) -> None:
        named = [source for query, _ in self.history for source in pictures(query)]
        self.screen.say(f"{path}: turns {len(self.history)}, pictures {len(named)}")
        if self.history:
            self.screen.say(f"the last question was {_shortened(self.history[-1][0])}")
        for source in named:
            if isinstance(source, str) and not (is_url(source) or source.startswith("data:") or is_file(source)):
                self.screen.say(f"{source}: this picture is gone; put it back before you ask")

    # answering

    def _ask(self, asked: str | list[dict[str, Any]]) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            parts = [{"text": asked}] if isinstance(asked, str) else asked
            self._answer([*({"image": source} for source in waiting), *parts] if waiting else asked)
        except FAILURES:
            self._waiting = waiting
            raise

    def _answer(self, query: Any) -> None:
        """Answer, and add the answer to the history, also a partial one after an interrupt."""
        said: list[str] = []
        with self.screen.answering("thinking") as place:

            def show(piece: Piece) -> None:
                if piece.reasoning:
                    place.reason(piece.text)
                    return
                said.append(piece.text)
                place.show(piece.text)

            try:
                result = self.model.chat(
                    query,
                    self.history,
                    system=self.system,
                    on_piece=show,
                    allow_urls=self.allow_urls,
                    **self.settings,
                )
            except KeyboardInterrupt:
                self.history = [*self.history, (query, "".join(said).strip())]
                self._boxes = []
                raise
        if result.left_out > self._left_out:
            self.screen.warn(f"the context is full; oldest turns left out: {result.left_out}")
        if result.finish_reason == "length":
            full = result.prompt_tokens + len(result.token_ids) >= self.model.window
            remedy = "start with a larger --context" if full else "/set max_new_tokens allows more"
            tell = self.screen.warn if full or not result.text else self.screen.say
            tell(f"the answer was cut after {len(result.token_ids)} tokens; {remedy}")
        self._left_out, self.history, self._boxes = result.left_out, result.history, result.boxes

    def _encoder(self) -> PictureEncoder:
        if self.model.pictures is None:
            raise QvlError(f"{self.model.blob.path}: takes no pictures; use a vision-language model")
        return self.model.pictures

    def _opened(self, source: ImageSource) -> Image.Image:
        """Decode a picture as the model does, with or without its EXIF orientation."""
        encoder = self.model.pictures
        upright = encoder is not None and encoder.reader.upright
        return load_image(source, allow_urls=self.allow_urls, exif=upright)

    def _last_picture(self) -> ImageSource:
        """Return the picture for the next question, else the last one of the history."""
        return self._waiting[-1] if self._waiting else self._spoken_of()

    def _spoken_of(self) -> ImageSource:
        """Return the last picture of the history."""
        for query, _ in reversed(self.history):
            if found := pictures(query):
                return found[-1]
        raise QvlError("there is no picture yet; attach one with /image FILE")


def _shortened(query: Any) -> str:
    text = words(query)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _past(path: Path) -> Path:
    """Return the path of the keys and values of a saved conversation."""
    return path.with_name(f"{path.name}.past")


def dropped_files(line: str) -> list[Path]:
    """Return the paths if a line has only those of pictures, as terminals paste them: quoted, escaped, or file URLs."""
    if (whole := _dropped(line)) is not None:
        return [whole]
    try:
        paths = [_dropped(word) for word in shlex.split(line)]
    except ValueError:  # a quote that is not closed
        return []
    found = [path for path in paths if path is not None]
    return found if len(found) == len(paths) else []


def _dropped(text: str) -> Path | None:
    try:
        text = str(local_path(_unquoted(text)))
    except QvlError:  # such as file://[::1
        return None
    return user_path(text) if Path(text).suffix and _exists(text) else None


def _unquoted(text: str) -> str:
    """Remove the quotes or backslashes of a shell from a path."""
    if _exists(text):
        return text
    try:
        parts = shlex.split(text)
    except ValueError:
        return text
    return parts[0] if len(parts) == 1 else text


def _exists(text: str) -> bool:
    try:
        return is_file(user_path(text))
    except QvlError:
        return False
