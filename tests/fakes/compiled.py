"""Kernels compiled for tests: each when it is first asked for, then kept on disk until the sources change."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

from qvl_kernels import cache_folder
from qvl_kernels.gpu import build
from qvl_kernels.gpu.build import Compiled
from qvl_kernels.gpu.launcher import Image

compile_kernel = build.compile_kernel

ARCHITECTURE = int(os.environ.get("QVL_TEST_ARCHITECTURE", "80"))
"""Whose PTX the tests run that do not name another."""


@functools.cache
def _folder() -> Path:
    return (cache_folder.find().path or Path(tempfile.mkdtemp())) / f"test-kernels-{build.source_hash()[:16]}"


def compiled(name: str, architecture: int) -> Compiled:
    """What `build.compile_kernel` gives."""
    path = _folder() / f"sm_{architecture}" / name
    paths = [path.with_name(f"{name}.{kind}") for kind in ("cubin", "ptx", "json")]
    if not paths[-1].exists():
        code = compile_kernel(name, architecture)
        meta = {"symbol": code.symbol, "warps": code.warps, "shared": code.shared, "constants": code.constants}
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in zip(paths, (code.cubin, code.ptx, json.dumps(meta).encode())):
            partial = target.with_name(f"{target.name}.{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(target)
    cubin, ptx, meta = (target.read_bytes() for target in paths)
    return Compiled(cubin, ptx, **json.loads(meta))


class CompiledImages(dict):
    """The PTX of every kernel for one architecture, under the kernel's full name."""

    def __init__(self, architecture: int = ARCHITECTURE):
        super().__init__()
        self.architecture = architecture

    def __missing__(self, name: str) -> Image:
        code = compiled(name, self.architecture)
        self[name] = Image(code.ptx, "ptx", name, code.warps, code.shared, code.constants)
        return self[name]
