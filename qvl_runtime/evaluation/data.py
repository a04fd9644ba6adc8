"""Reading a task's files below one folder, with checks of every line; pictures must be below it, too."""

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
from qvl_runtime.file.opening import below, read_regular, shown

MAX_FILE = 4 << 30
"""Largest file of a task in bytes. VQAv2's annotations have 200 MB; MMBench's table contains its pictures."""

MAX_FIELD = (1 << 31) - 1
"""Largest field of a table in bytes: the csv module takes no larger limit on Windows."""

LETTERS = "ABCDE"
"""Letters of the options of a question, in their order."""

REMEDY = "take the published file as it is"
SHOWN = 3
"""Number of missing pictures named in an error."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question of a task.

    Attributes
    ----------
    id : str
        Unique name in the file of answers.
    where : str
        File and line, for errors.
    pictures : tuple of Path or bytes
    texts : mapping of str
        Fields of the prompt: question, phrase, hint, options.
    truth : object
        The reference for the metric.
    letters : tuple of str
        The letters of the options, for tasks scored by likelihood.
    unit : str
        Samples of a unit have one score together.
    group : str
        Part of the task with a separate score.
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
    """An object of a task's file, with its place for errors."""

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self.where = where

    def wrong(self, what: str) -> QvlError:
        return QvlError(f"{self.where}: {what}; {REMEDY}")

    def take(self, key: str, *kinds: type) -> Any:
        """Return a required value of one of some types."""
        if key not in self:
            raise self.wrong(f"has no {key!r}")
        value = self[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise self.wrong(f"{key!r} is {value!r:.60}, expected {names}")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise self.wrong(f"{key!r} is {value!r:.60}, which no file can hold as UTF-8")
        return value

    def text(self, key: str) -> str:
        """Return text for a prompt, which must not contain an image tag."""
        value = self.take(key, str)
        if "<img>" in value or "</img>" in value:
            raise self.wrong(f"{key!r} holds an image tag")
        return value

    def name(self, key: str) -> str:
        """Return an identifier, which may be a number."""
        return str(self.take(key, str, int))

    def texts(self, key: str) -> list[str]:
        """Return one text or a non-empty list of texts, as a list."""
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
        SHA-256 of every file read, by name.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise QvlError(f"{self.folder}: is no folder; --data is where the task's files lie")
        self._real = self.folder.resolve()
        self.hashes: dict[str, str] = {}

    def read(self, name: str) -> bytes:
        """Read a file of the task."""
        content = read_regular(self.folder / name, limit=MAX_FILE, remedy="download it there, or check --data")
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        return content

    def json(self, name: str) -> dict[str, Any]:
        """Read a file with one JSON object."""
        return parse_object(self.read(name), str(self.folder / name), REMEDY)

    def lines(self, name: str) -> Iterator[Line]:
        """Yield the objects of a JSONL file; empty lines are skipped."""
        for number, line in enumerate(self.read(name).split(b"\n"), 1):
            if line.strip():
                where = f"{self.folder / name} line {number}"
                yield Line(parse_object(line, where, REMEDY), where)

    def table(self, name: str, needed: tuple[str, ...]) -> Iterator[Line]:
        """Yield the rows of a tab-separated file with a header; a row's number is that of its last line."""
        csv.field_size_limit(MAX_FIELD)
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
        """Yield the objects of a list in a JSON file."""
        found = Line(content, str(self.folder / name)).take(key, list)
        for number, item in enumerate(found):
            where = f"{self.folder / name} {key}[{number}]"
            if not isinstance(item, dict):
                raise QvlError(f"{where}: is no object; {REMEDY}")
            yield Line(item, where)

    def rows(self, name: str, columns: int) -> Iterator[tuple[str, list[str]]]:
        """Yield the lines of a tab-separated file without a header, with their places."""
        for number, line in enumerate(self._text(name).split("\n"), 1):
            if line.strip():
                where, parts = f"{self.folder / name} line {number}", line.strip().split("\t")
                if len(parts) != columns:
                    raise QvlError(f"{where}: has {len(parts)} columns instead of {columns}; {REMEDY}")
                yield where, parts

    def names(self, folder: str, ending: str) -> list[str]:
        """List files of a subfolder, sorted."""
        path = self.folder / folder
        found = sorted(f"{folder}/{item.name}" for item in path.glob(f"*{ending}")) if path.is_dir() else []
        if not found:
            raise QvlError(f"{path}: has no *{ending} file; download them there, or check --data")
        return found

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def picture(self, source: str, where: str) -> Path:
        """Return the path of a picture. Published files name them relative to the parent folder, ``data/…``.

        Raises
        ------
        QvlError
            For a path outside of the folder. `check_pictures` checks whether pictures exist.
        """
        relative = Path(source)
        within = [relative]
        if relative.parts[:1] == ("data",):
            within.insert(0, Path(*relative.parts[1:]))
        places = [below(self.folder, path) for path in within] if source and "\0" not in source else [None]
        inside = [place for place in places if place is not None]
        if len(inside) < len(places):
            raise QvlError(f"{where}: picture {source!r:.200} does not lie below {self.folder}; move it there")
        return next((place for place in inside if os.path.exists(place)), inside[0])

    def relative(self, picture: Path) -> str:
        """Return a picture's path relative to the folder."""
        return picture.relative_to(self._real).as_posix()

    def embedded(self, line: Line, key: str) -> bytes:
        """Decode a base64 picture of a table."""
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
    """Return paths and sizes of all picture files.

    Raises
    ------
    QvlError
        If some are missing: names the first ones, with the lines that refer to them.
    """
    sizes, missing = {}, []
    for sample in samples:
        for picture in sample.pictures:
            if isinstance(picture, Path):
                try:
                    sizes[picture] = picture.stat().st_size
                except OSError:
                    missing.append(f"{shown(picture)} ({sample.where})")
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise QvlError(
            f"{len(missing)} pictures are missing: {', '.join(missing[:SHOWN])}{more}; download them, or check --data"
        )
    return sorted(sizes.items())


def unique(samples: list[Sample]) -> list[Sample]:
    """Check that the ids of samples are unique.

    Raises
    ------
    QvlError
        If they are not; names both lines.
    """
    seen: dict[str, str] = {}
    for sample in samples:
        if sample.id in seen:
            raise QvlError(f"{sample.where}: has the id {sample.id!r} of {seen[sample.id]}; {REMEDY}")
        seen[sample.id] = sample.where
    return samples
