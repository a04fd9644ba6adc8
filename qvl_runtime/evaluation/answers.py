"""The file of a model's answers: one per line, crash-safe, and bound to the settings they were computed with."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import differences, parse_object
from qvl_runtime.file.locking import lock
from qvl_runtime.file.opening import open_regular, read_regular
from qvl_runtime.file.writing import unwritable

MAX_FILE = 4 << 30
SYNC_EVERY = 2.0
"""Seconds between syncs to disk: a power failure may lose so much, a kill nothing."""
LARGEST = 1e9
"""Largest number of an answer: seconds, a share of a picture, or minus a log probability."""


class AnswerFile:
    """The answers of one model to one task: a header with the settings, then one line per answer.

    The file is locked until the end. Existing answers are read. A truncated last line (after a kill, or on a full
    disk) is removed.

    Parameters
    ----------
    path : Path
    made_with : mapping
        Model, task, options and data, as JSON types.

    Raises
    ------
    QvlError
        If the file has other settings, or a malformed line, or if another process has locked it.

    Attributes
    ----------
    answers : dict
        Answers by sample id.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]):
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        self._synced = self._last = time.monotonic()
        with contextlib.suppress(FileExistsError):
            path.open("xb").close()
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(open_regular(path))
            # Before it is read: the other run's answers would be neither known here nor left in the file.
            message = "another evaluation is writing to it; wait until it ends, or name another folder with --out"
            lock(held.fileno(), f"{path}: {message}")
            whole = self._take_up(dict(made_with))
            os.truncate(path, whole)  # not before: the file of another program stays as it is
            self._file: BinaryIO = stack.enter_context(path.open("ab", buffering=0))
            if not whole:
                self._write(dict(made_with))
            self._open = stack.pop_all()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._open.close()

    def begin(self) -> None:
        """Start the time measurement of the next answer."""
        self._last = time.monotonic()

    def add(self, key: str, answer: Mapping[str, Any]) -> None:
        """Append an answer, with the seconds since the previous one."""
        now = time.monotonic()
        record = {"id": key, **answer, "seconds": round(now - self._last, 6)}
        self._last = now
        self._write(record)
        self.answers[key] = record
        if now - self._synced > SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = now

    def _write(self, record: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise unwritable(self.path, error, "make room, and run again to go on") from None

    def _take_up(self, made_with: dict[str, Any]) -> int:
        """Read the answers of whole lines; return the bytes of these."""
        content = read_regular(self.path, limit=MAX_FILE)
        whole = content.rfind(b"\n") + 1
        remedy = "remove the file, or name another folder with --out"
        if content and not whole and not (json.dumps(made_with, ensure_ascii=False).encode()).startswith(content):
            raise QvlError(f"{self.path}: holds something other than answers; {remedy}")
        for number, line in enumerate(content[:whole].splitlines(), 1):
            record = parse_object(line, f"{self.path} line {number}", remedy)
            if number == 1:
                if keys := next(differences(record, made_with), None):
                    raise QvlError(f"{self.path}: its answers were made with different {': '.join(keys)}; {remedy}")
            elif not _is_answer(record):
                raise QvlError(f"{self.path} line {number}: is no answer; {remedy}")
            else:
                self.answers[record["id"]] = record
        return whole


def _is_answer(record: Mapping[str, Any]) -> bool:
    timed = isinstance(record.get("id"), str) and _are_numbers([record.get("seconds")])
    boxes = record.get("boxes", [])
    if not timed or not isinstance(boxes, list) or not all(_are_numbers(box) and len(box) == 4 for box in boxes):
        return False
    return isinstance(record.get("text"), str) or _are_numbers(record.get("likelihoods"))


def _are_numbers(values: Any) -> bool:
    listed = isinstance(values, list)
    return listed and all(isinstance(value, int | float) and abs(value) <= LARGEST for value in values)
