"""Parquet files as rows, and results as a Parquet file."""

from __future__ import annotations

import bisect
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_runtime.batch.rows import Ids, Row, misnamed, row_of_fields
from qvl_runtime.errors import QvlError

COLUMNS = ("id", "prompt", "image", "images")
SCAN_ROWS = 4096
READ_BYTES = 4 << 20
"""Rows that are decoded at once have about this size. A row group may hold the pictures of the whole file."""
BUFFER_BYTES = 1 << 20
"""Bytes of a column that are read at once. Without a buffer pyarrow reads all of a row group."""


def pyarrow() -> Any:
    """Import the optional package.

    Raises
    ------
    QvlError
        If it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise QvlError("Parquet files need the package pyarrow: pip install 'qvl-runtime[batch]'") from None
    return pyarrow


class ParquetFiles:
    """Columns "id", "prompt", and "image" or "images" of some Parquet files; see `Source`."""

    openai = False

    def __init__(self, paths: Sequence[Path], root: Path):
        self.root, self._paths = root, list(paths)
        self._groups: list[tuple[int, int]] = []
        """Files and row groups."""
        self._starts = [0]
        """First row of each group, then the number of all rows."""
        ids = Ids()
        for index, path in enumerate(paths):
            with _opened(path) as file:
                names = file.schema_arrow.names
                if "id" not in names:
                    there = ", ".join(names)[:200]
                    raise QvlError(f"{path}: has no column id; it has {there}; add one with another value in each row")
                if found := misnamed(names):
                    raise QvlError(f"{path}: has a column {found}")
                for group in range(file.num_row_groups):
                    self._groups.append((index, group))
                    self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)
                place = 0
                columns = [name for name in ("id", "prompt") if name in file.schema_arrow.names]
                for batch in file.iter_batches(SCAN_ROWS, columns=columns):
                    for fields in batch.to_pylist():
                        place += 1
                        ids.add(row_of_fields(0, fields), f"{path}: row {place}")
        self._ids = ids.hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def fingerprint(self) -> dict[str, Any]:
        sizes = [path.stat().st_size for path in self._paths]
        return {"files": [path.name for path in self._paths], "bytes": sizes, "ids": self._ids}

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        return list(self._rows(start, stop))

    def _rows(self, start: int, stop: int) -> Iterator[Row]:
        number = start
        while number < stop:
            group = bisect.bisect_right(self._starts, number) - 1
            first, end = self._starts[group], min(self._starts[group + 1], stop)
            index, inner = self._groups[group]
            with _opened(self._paths[index]) as file:
                columns = [name for name in COLUMNS if name in file.schema_arrow.names]
                nbytes = max(file.metadata.row_group(inner).total_byte_size, 1)
                at_once = READ_BYTES * (self._starts[group + 1] - first) // nbytes
                place = first
                for batch in file.iter_batches(min(max(at_once, 1), SCAN_ROWS), row_groups=[inner], columns=columns):
                    if place + len(batch) > number:
                        for fields in batch.slice(number - place, end - number).to_pylist():
                            yield row_of_fields(number, fields)
                            number += 1
                    place += len(batch)
                    if number == end:
                        break
                else:
                    raise QvlError(f"{self._paths[index]}: has fewer rows than it names; check the file")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    arrow = pyarrow()
    if not path.is_file():
        raise QvlError(f"{path}: no such file, or no regular one; name the input")
    try:
        with arrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except QvlError:
        raise
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QvlError(f"{path}: cannot be read as Parquet ({reason}); check the file") from None


def to_parquet(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Encode records of `records.answered` as a Parquet file."""
    pa = pyarrow()
    box = pa.struct([("ref", pa.string()), ("numbers", pa.list_(pa.float64())), ("pixels", pa.list_(pa.int64()))])
    usage = pa.struct([("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("row", pa.int64()),
            ("text", pa.string()),
            ("reasoning", pa.string()),
            ("boxes", pa.list_(box)),
            ("finish_reason", pa.string()),
            ("usage", usage),
            ("error", pa.string()),
        ]
    )
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(list(records), schema), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(path: Path) -> list[dict[str, Any]]:
    """Read a file of `to_parquet`."""
    with _opened(path) as file:
        return file.read().to_pylist()
