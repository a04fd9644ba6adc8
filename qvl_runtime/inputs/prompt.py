"""Prompt handling shared by all families: parts, pictures for empty slots, and turns that fit the window."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Picture
from qvl_runtime.inputs.resolution import Resized, Resolution
from qvl_runtime.inputs.video import Video

log = logging.getLogger(__name__)

Key = int | bytes
"""The content of a position: a token id, or the key of the picture whose features it holds."""


class Slot(NamedTuple):
    """The positions of a picture in a prompt, from `start` on.

    `time` is set for frames of a video whose slots are adjacent: the offset from the video's beginning, in positions.
    """

    start: int
    picture: Picture
    time: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.picture.tokens

    @property
    def key(self) -> bytes:
        """A hash of the slot's content: the picture, and its time."""
        return hashlib.sha256(self.picture.key + b"%d" % self.time).digest() if self.time else self.picture.key


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids with picture slots: the input of a model.

    Attributes
    ----------
    ids : list of int
    slots : list of Slot
        In ascending order.
    opened : str
        An incomplete box at the end of the prompt, which the answer completes.
    reasoning_end : int or None
        The token that ends the reasoning at the start of the answer; None without reasoning.
    """

    ids: list[int]
    slots: list[Slot]
    opened: str = ""
    reasoning_end: int | None = None

    @property
    def keys(self) -> list[Key]:
        """The content of each position."""
        keys: list[Key] = list(self.ids)
        for slot in self.slots:
            keys[slot.start : slot.end] = [slot.key] * slot.picture.tokens
        return keys

    @property
    def pictures(self) -> list[Picture]:
        return [slot.picture for slot in self.slots]


class ChatPrompt(NamedTuple):
    """The prompt of a chat's next turn.

    Attributes
    ----------
    prompt : Prompt
    query : str or list of dict
        The user's turn, as an entry of the history.
    left_out : int
        Number of turns, from the oldest on, that did not fit the window.
    """

    prompt: Prompt
    query: Any
    left_out: int


class Window(NamedTuple):
    """The rule for leaving out turns of a history.

    Attributes
    ----------
    history : int
        From the newest turn back, turns are included while they and the system prompt have fewer tokens than this. The
        query is not counted and always included.
    tokens : float
        Upper limit of the whole prompt.
    block : int
        Turns are left out in blocks of at least this many tokens, so that the next prompts share a prefix. With 1, the
        published rule, every prompt begins differently.
    """

    history: int = 6144
    tokens: float = math.inf
    block: int = 1

    def left_out(self, system: int, turns: Sequence[int], query: int) -> int:
        """Return how many turns to leave out, from the oldest on, given the tokens of system, turns and query."""
        size, kept = system, 0
        for length in reversed(turns):
            size += length
            if size >= self.history or size > self.tokens - query:
                break
            kept += 1
        left_out = len(turns) - kept
        tokens = sum(turns[:left_out])
        wanted = math.ceil(tokens / self.block) * self.block
        while tokens < wanted and left_out < len(turns) - 1:
            tokens += turns[left_out]
            left_out += 1
        return left_out


@dataclasses.dataclass
class Place:
    """A place for a picture in a text; `fill` sets missing sources.

    Attributes
    ----------
    source : image source, Video or None
    resolution : Resolution or None
        The picture's own, if it has one.
    """

    source: ImageSource | Video | None
    resolution: Resolution | None = None

    @property
    def filled(self) -> ImageSource | Resized | Video:
        """The source, after `fill`."""
        assert self.source is not None, "places are filled before they are encoded"
        if self.resolution is None or isinstance(self.source, Video):
            return self.source
        return Resized(self.source, self.resolution)

    def to_part(self) -> dict[str, Any]:
        """Return a part of a message, which becomes this place again."""
        if isinstance(self.source, Video):
            return self.source.to_part()
        return {"type": "image", "image": self.source} | ({} if self.resolution is None else self.resolution.to_part())


Parts = list[str | Place]
"""Text with places for pictures."""


def count_places(spoken: Sequence[Parts]) -> int:
    return sum(isinstance(part, Place) for parts in spoken for part in parts)


def sources(parts: Parts) -> list[ImageSource | Video]:
    """Return the pictures and videos of a text after `fill`."""
    return [part.source for part in parts if isinstance(part, Place) and part.source is not None]


def fill(spoken: Sequence[Parts], images: Sequence[ImageSource]) -> list[ImageSource]:
    """Assign images to empty places, in order; return the remaining images, which belong to the last text.

    Raises
    ------
    QvlError
        If there are too few images, or too many and the last text has places of its own.
    """
    empty = [part for parts in spoken for part in parts if isinstance(part, Place) and part.source is None]
    extra = list(images[len(empty) :])
    if len(images) < len(empty) or (extra and count_places(spoken[-1:])):
        raise QvlError(
            f"empty image slots (<img></img>, or picture parts without a source) in the prompt: {len(empty)}, images: "
            f"{len(images)}; give one for each"
        )
    for place, image in zip(empty, images):
        place.source = image
    return extra


SOURCE_KEYS = ("image", "image_url", "url")
"""Keys of a part that may hold the source of a picture; some data sets write None for the others."""


def is_image_part(part: Mapping[str, Any]) -> bool:
    """Whether a part of a message is a picture: ``{"image": …}``, or Hugging Face's or OpenAI's format."""
    return "image" in part or "image_url" in part or part.get("type") in ("image", "image_url")


def picture_place(part: Mapping[str, Any]) -> Place:
    """Return the place of a picture part."""
    return Place(_source(part), Resolution.of_part(part))


def _source(part: Mapping[str, Any]) -> ImageSource | None:
    """Return the source of a picture part; None if it takes the next of `images`."""
    source = next((part[key] for key in SOURCE_KEYS if part.get(key) is not None), None)
    if isinstance(source, Mapping):
        source = source.get("url")
        if not isinstance(source, str) or not source:
            raise QvlError(f"an image_url needs a 'url', a str; found {part!r:.80}")
    return None if isinstance(source, str) and not source else source


def part_text(part: Mapping[str, Any]) -> str:
    """Return the text of a text part."""
    text = part.get("text")
    if not isinstance(text, str):
        raise QvlError(f"the text of a part must be a str, not {type(text).__name__}")
    return text


def checked_parts(content: Any) -> list[Mapping[str, Any]]:
    """Check that a content is a list of parts; warn of one with two things, of which published code takes the first."""
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        raise QvlError(
            f"a prompt must be a str, a list of parts or messages, or token ids, not {type(content).__name__}"
        )
    for part in content:
        if not isinstance(part, Mapping):
            raise QvlError(f"a part of a prompt must be a dict, not {part!r:.80}")
        if len(things := _things(part)) > 1:
            log.warning(
                "a part of the prompt has %s: only the first is used; write a part for each", " and ".join(things)
            )
    return list(content)


def user_message(parts: Any) -> dict[str, Any]:
    """Return a list of parts as the user's message.

    Raises
    ------
    QvlError
        If it is no list of parts, or empty.
    """
    checked = checked_parts(parts)
    if not checked:
        raise QvlError("the prompt is empty; pass some text")
    return {"role": "user", "content": checked}


def _things(part: Mapping[str, Any]) -> list[str]:
    """Name what a part holds. Some data sets write None for what it does not hold."""
    found = {
        "a picture": is_image_part(part),
        "a video": part.get("video") is not None or part.get("type") == "video",
        "a text": part.get("text") is not None,
        "a box": part.get("box") is not None or part.get("ref") is not None,
    }
    return [name for name, there in found.items() if there]


def checked_images(images: Any) -> list[ImageSource]:
    """Return `images` as a list."""
    if isinstance(images, str | bytes | Path | Image.Image | np.ndarray) or hasattr(images, "read"):
        raise QvlError("images must be a list of images: write images=[image]")
    if images is not None and not isinstance(images, Sequence):
        raise QvlError(f"images must be a list of images, not {type(images).__name__}")
    if any(image is None for image in images or ()):
        raise QvlError("images has None in place of an image; leave it out")
    return list(images or ())


def checked_history(history: Any) -> list[tuple[Any, str | None]]:
    """Return `history` as a list of pairs."""
    if history is not None and (isinstance(history, str) or not isinstance(history, Sequence)):
        raise QvlError(f"history must be a list of pairs (query, answer), not {type(history).__name__}")
    for turn in history or ():
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise QvlError(f"a turn of the history must be a pair (query, answer), not {turn!r:.80}")
        if turn[1] is not None and not isinstance(turn[1], str):
            raise QvlError(f"an answer of the history must be a str or None, not {type(turn[1]).__name__}")
    return [(query, answer) for query, answer in history or ()]


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is a sequence of token ids."""
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise QvlError(f"token ids must be a 1-D array of integers, not {prompt.dtype} {list(prompt.shape)}")
        return True
    return _all_are(int | np.integer, prompt)


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    return _all_are(Mapping, prompt) and any("role" in message for message in prompt)


def message_content(message: Mapping[str, Any], number: int) -> Any:
    """Return the content of a chat message.

    Raises
    ------
    QvlError
        If it has none.
    """
    content = message.get("content")
    if content is None:
        raise QvlError(f"message {number} has no content: give a str, or a list of parts")
    return content


def _all_are(kind: Any, prompt: Any) -> bool:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        return False
    return bool(prompt) and all(isinstance(item, kind) for item in prompt)
