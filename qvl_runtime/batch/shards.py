"""WebDataset tar files as rows: members with the same name up to the first dot are one row.

``000.jpg`` and ``000.txt`` are a picture and its prompt; ``000.json`` may give "id" and "prompt" instead.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from qvl_runtime.batch.folder import SUFFIXES
from qvl_runtime.batch.rows import Ids, Row, row_of_fields
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_object
from qvl_runtime.file.opening import open_regular
from qvl_runtime.inputs.images import MAX_FILE_BYTES

MAX_TEXT = 1 << 20
"""Largest prompt in bytes."""


@dataclasses.dataclass(frozen=True)
class Member:
    """The location of a file in a shard."""

    suffix: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """The files of a row."""

    shard: int
    key: str
    members: tuple[Member, ...]


class TarShards:
    """The samples of some tar files; see `Source`."""

    def __init__(self, paths: Sequence[Path], root: Path):
        self.root, self._paths = root, list(paths)
        self._samples = [sample for shard, path in enumerate(paths) for sample in _samples(shard, path)]
        ids = Ids()
        for number, sample in enumerate(self._samples):
            ids.add(self._row(number).id, f"{self._paths[sample.shard]}: {sample.key}")
        self._ids = ids.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def fingerprint(self) -> dict[str, Any]:
        sizes = [path.stat().st_size for path in self._paths]
        return {"shards": [path.name for path in self._paths], "bytes": sizes, "ids": self._ids}

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        return [self._row(number, pictures=True) for number in range(start, stop)]

    def _row(self, number: int, *, pictures: bool = False) -> Row:
        """Read a row; without `pictures` only the members needed for its id."""
        sample = self._samples[number]
        fields: dict[str, Any] = {"id": sample.key, "images": []}
        with open_regular(self._paths[sample.shard]) as file:
            for member in sample.members:
                limit = MAX_FILE_BYTES if member.suffix in SUFFIXES else MAX_TEXT
                if member.size > limit:
                    return Row(number, sample.key, error=f"a file {member.suffix} has more than {limit >> 20} MiB")
                if member.suffix in SUFFIXES and not pictures:
                    continue
                file.seek(member.offset)
                content = file.read(member.size)
                if member.suffix in SUFFIXES:
                    fields["images"].append(content)
                elif member.suffix == ".txt":
                    fields["prompt"] = content.decode("utf-8", "replace")
                elif member.suffix == ".json":
                    try:
                        told = parse_object(content, f"{sample.key}.json", "correct it")
                    except QvlError as error:
                        return Row(number, sample.key, error=str(error))
                    fields |= {name: told[name] for name in ("id", "prompt") if name in told}
        return row_of_fields(number, fields)


def _samples(shard: int, path: Path) -> Iterator[Sample]:
    key, members = "", list[Member]()
    for name, offset, size in _members(path):
        whole = PurePosixPath(name)
        stem, dot, _ = whole.name.partition(".")
        here = os.fspath(whole.parent / stem)
        if not dot:
            continue
        if here != key and members:
            yield Sample(shard, key, tuple(members))
            members = []
        key = here
        members.append(Member(whole.suffix.lower(), offset, size))
    if members:
        yield Sample(shard, key, tuple(members))


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, member.offset_data, member.size
                tar.members = []  # type: ignore[attr-defined]  # It would keep them all.
    except tarfile.TarError as error:
        raise QvlError(f"{path}: cannot be read as a tar file ({error}); unpack .tar.gz and others first") from None
