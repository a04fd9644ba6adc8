"""Compiling the driver library of libcuda.c."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("libcuda.c")


def compile_driver(compiler: str, folder: Path) -> Path:
    """Compile the library with a C compiler on Linux; return its path in `folder`."""
    out = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{out.name}", "-o", out, SOURCE, "-ldl"]
    subprocess.run([compiler, *map(str, options)], check=True)
    return out
