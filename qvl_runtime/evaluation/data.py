"""Files of a task as they lie below one folder: checked line by line, and pictures only from below it."""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_object
from qvl_runtime.file.opening import below, read_regular

MAX_FILE = 4 << 30
"""Bytes of a task's file. VQAv2's annotations have 200 MB, and MMBench's pictures lie in its table."""

REMEDY = "take the published file as it is"
SHOWN = 3
"""Missing pictures that an error names."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question of a task.

    Attributes
    ----------
    id : str
        Its name in the file of answers; no other sample of the task has it.
    where : str
        File and line, for errors.
    pictures : tuple of Path or bytes
    texts : mapping of str
        What a prompt is made of: question, phrase, hint, options.
    truth : object
        What the metric compares the answer with.
    letters : tuple of str
        The options to choose from, for tasks that are scored by likelihood.
    unit : str
        Samples of one unit make one score together.
    group : str
        Part of the task that has a score of its own.
    """

    id: str
    where: str
    pictures: tuple[Path | bytes, ...]
    texts: Mapping[str, str]
    truth: Any
    letters: tuple[str, ...] = ()
    unit: str = ""
    group: str = ""


class Line(dict):
    """An object of a task's file, which knows where it stands."""

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self.where = where

    def wrong(self, what: str) -> QvlError:
        return QvlError(f"{self.where}: {what}; {REMEDY}")

    def take(self, key: str, *kinds: type) -> Any:
        """A value that must be there and of one of some types."""
        if key not in self:
            raise self.wrong(f"has no {key!r}")
        value = self[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise self.wrong(f"{key!r} is {value!r:.60}, expected {names}")
        return value

    def text(self, key: str) -> str:
        """A text for a prompt. It must hold no picture of its own."""
        value = self.take(key, str)
        if "<img>" in value or "</img>" in value:
            raise self.wrong(f"{key!r} holds an image tag")
        return value

    def name(self, key: str) -> str:
        """An identifier, which may be a number."""
        return str(self.take(key, str, int))

    def texts(self, key: str) -> list[str]:
        """One text, or a list of at least one."""
        value = self.take(key, str, list)
        value = [value] if isinstance(value, str) else value
        if not value or not all(isinstance(item, str) for item in value):
            raise self.wrong(f"{key!r} is {value!r:.60}, expected texts")
        return value


class Data:
    """The folder of a task's files.

    Attributes
    ----------
    hashes : dict
        SHA-256 of every file that was read, by name.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise QvlError(f"{self.folder}: is no folder; --data is where the task's files lie")
        self._real = self.folder.resolve()
        self.hashes: dict[str, str] = {}

    def read(self, name: str) -> bytes:
        """A file of the task, whole."""
        content = read_regular(self.folder / name, limit=MAX_FILE, remedy="download it there, or check --data")
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        return content

    def json(self, name: str) -> dict[str, Any]:
        """A file that is one JSON object."""
        return parse_object(self.read(name), str(self.folder / name), REMEDY)

    def lines(self, name: str) -> Iterator[Line]:
        """The objects of a JSONL file; empty lines are skipped."""
        for number, line in enumerate(self.read(name).split(b"\n"), 1):
            if line.strip():
                where = f"{self.folder / name} line {number}"
                yield Line(parse_object(line, where, REMEDY), where)

    def table(self, name: str, needed: tuple[str, ...]) -> Iterator[Line]:
        """The rows of a tab-separated file with a head, as texts; a row's number is that of the line it ends on."""
        csv.field_size_limit(MAX_FILE)
        reader = csv.DictReader(io.StringIO(self._text(name), newline=""), delimiter="\t", strict=True)
        try:
            missing = [key for key in needed if key not in (reader.fieldnames or ())]
            if missing:
                raise QvlError(f"{self.folder / name} line 1: has no column {missing[0]!r}; {REMEDY}")
            for row in reader:
                line = Line(row, f"{self.folder / name} line {reader.line_num}")
                if None in row or None in row.values():
                    raise line.wrong(f"has not the {len(reader.fieldnames or ())} columns of the first")
                yield line
        except csv.Error as error:
            raise QvlError(f"{self.folder / name} line {reader.line_num}: {error}; {REMEDY}") from None

    def items(self, content: Mapping[str, Any], key: str, name: str) -> Iterator[Line]:
        """The objects of a list in a JSON file."""
        found = Line(content, str(self.folder / name)).take(key, list)
        for number, item in enumerate(found):
            where = f"{self.folder / name} {key}[{number}]"
            if not isinstance(item, dict):
                raise QvlError(f"{where}: is no object; {REMEDY}")
            yield Line(item, where)

    def rows(self, name: str, columns: int) -> Iterator[tuple[str, list[str]]]:
        """The lines of a tab-separated file without a head, with where each stands."""
        for number, line in enumerate(self._text(name).splitlines(), 1):
            if line.strip():
                where, parts = f"{self.folder / name} line {number}", line.strip().split("\t")
                if len(parts) != columns:
                    raise QvlError(f"{where}: has {len(parts)} columns instead of {columns}; {REMEDY}")
                yield where, parts

    def names(self, folder: str, ending: str) -> list[str]:
        """Files of a folder below this one, sorted."""
        path = self.folder / folder
        found = sorted(f"{folder}/{item.name}" for item in path.glob(f"*{ending}")) if path.is_dir() else []
        if not found:
            raise QvlError(f"{path}: has no *{ending} file; download them there, or check --data")
        return found

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def picture(self, source: str, where: str) -> Path:
        """Where a picture lies. The published files name them from the folder above, ``data/…``.

        Raises
        ------
        QvlError
            For a name that leads out of the folder. Whether the picture is there is checked by `check_pictures`.
        """
        relative = Path(source)
        within = [relative]
        if relative.parts[:1] == ("data",):
            within.insert(0, Path(*relative.parts[1:]))
        places = [below(self.folder, path) for path in within] if source and "\0" not in source else [None]
        inside = [place for place in places if place is not None]
        if len(inside) < len(places):
            raise QvlError(f"{where}: picture {source!r:.200} does not lie below {self.folder}; move it there")
        return next((place for place in inside if place.exists()), inside[0])

    def relative(self, picture: Path) -> str:
        """A picture's place below the folder."""
        return picture.relative_to(self._real).as_posix()

    def embedded(self, line: Line, key: str) -> bytes:
        """A picture that stands in a table as base64."""
        try:
            return base64.b64decode(line.take(key, str), validate=True)
        except (ValueError, binascii.Error) as error:
            raise line.wrong(f"{key!r} is no base64 ({error})") from None

    def _text(self, name: str) -> str:
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise QvlError(f"{self.folder / name}: is no UTF-8 text ({error.reason}); {REMEDY}") from None


def check_pictures(samples: list[Sample]) -> list[tuple[Path, int]]:
    """Places and sizes of all pictures that are files.

    Raises
    ------
    QvlError
        Some are missing: it names the first of them, with the lines that ask for them.
    """
    sizes, missing = {}, []
    for sample in samples:
        for picture in sample.pictures:
            if isinstance(picture, Path):
                try:
                    sizes[picture] = picture.stat().st_size
                except OSError:
                    missing.append(f"{picture} ({sample.where})")
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise QvlError(
            f"{len(missing)} pictures are missing: {', '.join(missing[:SHOWN])}{more}; download them, or check --data"
        )
    return sorted(sizes.items())


def unique(samples: list[Sample]) -> list[Sample]:
    """The samples, none of which may have the id of another.

    Raises
    ------
    QvlError
        It names both lines.
    """
    seen: dict[str, str] = {}
    for sample in samples:
        if sample.id in seen:
            raise QvlError(f"{sample.where}: has the id {sample.id!r} of {seen[sample.id]}; {REMEDY}")
        seen[sample.id] = sample.where
    return samples
