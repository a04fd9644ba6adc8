"""Chat messages of a request: validation, and conversion for `Model.stream`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.resolution import Resolution
from qvl_runtime.openai.errors import refused
from qvl_runtime.openai.fields import array, mapping, text, wrong
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.pictures import Sent, checked_url, decoded
from qvl_runtime.openai.tools import read_calls

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of a message, and their names for the model."""


class PicturePart(NamedTuple):
    """A place for the picture with this number, in the resolution that it asks for."""

    number: int
    resolution: Resolution | None = None


class BoxPart(NamedTuple):
    """A box: the number of its picture, and the corners in pixels."""

    number: int
    corners: tuple[float, ...]
    name: str


class VideoPart(NamedTuple):
    """A video: the numbers of its frames among the pictures, and its "fps" or "times", if given."""

    numbers: range
    timing: dict[str, Any]


Part = str | PicturePart | BoxPart | VideoPart
ReadPart = Callable[[Mapping[str, Any], str, str], Part]
"""Reads a part: its fields, its name in errors, and the role of its message."""


class Message(NamedTuple):
    """A message: the role for the model, the parts, and an assistant's calls and reasoning."""

    role: str
    parts: list[Part]
    calls: list[dict[str, Any]]
    reasoning: str | None


@dataclasses.dataclass
class Messages:
    """The messages of a request.

    Attributes
    ----------
    turns : list of Message
    sources : list of bytes or str
        The pictures, also those of videos, in order: image files, or allowed URLs.
    field : str
        The request's name of the messages, for errors.
    """

    turns: list[Message]
    sources: list[str | bytes]
    field: str = "messages"

    @property
    def resolutions(self) -> dict[int, Resolution]:
        """The resolutions that pictures ask for, by their numbers."""
        parts = (part for turn in self.turns for part in turn.parts if isinstance(part, PicturePart))
        return {part.number: part.resolution for part in parts if part.resolution is not None}

    def for_model(self, pictures: Sequence[Sent], mark: Callable[[Sequence[float], int], str]) -> list[dict]:
        """Convert for `Model.stream`; `mark` writes a box on the picture with a number in the model's notation."""
        return [
            {
                "role": turn.role,
                "content": _content(turn.parts, pictures, mark),
                "tool_calls": turn.calls,
                "reasoning_content": turn.reasoning,
            }
            for turn in self.turns
        ]


def _content(parts: Sequence[Part], pictures: Sequence[Sent], mark: Callable[..., str]) -> list[dict]:
    made = []
    for part in parts:
        if isinstance(part, PicturePart):
            more = {} if part.resolution is None else part.resolution.to_part()
            made.append({"type": "image", "image": pictures[part.number].content, **more})
        elif isinstance(part, VideoPart):
            made.append({"type": "video", "video": [pictures[i].content for i in part.numbers], **part.timing})
        elif isinstance(part, BoxPart):
            _check_size(part, pictures)
            made.append({"type": "box", "text": mark(part.corners, part.number)})
        else:
            made.append({"type": "text", "text": part})
    return made


def _check_size(box: BoxPart, pictures: Sequence[Sent]) -> None:
    if box.number >= len(pictures):
        raise refused(f"{box.name}.image is {box.number}, but the request has {len(pictures)} pictures", box.name)
    _, width, height = pictures[box.number]
    x1, y1, x2, y2 = box.corners
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise refused(f"{box.name}.pixels is no box on a picture of {width} x {height} pixels", box.name)


def read_messages(value: Any, limits: Limits, allow_urls: bool) -> Messages:
    """Check the messages of a request.

    Raises
    ------
    ApiError
        For an unknown role or part, a wrong type, a picture that is not a URI, too many of them, or too much text.
    """
    listed = array(value, "messages")
    if not listed:
        raise refused("messages is empty: it needs a user's message", "messages")
    reader = MessageReader(limits, allow_urls)
    turns = [reader.message(mapping(data, f"messages[{i}]"), f"messages[{i}]") for i, data in enumerate(listed)]
    return Messages(turns, reader.sources)


