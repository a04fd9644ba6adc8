"""A JSON Lines file as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qvl_runtime.batch.rows import URLS, Ids, Row, row_of_fields
from qvl_runtime.errors import QvlError
from qvl_runtime.file.json_text import parse_object
from qvl_runtime.file.opening import open_regular

MAX_LINE = 64 << 20
"""Largest line in bytes. An embedded picture takes four thirds of its file's size."""

INDEX_EVERY = 64
"""Number of lines per entry of the index."""


class JsonLines:
    """Lines of ``{"id", "prompt", "image" or "images"}``, or of OpenAI's batch format; see `Source`."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root, self.openai = path, root, False
        ids, offsets, count, digest = Ids(), [], 0, hashlib.sha256()
        with open_regular(path, remedy="name the input") as file:
            for offset, number, line in _lines(file):
                if count % INDEX_EVERY == 0:
                    offsets.append((offset, number))
                digest.update(line if line is not None else b"-")
                row = self._row(count, number, line)
                self.openai |= row.body is not None
                ids.add(row, f"{path}: line {number}")
                count += 1
        self._count, self._offsets = count, np.array(offsets, np.int64).reshape(-1, 2)
        self._fingerprint = {"lines": count, "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        if start >= stop:
            return []
        offset, number = (int(value) for value in self._offsets[start // INDEX_EVERY])
        first = start - start % INDEX_EVERY
        found = []
        with open_regular(self.path, remedy="name the input") as file:
            file.seek(offset)
            for count, (_, line_number, line) in enumerate(_lines(file, number), first):
                if count >= start:
                    found.append(self._row(count, line_number, line))
                if count == stop - 1:
                    break
        if len(found) != stop - start:
            raise QvlError(f"{self.path}: has fewer lines than before; leave it as it is while the job runs")
        return found

    def _row(self, count: int, number: int, line: bytes | None) -> Row:
        where = f"line {number}"
        if line is None:
            return Row(count, None, error=f"{where} has more than {MAX_LINE >> 20} MiB; name the pictures' files in it")
        try:
            fields = parse_object(line, where, "correct it")
        except QvlError as error:
            return Row(count, None, error=str(error))
        return _openai(count, fields) if "custom_id" in fields or "body" in fields else row_of_fields(count, fields)


def _lines(file: BinaryIO, number: int = 1) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield non-blank lines: offset, number, and content, or None if too long."""
    offset = file.tell()
    while line := file.readline(MAX_LINE + 1):
        begin, size, rest = offset, len(line), line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE)):
            size += len(rest)
        offset += size
        if size > MAX_LINE:
            yield begin, number, None
        elif stripped := line.strip():
            yield begin, number, stripped
        number += 1


def _openai(count: int, fields: Mapping[str, Any]) -> Row:
    """Parse a line of OpenAI's batch format. An invalid one has a body too: that gives its error OpenAI's form."""
    row_id, body, url = fields.get("custom_id"), fields.get("body"), fields.get("url")
    if not isinstance(row_id, str) or not row_id:
        return Row(count, None, body={}, error="custom_id must be a text")
    method = fields.get("method", "POST")
    if method != "POST" or url not in URLS:
        asked = f"method {method!r:.40} and url {url!r:.80}"
        return Row(count, row_id, body={}, error=f"{asked}: only POST to {', '.join(URLS)} is known")
    if not isinstance(body, Mapping):
        return Row(count, row_id, body={}, error="body must be an object")
    return Row(count, row_id, url=url, body=body)
