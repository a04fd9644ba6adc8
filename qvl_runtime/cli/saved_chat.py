"""Reading files of the chat's `/save`. They are untrusted: every field is checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qvl_runtime.cli.settings import check_name, read_setting
from qvl_runtime.engine import kv_file
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import MAX_JSON, parse_object
from qvl_runtime.file.opening import read_regular
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.inputs.video import is_number

FORMAT = "qvl conversation 1"
REMEDY = "name a file that /save wrote"
PIECES = ("text", "image", "ref", "box", "type", "url", "image_url", "video", "times", "fps")
"""Allowed keys of a query's pieces."""
LISTS: dict[str, Callable[[Any], bool]] = {"video": lambda source: isinstance(source, str), "times": is_number}
"""Keys of lists, and the check of what they hold."""


class SavedChat(NamedTuple):
    """A saved conversation; see `Conversation`."""

    system: str | None
    settings: dict[str, Any]
    history: list[tuple[Any, str | None]]


def read_saved(path: str | os.PathLike) -> SavedChat:
    """Read a saved conversation.

    Raises
    ------
    QvlError
        If the file cannot be read or is not a saved conversation; names the first problem.
    """
    document = parse_object(read_regular(path, limit=MAX_JSON, remedy=REMEDY), f"{path}:", REMEDY)
    try:
        if document.get("format") != FORMAT:
            raise QvlError("is no conversation saved with /save")
        if not isinstance(document.get("system"), str | None):
            raise QvlError("'system' is no text")
        return SavedChat(document.get("system"), _settings(document.get("settings")), _history(document))
    except QvlError as error:
        raise QvlError(f"{path}: {error}; {REMEDY}") from None


def is_saved(path: str | os.PathLike) -> bool:
    """Whether a file is a saved conversation, as far as its format says."""
    try:
        content = read_regular(path, limit=MAX_JSON)
        return parse_object(content, "", "").get("format") == FORMAT
    except QvlError:
        return False


def is_past(path: str | os.PathLike) -> bool:
    """Whether a file holds the keys and values of a saved conversation, as far as its format says."""
    try:
        return TensorFile(path).metadata.get("format") == kv_file.FORMAT
    except QvlError:
        return False


def _settings(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise QvlError("'settings' is no object")
    for name, value in found.items():
        check_name(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise QvlError(f"the setting {name} is {value!r:.40}, expected a number")
    return {name: read_setting(name, str(value)) for name, value in found.items()}


def _history(document: Mapping[str, Any]) -> list[tuple[Any, str | None]]:
    turns = document.get("history")
    if not isinstance(turns, list):
        raise QvlError("'history' is no list of turns")
    history = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise QvlError(f"turn {number} is no pair of a question and an answer")
        query, answer = turn
        if not isinstance(query, str) and not (isinstance(query, list) and all(map(_is_piece, query))):
            raise QvlError(f"the question of turn {number} is neither a text nor a list of pieces")
        if answer is not None and not isinstance(answer, str):
            raise QvlError(f"the answer of turn {number} is no text")
        history.append((query, answer))
    return history


def _is_piece(piece: Any) -> bool:
    if not isinstance(piece, dict) or not piece or not set(piece) <= set(PIECES):
        return False
    return all(_fits(key, value) for key, value in piece.items())


def _fits(key: str, value: Any) -> bool:
    if key in LISTS:
        return isinstance(value, list) and all(map(LISTS[key], value))
    if key == "fps":
        return is_number(value)
    return isinstance(value, str) or key in ("box", "image_url")
