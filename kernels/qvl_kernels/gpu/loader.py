"""Finding compiled kernels: the bundle that ships with the package, or one made once on this computer.

A bundle is what build.py writes, a zip of cubins and PTX with a manifest.json::

    {"triton": "3.6.0", "sources": "<hash>", "kernels": {name: {architecture: {
        "symbol": str, "warps": int, "shared": int, "constants": {...}, "cubin": path in the zip, "ptx": the same}}}}

`ptx` is there for the architecture whose PTX stands in on GPUs that no cubin was made for, and for sm_75.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from qvl_kernels.gpu.launcher import Image
from qvl_kernels.gpu.signatures import ARCHITECTURES
from qvl_kernels.ops import DeviceError

BUNDLE = Path(__file__).with_name("kernels.zip")
"""Where the bundle lies when it ships with the package."""

PTX_ARCHITECTURE = 80
"""Whose PTX stands in on GPUs that no cubin was made for."""

EXACT_FROM = 90
"""From this architecture on code uses features of exactly one GPU; before, a cubin runs on all later minor versions."""


class Bundle(Mapping[str, Image]):
    """The kernels of one architecture, read from a bundle as they are asked for.

    Attributes
    ----------
    architecture : int
        What they were compiled for.
    kind : str
        "cubin" or "ptx".
    sources : str
        Hash of what they were compiled from.
    """

    def __init__(self, path: Path, architecture: int, kind: str):
        self.path, self.architecture, self.kind = path, architecture, kind
        try:
            self._zip = zipfile.ZipFile(path)
            manifest = json.loads(self._zip.read("manifest.json"))
            self.sources: str = manifest["sources"]
            self._entries = {n: e[str(architecture)] for n, e in manifest["kernels"].items() if str(architecture) in e}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
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


def choose(capability: tuple[int, int]) -> tuple[int, str]:
    """The architecture whose code runs on a GPU, and which form of it: "cubin", or "ptx", which the driver compiles."""
    own = 10 * capability[0] + capability[1]
    for architecture in sorted(ARCHITECTURES, reverse=True):
        older = architecture // 10 == own // 10 and architecture <= own and architecture < EXACT_FROM
        if architecture == own or older:
            return architecture, "cubin"
    return PTX_ARCHITECTURE, "ptx"


def locate(capability: tuple[int, int]) -> Bundle | None:
    """The kernels for a GPU of a compute capability that are there already, if any."""
    from qvl_kernels.gpu.build import source_hash

    architecture, kind = choose(capability)
    sources = source_hash()
    for path in (BUNDLE, _made(architecture, sources)):
        if path.exists():
            bundle = Bundle(path, architecture, kind)
            if bundle.sources == sources and len(bundle):
                return bundle
    return None


def find(capability: tuple[int, int]) -> Bundle:
    """The kernels for a GPU of a compute capability; compiled now, with a word on standard error, if there are none.

    Raises
    ------
    DeviceError
        There are none and the Triton they are compiled with is not installed.
    """
    from qvl_kernels.gpu.build import build, source_hash

    bundle = locate(capability)
    if bundle is None:
        check_compiler()
        architecture, kind = choose(capability)
        made = _made(architecture, source_hash())
        print(f"qvl: compiling the GPU kernels for sm_{architecture}, once; they are kept in {made}", file=sys.stderr)
        build(made, [architecture], _show)
        bundle = Bundle(made, architecture, kind)
    return bundle


def check_compiler() -> None:
    """Raise a DeviceError where kernels could not be compiled; does not import Triton, which takes a while."""
    from qvl_kernels.gpu.build import TRITON_VERSION

    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != TRITON_VERSION:
        raise DeviceError(
            "this installation came without compiled GPU kernels, and "
            f"{f'Triton {version}' if version else 'no Triton'} is installed to compile them with: "
            f"pip install triton=={TRITON_VERSION}, or use the CPU"
        )


def _made(architecture: int, sources: str) -> Path:
    return cache_folder() / f"gpu-kernels-sm{architecture}-{sources[:16]}.zip"


def cache_folder() -> Path:
    """Where this computer keeps what can be made again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qvl"


def _show(done: int, total: int, name: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:4d} of {total}  {name:<50}", end="\n" if done == total else "", file=sys.stderr, flush=True)
