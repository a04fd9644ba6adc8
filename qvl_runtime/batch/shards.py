"""WebDataset tar files as rows: members with the same name up to the first dot are one row.

``000.jpg`` and ``000.txt`` are a picture and its prompt; ``000.json`` may give "id" and "prompt" instead. Nothing is
unpacked, and no link is followed.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from qvl_runtime.batch.rows import Ids, Row, row_of_fields
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_object
from qvl_runtime.file.opening import open_regular
from qvl_runtime.inputs.images import MAX_FILE_BYTES, PICTURE_SUFFIXES

MAX_TEXT = 1 << 20
"""Largest prompt in bytes."""


@dataclasses.dataclass(frozen=True)
class Member:
    """The location of a file in a shard; `error` says why it cannot be read."""

    name: str
    suffix: str
    offset: int
    size: int
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """The files of a row."""

    shard: int
    key: str
    members: tuple[Member, ...]


class TarShards:
    """The samples of some tar files; see `Source`."""

    openai = False

    def __init__(self, paths: Sequence[Path], root: Path):
        self.root, self._paths = root, list(paths)
        self._samples = [sample for shard, path in enumerate(paths) for sample in _samples(shard, path)]
        ids = Ids()
        for number, sample in enumerate(self._samples):
            ids.add(self._row(number), f"{self._paths[sample.shard]}: {sample.key}")
        self._ids = ids.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def fingerprint(self) -> dict[str, Any]:
        sizes = [path.stat().st_size for path in self._paths]
        return {"shards": [path.name for path in self._paths], "bytes": sizes, "ids": self._ids}

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        return [self._row(number, pictures=True) for number in range(start, stop)]

    def _row(self, number: int, *, pictures: bool = False) -> Row:
        """Read a row; without `pictures` only the members needed for its id and prompt."""
        sample = self._samples[number]
        fields: dict[str, Any] = {"id": sample.key, "images": []}
        with open_regular(self._paths[sample.shard]) as file:
            for member in sample.members:
                if member.error is not None:
                    return Row(number, sample.key, error=member.error)
                limit = MAX_FILE_BYTES if member.suffix in PICTURE_SUFFIXES else MAX_TEXT
                if member.size > limit:
                    return Row(number, sample.key, error=f"a file {member.suffix} has more than {limit >> 20} MiB")
                if member.suffix in PICTURE_SUFFIXES and not pictures:
                    continue
                file.seek(member.offset)
                content = file.read(member.size)
                if member.suffix in PICTURE_SUFFIXES:
                    fields["images"].append(content)
                elif member.suffix == ".txt":
                    try:
                        fields["prompt"] = content.decode("utf-8-sig")
                    except UnicodeDecodeError:
                        return Row(number, sample.key, error=f"{member.name[:200]!r} is not UTF-8; save it as such")
                elif member.suffix == ".json":
                    try:
                        told = parse_object(content, f"{sample.key}.json", "correct it")
                    except QvlError as error:
                        return Row(number, sample.key, error=str(error))
                    fields |= {name: told[name] for name in ("id", "prompt") if name in told}
        return row_of_fields(number, fields)


def _samples(shard: int, path: Path) -> Iterator[Sample]:
    key, members = "", dict[str, Member]()
    for member in _members(path):
        whole = PurePosixPath(member.name)
        stem, dot, _ = whole.name.partition(".")
        here = os.fspath(whole.parent / stem)
        if not dot or not stem:  # macOS adds a file ._NAME to many
            continue
        if here != key and members:
            yield Sample(shard, key, tuple(members.values()))
            members = {}
        key = here
        if member.name in members:
            member = dataclasses.replace(member, error=f"there are two files {member.name[:200]!r}")
        members[member.name] = member
    if members:
        yield Sample(shard, key, tuple(members.values()))


class _Headers:
    """A tar file that only headers are read of. Their sizes are not believed: memory would be taken for them."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_TEXT:
            raise tarfile.ReadError("a header in it has an impossible size")
        return self._file.read(size)


def _members(path: Path) -> Iterator[Member]:
    try:
        with open_regular(path) as file, tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
            size, before = os.fstat(file.fileno()).st_size, -1
            for member in tar:
                # Sizes below zero would lead back to the same members for ever.
                if member.size < 0 or not before < tar.offset <= size:
                    raise tarfile.ReadError("a file in it has an impossible size")
                before = tar.offset
                if not member.isdir():
                    suffix = PurePosixPath(member.name).suffix.lower()
                    error = None
                    if not member.isreg() or member.issparse():
                        error = f"{member.name[:200]!r} is a link or no plain file; put the file itself into the tar"
                    yield Member(member.name, suffix, member.offset_data, member.size, error)
                tar.members = []  # type: ignore[attr-defined]  # It would keep them all.
            # A header that it cannot read is the end to it.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("a header in it is damaged")
            while piece := file.read(MAX_TEXT):
                if piece.strip(b"\0"):
                    raise QvlError(
                        f"{path}: goes on after its end at byte {tar.offset}, as joined archives do, of which only the "
                        "first would be read; pack all their files into one, or name a folder of archives"
                    )
    except QvlError:
        raise
    except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
        raise QvlError(f"{path}: cannot be read as a tar file ({error}); unpack .tar.gz and others first") from None
