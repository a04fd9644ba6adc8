"""Opens the input of a job by its file type."""

from __future__ import annotations

from pathlib import Path

from qvl_runtime.batch.folder import PictureFolder
from qvl_runtime.batch.jsonl import JsonLines
from qvl_runtime.batch.parquet import ParquetFiles
from qvl_runtime.batch.rows import Source
from qvl_runtime.batch.shards import TarShards
from qvl_runtime.errors import QvlError


def open_source(path: Path, pictures: Path | None = None) -> Source:
    """Open the rows of an input.

    Parameters
    ----------
    path : Path
        A .jsonl, .parquet or .tar file, a folder of such .parquet or .tar files, or a folder of pictures.
    pictures : Path, optional
        Folder of the pictures' paths; by default that of the input.

    Raises
    ------
    QvlError
        If the input is missing or unreadable, or two rows have the same id.
    """
    if pictures is not None and not pictures.is_dir():
        raise QvlError(f"{pictures}: no such folder; name the one that has the input's pictures")
    if path.is_dir():
        for suffix, kind in ((".tar", TarShards), (".parquet", ParquetFiles)):
            if shards := sorted(path.glob(f"*{suffix}")):
                return kind(shards, pictures or path)
        if pictures is not None:
            raise QvlError(f"{path}: is a folder of pictures itself; leave out --images {pictures}")
        return PictureFolder(path)
    root = pictures or path.parent
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLines(path, root)
        case ".parquet":
            return ParquetFiles([path], root)
        case ".tar":
            return TarShards([path], root)
    if not path.exists():
        raise QvlError(f"{path}: no such file or folder; name the input")
    raise QvlError(f"{path}: the input must be a .jsonl, .parquet or .tar file, or a folder of pictures")