class MessageReader:
    """Reads messages, and counts pictures and characters.

    Attributes
    ----------
    sources : list of bytes or str
        The pictures so far; see `Messages`.
    """

    def __init__(self, limits: Limits, allow_urls: bool):
        self.sources: list[str | bytes] = []
        self._limits, self._allow_urls, self._text, self._frames = limits, allow_urls, 0, 0

    def message(self, data: Mapping[str, Any], name: str) -> Message:
        """Read the message in the field `name`."""
        role = read_role(data, name, ROLES)
        content, where = data.get("content"), f"{name}.content"
        calls = read_calls(data.get("tool_calls"), f"{name}.tool_calls")
        if calls and role != "assistant":
            raise refused(f"{name}.tool_calls: only an assistant's message has calls", f"{name}.tool_calls")
        for call in calls:
            self.counted("".join(call.values()), f"{name}.tool_calls")
        reasoning = data.get("reasoning_content") if role == "assistant" else None
        if reasoning is not None:
            self.counted(reasoning, f"{name}.reasoning_content")
        if content is None and calls:
            return Message(ROLES[role], [], calls, reasoning)
        return Message(ROLES[role], self.content(content, where, role, self.part), calls, reasoning)

    def content(self, value: Any, name: str, role: str, read: ReadPart) -> list[Part]:
        """Read a text, or an array of parts, each with `read`."""
        if isinstance(value, str):
            return [self.counted(value, name)]
        if not isinstance(value, list):
            raise wrong(value, name, "a string or an array of parts")
        return [read(mapping(part, f"{name}[{i}]"), f"{name}[{i}]", role) for i, part in enumerate(value)]

    def part(self, part: Mapping[str, Any], name: str, role: str) -> Part:
        """Read a part of a message with this role."""
        kind = text(part.get("type"), f"{name}.type")
        if kind == "text":
            return self.counted(part.get("text"), f"{name}.text")
        if kind not in ("image_url", "box", "video"):
            raise refused(f"{name}.type is {kind[:40]!r}; it must be text, image_url, video or box", f"{name}.type")
        check_role(role, name, box=kind == "box")
        if kind == "box":
            return _box(part, name)
        if kind == "video":
            return self._video(part, name)
        # OpenAI's format is an object. A string could be taken for a path.
        image = mapping(part.get("image_url"), f"{name}.image_url")
        return self.picture(image.get("url"), f"{name}.image_url.url", part, name)

    def picture(self, url: Any, where: str, part: Mapping[str, Any], name: str) -> PicturePart:
        """Read a picture: its URI in the field `where`, and the resolution in its part."""
        return self._picture(checked_url(text(url, where), where, self._allow_urls), part, name)

    def encoded(self, data: Any, where: str, part: Mapping[str, Any], name: str) -> PicturePart:
        """Read a picture: its file in base64 in the field `where`, and the resolution in its part."""
        return self._picture(decoded(text(data, where), where), part, name)

    def _picture(self, source: str | bytes, part: Mapping[str, Any], name: str) -> PicturePart:
        if len(self.sources) - self._frames == self._limits.pictures:
            raise refused(f"the request has more than {self._limits.pictures} pictures", name)
        self.sources.append(source)
        try:
            resolution = Resolution.of_part(part)
        except QvlError as error:
            raise refused(f"{name}: {error}", name) from None
        return PicturePart(len(self.sources) - 1, resolution)

    def _video(self, part: Any, name: str) -> VideoPart:
        frames, first = array(part.get("video"), f"{name}.video"), len(self.sources)
        self._frames += len(frames)
        if self._frames > self._limits.frames:
            raise refused(f"the videos of the request have more than {self._limits.frames} frames", name)
        urls = [text(frame, f"{name}.video[{i}]") for i, frame in enumerate(frames)]
        self.sources += [checked_url(url, f"{name}.video[{i}]", self._allow_urls) for i, url in enumerate(urls)]
        timing = {key: part[key] for key in ("fps", "times") if part.get(key) is not None}
        return VideoPart(range(first, len(self.sources)), timing)

    def counted(self, value: Any, name: str) -> str:
        """Read a text, and count its characters."""
        found = text(value, name)
        self._text += len(found)
        if self._text > self._limits.text:
            raise refused(f"the texts of the request have more than {self._limits.text} characters", name)
        return found


def read_role(data: Mapping[str, Any], name: str, known: Collection[str]) -> str:
    """Read the role of the message in the field `name`, one of those that are `known`."""
    role = text(data.get("role"), f"{name}.role")
    if role not in known:
        raise refused(f"{name}.role is {role[:40]!r}; it must be one of {', '.join(known)}", f"{name}.role")
    return role


def check_role(role: str, name: str, *, box: bool = False) -> None:
    """Refuse a picture, a video or a box in a message of another role than those that may have one."""
    if role != "user" and (box or role != "tool"):
        having = "a user's message has boxes" if box else "messages of a user or tool have pictures and videos"
        raise refused(f"{name}: only {having}", name)


def _box(part: Any, name: str) -> BoxPart:
    number, pixels = part.get("image", 0), array(part.get("pixels"), f"{name}.pixels")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise refused(f"{name}.image must be the number of a picture, from 0 on", f"{name}.image")
    if len(pixels) != 4 or not all(_is_coordinate(value) for value in pixels):
        raise refused(f"{name}.pixels must be four numbers: left, top, right, bottom", f"{name}.pixels")
    return BoxPart(number, tuple(float(value) for value in pixels), name)


def _is_coordinate(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and -1e9 < value < 1e9
