"""Rows of a job's input."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qvl_runtime.errors import QvlError

RESPONSES, COMPLETIONS = "/v1/responses", "/v1/completions"
URLS = ("/v1/chat/completions", RESPONSES, COMPLETIONS)
"""What lines of OpenAI's batch format may ask."""

MISNAMED = ("image_path", "image_file", "image_url", "img", "picture", "pictures", "photo")
"""Names that other tools give to "image"."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes
    ----------
    number : int
        Index in the whole input, from 0.
    id : str or None
        None if the row has no readable id.
    prompt : str or None
        None for the prompt of the job.
    pictures : tuple of (str or bytes)
        Paths, URIs, or the bytes of image files.
    url, body : str, mapping
        Fields of OpenAI's batch format; `body` is None for other formats.
    error : str or None
        Why the row cannot be answered.
    """

    number: int
    id: str | None
    prompt: str | None = None
    pictures: tuple[str | bytes, ...] = ()
    url: str = ""
    body: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def picture_count(self) -> int:
        """Number of its pictures and frames, in OpenAI's format as far as the messages or items can be read."""
        body = self.body or {}
        contents = [message.get("content") for key in ("messages", "input") for message in _mappings(body.get(key))]
        parts = list(itertools.chain.from_iterable(map(_mappings, contents)))
        videos = [part.get("video") for part in parts if part.get("type") == "video"]
        frames = sum(len(video) for video in videos if isinstance(video, list))
        return len(self.pictures) + sum(part.get("type") in ("image_url", "input_image") for part in parts) + frames


class Source(Protocol):
    """The rows of an input. It has no open file, so that it can be sent to other processes.

    Attributes
    ----------
    root : Path
        Only pictures below this folder are opened.
    openai : bool
        Whether any row is a line of OpenAI's batch format.
    """

    root: Path
    openai: bool

    def __len__(self) -> int:
        """Number of rows."""

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        """Return the rows from `start` to before `stop`; unreadable rows have an `error`."""

    def fingerprint(self) -> dict[str, Any]:
        """Return JSON values that change with the rows."""


def rows_at(source: Source, numbers: Sequence[int]) -> list[Row]:
    """Return the rows with these numbers, of which there is at least one, in ascending order."""
    first = numbers[0]
    found = source.rows(first, numbers[-1] + 1)
    return [found[number - first] for number in numbers]


class Ids:
    """The ids of an input, which must be unique, and a hash of its ids and prompts."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}
        self._digest = hashlib.sha256()

    def add(self, row: Row, where: str) -> None:
        """Add the next row; `where` is its place for errors.

        Raises
        ------
        QvlError
            If an earlier row has the same id.
        """
        for text in (row.id, row.prompt):
            written = b"-" if text is None else b"+" + text.encode("utf-8", "surrogatepass")
            self._digest.update(len(written).to_bytes(8, "little") + written)
        if row.id is None:
            return
        key = hashlib.blake2b(row.id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._seen:
            raise QvlError(f"{where} has the id {row.id[:80]!r} of {self._seen[key]}; give each row an id of its own")
        self._seen[key] = where

    def hexdigest(self) -> str:
        """Return a hash of all ids and prompts in order."""
        return self._digest.hexdigest()


def misnamed(names: Container[str]) -> str | None:
    """Return what a row without an "image" seems to have instead, which would be ignored, and the remedy."""
    if "image" in names or "images" in names:
        return None
    if name := next((name for name in ("video", "videos") if name in names), None):
        return f"{name}, which is not read; give its frames in a line of OpenAI's format"
    name = next((name for name in MISNAMED if name in names), None)
    return name and f"{name}, but no image; call it image, or images for a list"


def row_of_fields(number: int, fields: Mapping[str, Any]) -> Row:
    """Parse a row ``{"id", "prompt", "image" or "images"}``; an invalid row has an `error`."""
    row_id = fields.get("id")
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    if not isinstance(row_id, str) or not row_id:
        return Row(number, None, error="the row has no id: it must be a text or a whole number")
    prompt = fields.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        return Row(number, row_id, error=f"prompt is {prompt!r:.60}; it must be a text")
    if fields.get("image") is not None and fields.get("images") is not None:
        return Row(number, row_id, error="the row has both image and images; give one of them")
    given = fields.get("images") if fields.get("image") is None else [fields["image"]]
    if given is not None and not isinstance(given, list):
        return Row(number, row_id, error=f"images is {given!r:.60}; it must be a list")
    if found := misnamed(fields):
        return Row(number, row_id, error=f"the row has {found}")
    pictures = []
    for value in given or ():
        picture = _picture(value)
        if picture is None:
            return Row(number, row_id, error=f"{value!r:.60} is no picture: give a path, a data: URI or bytes")
        pictures.append(picture)
    return Row(number, row_id, prompt, tuple(pictures))


def _picture(value: Any) -> str | bytes | None:
    """Parse a path, URI or content; {"bytes", "path"} is the format of Hugging Face's tables."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, str | bytes) and value else None


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings in a list; none if it is not a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
