"""A user's turn of a conversation: its text, its pictures, and its form in a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import as_path
from qvl_runtime.inputs.image_tags import split_images
from qvl_runtime.inputs.images import ImageSource, load_image
from qvl_runtime.inputs.prompt import SOURCE_KEYS


def words(query: Any) -> str:
    """Return the text of a turn on one line."""
    if isinstance(query, str):
        return " ".join("".join(_split(query)[0::2]).split())
    return " ".join(" ".join(str(piece.get("text", "")) for piece in query).split())


def pictures(query: Any) -> list[ImageSource]:
    """Return the pictures of a turn and the frames of its videos, in order."""
    if isinstance(query, str):
        return [path for path in _split(query)[1::2] if path]
    found: list[ImageSource] = []
    for piece in query:
        found += [source for key in SOURCE_KEYS if (source := _source(piece.get(key)))]
        found += piece.get("video") or ()
    return found


def _split(text: str) -> list[str]:
    try:
        return split_images(text)
    except QvlError:  # a text-only model was asked about tags
        return [text]


def _source(value: Any) -> ImageSource | None:
    return value.get("url") if isinstance(value, Mapping) else value


def portable(query: Any) -> Any:
    """Convert a turn to JSON types that do not depend on the working directory.

    Paths become absolute; a picture or a frame without a path becomes a ``data:`` URL.
    """
    if isinstance(query, str):
        parts = _split(query)
        return "".join(f"<img>{_portable(part)}</img>" if i % 2 else part for i, part in enumerate(parts))
    return [{key: _portable_value(key, value) for key, value in piece.items()} for piece in query]


def _portable_value(key: str, value: Any) -> Any:
    if key in SOURCE_KEYS:
        return _portable(value)
    if key == "video":
        return [_portable(frame) for frame in value]
    if key == "times":
        return [float(time) for time in value]
    return float(value) if key == "fps" else value


def _portable(source: Any) -> Any:
    if isinstance(source, Mapping):
        return {**source, "url": _portable(source["url"])} if "url" in source else dict(source)
    if isinstance(source, str | Path):
        return str(Path(source).absolute()) if is_file(source) else str(source)
    data = io.BytesIO()
    load_image(source).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def user_path(text: str) -> Path:
    """Expand ``~`` in a path.

    Raises
    ------
    QvlError
        If there is no such user, or the path is invalid.
    """
    try:
        return as_path(text).expanduser()
    except RuntimeError:
        raise QvlError(f"{text}: there is no such user; write the path without ~") from None


def is_file(path: str | Path) -> bool:
    """Whether a text is the path of an existing file."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long for a path, or a NUL byte
        return False
