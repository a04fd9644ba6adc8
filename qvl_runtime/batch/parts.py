"""The output folder of a job: one file per block, and a manifest that identifies the job."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_kernels.atomic import SUFFIX, replacing
from qvl_runtime.batch.parquet import from_parquet, pyarrow, to_parquet
from qvl_runtime.batch.records import Record, is_record
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import MAX_JSON, differences, parse_object
from qvl_runtime.file.locking import lock
from qvl_runtime.file.opening import open_regular, read_regular
from qvl_runtime.file.writing import unwritable

FORMATS = ("jsonl", "parquet")
MANIFEST = "job.json"
LOCK = ".lock"


class Parts:
    """The output of a job.

    Parameters
    ----------
    folder : Path
        Created if missing.
    form : str
        One of `FORMATS`.
    blocks : int
        Number of blocks.
    """

    def __init__(self, folder: Path, form: str, blocks: int):
        if form not in FORMATS:
            raise QvlError(f"--format {form!r} is unknown; choose one of {', '.join(FORMATS)}")
        if form == "parquet":
            pyarrow()
        self.folder, self._form, self._blocks = folder, form, blocks

    def path(self, block: int) -> Path:
        """Return the path of a block's records."""
        return self.folder / f"part-{block:06d}.{self._form}"

    def missing(self) -> list[int]:
        """Return the blocks without a file."""
        there = {name.name for name in os.scandir(self.folder)}
        return [block for block in range(self._blocks) if self.path(block).name not in there]

    def write(self, block: int, records: Sequence[Record]) -> None:
        """Write a block atomically.

        Raises
        ------
        QvlError
            If it cannot be written, such as on a full disk.
        """
        content = _to_lines(records)
        if self._form == "parquet":  # with the characters that lines would have: half of one is none
            content = to_parquet([json.loads(line) for line in content.splitlines()])
        _write(self.path(block), content)

    def read(self, block: int, rows: int) -> list[Record]:
        """Read the records of a block.

        Raises
        ------
        QvlError
            If it does not hold the records of as many rows.
        """
        path = self.path(block)
        if self._form == "parquet":
            records = from_parquet(path)
        else:
            with open_regular(path) as file:
                records = [parse_object(line, f"{path}: line {n}", "delete the file") for n, line in enumerate(file, 1)]
        if len(records) != rows or not all(map(is_record, records)):
            raise QvlError(f"{path}: does not hold the answers to {rows} rows, as this job wrote it; delete the file")
        return records

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder, lock it against other jobs, and remove partial files of a killed one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Not open(): it would empty the file that a link names, and wait for the writer of a pipe.
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with open(handle, "rb"):
            message = "another job is writing to it; wait until it ends, or take another folder"
            lock(handle, f"{self.folder}: {message}")
            for entry in os.scandir(self.folder):
                if _is_partial(entry.name):
                    os.unlink(entry.path)
            yield


def _is_partial(name: str) -> bool:
    return name.startswith((".part-", f".{MANIFEST}.")) and name.endswith(SUFFIX)


def _write(path: Path, content: bytes) -> None:
    try:
        with replacing(path, private=False, durable=True) as file:
            file.write(content)
    except OSError as error:
        raise unwritable(path, error, "make room, and run again to go on") from None


def _to_lines(records: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for r in records)


def check_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Compare the facts that a job's output depends on with the manifest of a folder; write nothing.

    Raises
    ------
    QvlError
        If the folder belongs to another job, or holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise QvlError(f"{folder}: is a file; name a folder for the output")
    path, names = folder / MANIFEST, os.listdir(folder) if folder.exists() else []
    if MANIFEST in names:
        written = parse_object(read_regular(path, limit=MAX_JSON), str(path), "take another folder")
        if (begun := written.get("qvl")) != facts["qvl"]:
            raise QvlError(
                f"{folder}: was begun by qvl {begun!r:.40}, and qvl {facts['qvl']} may answer otherwise; finish it "
                "with that version, or take another folder"
            )
        differing = differences(json.loads(_to_manifest(facts)), written)
        # options by their own names, as the user gave them
        if unlike := dict.fromkeys(keys[:2][-1] if keys[0] in ("options", "load") else keys[0] for keys in differing):
            raise QvlError(
                f"{folder}: holds the output of another job (it differs in {', '.join(unlike)}); take another "
                "folder, or the arguments that it was begun with"
            )
    elif any(name != LOCK and not _is_partial(name) for name in names):
        raise QvlError(f"{folder}: is not empty and holds no job; take another folder")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, unless there is one."""
    if not (folder / MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / MANIFEST, _to_manifest(facts))


def _to_manifest(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
