"""Finding compiled kernels: the bundle of the package, or one compiled on this computer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
import tempfile
from pathlib import Path

from qvl_kernels import cache_folder
from qvl_kernels.gpu import build
from qvl_kernels.gpu.bundle import BUNDLE, PTX_ARCHITECTURE, TRITON_VERSION, Bundle, source_hash
from qvl_kernels.gpu.signatures import ARCHITECTURES
from qvl_kernels.ops import DeviceError

log = logging.getLogger(__name__)

EXACT_FROM = 90
"""From this architecture on, code uses features of one GPU only. Older cubins run on all later minor versions."""

TEGRA = 87
"""Jetson Orin, which runs no cubin of another architecture (CUDA C++ programming guide, "Binary Compatibility")."""


def choose(capability: tuple[int, int]) -> tuple[int, str]:
    """Return the architecture whose code runs on a GPU, and its kind: "cubin", or "ptx", which the driver compiles."""
    own = 10 * capability[0] + capability[1]
    for architecture in sorted(ARCHITECTURES, reverse=True):
        older = architecture // 10 == own // 10 and architecture <= own and architecture < EXACT_FROM
        if architecture == own or (older and own != TEGRA):
            return architecture, "cubin"
    return PTX_ARCHITECTURE, "ptx"


def locate(capability: tuple[int, int]) -> Bundle | None:
    """Return existing kernels for a compute capability, or None."""
    architecture, kind = choose(capability)
    bundles = [Bundle(BUNDLE, architecture, kind)] if BUNDLE.exists() else []
    made = _made(cache_folder.find().path, architecture)
    if made and (file := cache_folder.open_private(made)):
        with contextlib.suppress(DeviceError):  # damaged files are compiled again
            bundles.append(Bundle(made, architecture, kind, file))
    return next((bundle for bundle in bundles if bundle.sources == source_hash() and len(bundle)), None)


def find(capability: tuple[int, int]) -> Bundle:
    """Return the kernels for a compute capability. If there are none, compile them and log a warning.

    Raises
    ------
    DeviceError
        If there are none, and the required Triton is not installed.
    """
    if bundle := locate(capability):
        return bundle
    check_compiler()
    architecture, kind = choose(capability)
    folder = cache_folder.find()
    log.warning("qvl: compiling the GPU kernels for sm_%d, %s", architecture, folder.notice)
    with tempfile.TemporaryDirectory(prefix="qvl-") as scratch:
        # Read into memory: the cache folder may be missing or full.
        code = build.build(Path(scratch) / "kernels.zip", [architecture], _log_progress).read_bytes()
    made = _made(folder.path, architecture)
    if made and not folder.problem:
        cache_folder.store(made, code)
    return Bundle(made or Path("GPU kernels"), architecture, kind, io.BytesIO(code))


def check_compiler() -> None:
    """Raise a DeviceError if kernels cannot be compiled. Does not import Triton, which is slow."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != TRITON_VERSION:
        found = f"Triton {version}" if version else "no Triton"
        remedy = f"pip install triton=={TRITON_VERSION}, or use the CPU"
        if sys.platform == "win32":  # Triton does not support Windows
            remedy = "install qvl-runtime from a wheel, which has them, or use the CPU"
        raise DeviceError(
            f"this installation came without compiled GPU kernels, and {found} is installed to compile them with: "
            f"{remedy}"
        )


def _made(folder: Path | None, architecture: int) -> Path | None:
    return folder and folder / f"gpu-kernels-sm{architecture}-{source_hash()[:16]}.zip"


def _log_progress(done: int, total: int, name: str) -> None:
    log.info("qvl: compiled %d of %d GPU kernels; next: %s", done, total, name or "none")
