"""A bundle of compiled kernels, written by `build` and found by `loader`.

It is a zip of cubins and PTX with a manifest.json::

    {"triton": "3.6.0", "sources": "<hash>", "kernels": {name: {architecture: {
        "symbol": str, "warps": int, "shared": int, "constants": {...}, "cubin": path in the zip, "ptx": the same}}}}

`ptx` exists for `PTX_ARCHITECTURE`, which serves GPUs without a cubin, and for sm_75.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from qvl_kernels.gpu.launcher import Image
from qvl_kernels.ops import DeviceError

TRITON_VERSION = "3.6.0"

BUNDLE = Path(__file__).with_name("kernels.zip")
"""Path of the bundle in the package."""

PTX_ARCHITECTURE = 80
"""The architecture whose PTX serves GPUs without a cubin."""

ALSO_SOURCES = ("signatures.py", "tiles.json", "build.py", "bundle.py", "turing.py")
"""Further files that the compiled kernels depend on, besides kernels/."""


class Bundle(Mapping[str, Image]):
    """The kernels of one architecture, read lazily from a bundle.

    If `file` is given, it is read instead of `path` and checked completely.

    Attributes
    ----------
    architecture : int
        The architecture of the code.
    kind : str
        "cubin" or "ptx".
    sources : str
        Hash of the sources.

    Raises
    ------
    DeviceError
        If the file cannot be read, or is damaged.
    """

    def __init__(self, path: Path, architecture: int, kind: str, file: BinaryIO | None = None):
        self.path, self.architecture, self.kind = path, architecture, kind
        try:
            self._zip = zipfile.ZipFile(file or path)
            if file and (damaged := self._zip.testzip()):
                raise ValueError(f"{damaged} is damaged")
            manifest = json.loads(self._zip.read("manifest.json"))
            self.sources: str = manifest["sources"]
            self._entries = {n: e[str(architecture)] for n, e in manifest["kernels"].items() if str(architecture) in e}
        except Exception as e:  # zipfile and zlib raise many types on damaged files
            raise DeviceError(
                f"{path}: is no bundle of GPU kernels ({e}); delete it, or install qvl-runtime again"
            ) from e
        self._images: dict[str, Image] = {}

    def __getitem__(self, name: str) -> Image:
        if name not in self._images:
            entry = self._entries[name]
            code = self._zip.read(entry[self.kind])
            self._images[name] = Image(
                code, self.kind, entry["symbol"], entry["warps"], entry["shared"], entry["constants"]
            )
        return self._images[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def source_hash() -> str:
    """Return a hash of everything the compiled kernels depend on."""
    here = Path(__file__).parent
    digest = hashlib.sha256(TRITON_VERSION.encode())
    for file in [*sorted((here / "kernels").glob("*.py")), *(here / n for n in ALSO_SOURCES)]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()
