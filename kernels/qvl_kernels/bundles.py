"""Writing a bundle of compiled kernels, a zip file: replaced atomically, and the same sources give the same bytes."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qvl_kernels.atomic import replacing


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yield ``add(name, content)``, which adds a file without a timestamp; replace `path` when the block ends."""
    with replacing(path, private=False) as out, zipfile.ZipFile(out, "w") as bundle:

        def add(name: str, content: bytes) -> None:
            bundle.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, compresslevel=9)

        yield add
