"""A folder of pictures as rows with the job's prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from qvl_runtime.batch.rows import Ids, Row
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import PICTURE_SUFFIXES, SUFFIXES


class PictureFolder:
    """The pictures below a folder, sorted by path; the paths are the ids. Links to folders are not followed.

    See `Source`.
    """

    openai = False

    def __init__(self, path: Path):
        self.root = path
        self._names: list[str] = []
        for folder, folders, files in os.walk(path, onerror=_unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            here = Path(folder).relative_to(path)
            shown = (
                name for name in files if Path(name).suffix.lower() in PICTURE_SUFFIXES and not name.startswith(".")
            )
            self._names += [(here / name).as_posix() for name in shown]
        self._names.sort()
        if not self._names:
            raise QvlError(
                f"{path}: has no pictures ({', '.join(SUFFIXES)}), no .tar and no .parquet files; name another"
            )

    def __len__(self) -> int:
        return len(self._names)

    def fingerprint(self) -> dict[str, Any]:
        # Not of the contents: a broken picture is replaced, and its row asked again.
        ids = Ids()
        for name in self._names:
            ids.add(Row(0, name), name)
        return {"pictures": len(self), "names": ids.hexdigest()}

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        named = enumerate(self._names[start:stop], start)
        return [Row(number, _as_text(name), None, (name,)) for number, name in named]


def _as_text(name: str) -> str:
    """Escape bytes that are no UTF-8: as question marks in the output, two names could be one."""
    return name.encode("utf-8", "backslashreplace").decode()


def _unreadable(error: OSError) -> NoReturn:
    """Stop a walk, which would leave a folder out."""
    raise QvlError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or move it elsewhere")
