"""A user's turn of a conversation: its words, its pictures, and how a file keeps both."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.image_tags import split_images
from qvl_runtime.inputs.images import ImageSource, load_image

SOURCE_KEYS = ("image", "image_url", "url")
"""Keys under which a piece of a turn may name its picture."""


def words(query: Any) -> str:
    """What a turn says besides its pictures, on one line."""
    if isinstance(query, str):
        return " ".join("".join(_split(query)[0::2]).split())
    return " ".join(" ".join(str(piece.get("text", "")) for piece in query).split())


def pictures(query: Any) -> list[ImageSource]:
    """The pictures of a turn, in order."""
    if isinstance(query, str):
        return [path for path in _split(query)[1::2] if path]
    return [source for piece in query for key in SOURCE_KEYS if (source := _source(piece.get(key)))]


def _split(text: str) -> list[str]:
    try:
        return split_images(text)
    except QvlError:  # a model without pictures was asked about tags
        return [text]


def _source(value: Any) -> ImageSource | None:
    return value.get("url") if isinstance(value, Mapping) else value


def portable(query: Any) -> Any:
    """A turn as JSON can hold it and another folder can read it.

    Paths become absolute; a picture that has none becomes a ``data:`` URL.
    """
    if isinstance(query, str):
        parts = _split(query)
        return "".join(f"<img>{_portable(part)}</img>" if i % 2 else part for i, part in enumerate(parts))
    return [{key: _portable(value) if key in SOURCE_KEYS else value for key, value in p.items()} for p in query]


def _portable(source: Any) -> Any:
    if isinstance(source, Mapping):
        return {**source, "url": _portable(source["url"])} if "url" in source else dict(source)
    if isinstance(source, str | Path):
        return str(Path(source).absolute()) if is_file(source) else str(source)
    data = io.BytesIO()
    load_image(source).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def user_path(text: str) -> Path:
    """The path a user typed, with ``~`` replaced.

    Raises
    ------
    QvlError
        When there is no such user, or no path can look like this.
    """
    if "\0" in text:
        raise QvlError(f"{text!r}: a path has no NUL character; leave it out")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise QvlError(f"{text}: there is no such user; write the path without ~") from None


def is_file(path: str | Path) -> bool:
    """Whether a text is the path of a file, whatever else it may be."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # longer than a path may be, a NUL in it
        return False
