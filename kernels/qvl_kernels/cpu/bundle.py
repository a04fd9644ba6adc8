"""Machine code of the kernels: what ships with the package, and compiling it in a process of its own.

The bundle that ships is one zip, made by `build`. It has an entry for each level of `features.LEVELS` that a kind of
machine can have, named ``SYSTEM-MACHINE-LEVEL-SOURCES.bin``; SOURCES is a hash of what it was compiled from, so that
code of other sources is never found.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import llvmlite
import numpy as np

from qvl_kernels import packing
from qvl_kernels.cpu import features
from qvl_kernels.ops import DeviceError

BUNDLE = Path(__file__).with_name("kernels.zip")
"""Where the bundle lies when it ships with the package."""

HOST = {
    "__init__.py",
    "arrays.py",
    "batched.py",
    "bundle.py",
    "cache.py",
    "cache_sizes.py",
    "choices.py",
    "measure.py",
    "ops.py",
    "processors.py",
    "runner.py",
    "sizes.py",
    "tuning.py",
}
"""Sources that only call kernels."""

REMEDY = "try QVL_CPU=plain or device='reference'"

PARTS = {
    "rare": re.compile(r"gemv(16|3|\d_32|\d_64)|.*attention_(int8|fp32)|rope_append_(int8|fp32)|multiply_|read_memory"),
    "large": re.compile(r"gemm|pack_int8|attention_fp16|block_attention_int16"),
    "common": re.compile(""),
}
"""What is compiled together, by the names of the kernels (the first match counts): kernels of unusual weights and
caches and of measuring, kernels of many rows of large matrices, and the rest. Each part is compiled when the first of
its kernels is needed, so that a small model's first answer waits for a third of the work."""
KNOWN = {"rare": "gemv16", "large": "gemm4", "common": "execute"}
"""A kernel of each part, by which its code is recognized."""

BUILD = """
import sys
root, level, part, *folders = sys.argv[1:]
sys.path.insert(0, root)
import qvl_kernels
sys.path.remove(root)
sys.path += folders
from qvl_kernels.cpu.build import emit
emit(level, part)
"""
"""What the compiling process runs. This installation's package comes first, and its folder no earlier than the
standard library for everything else."""


@functools.cache
def source_hash() -> str:
    """A hash of the sources that the machine code depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        if source.parent == Path(__file__).parent and source.name in HOST:
            continue
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(Path(packing.__file__).read_bytes())  # its constants are compiled in
    return digest.hexdigest()[:20]


def part_of(name: str) -> str:
    """The part that a kernel belongs to."""
    return next(part for part, names in PARTS.items() if names.match(name))


def compile_kernels(level: str = "", part: str = "") -> bytes:
    """Compile kernels in a process of its own; see `build.compile_kernels` for the format.

    That process is isolated (``-I``) and starts in this package's folder: neither the user's current folder, which may
    be a downloaded one, nor ``PYTHONPATH`` can replace a module it imports. The folders that this process has its
    libraries from are passed on.

    Parameters
    ----------
    level : str
        One of `features.LEVELS`, for any processor that has it; "" is for this very processor.
    part : str
        One of `PARTS`; "" is for all.

    Raises
    ------
    DeviceError
        The compiler failed, or cannot be started.
    """
    root = str(Path(__file__).parents[2])
    folders = dict.fromkeys([root, *(str(Path(str(module.__file__)).parents[1]) for module in (llvmlite, np))])
    command = [sys.executable, "-I", "-c", BUILD, root, level, part, *folders]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True)
    except OSError as error:  # no further process, or no such program where Python is embedded
        reason = error.strerror or error
        raise DeviceError(f"the CPU kernels could not be compiled ({command[0]}: {reason}); {REMEDY}") from None
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise DeviceError(f"the CPU kernels could not be compiled ({last}); {REMEDY}")
    return done.stdout


def shipped(level: str) -> bytes | None:
    """The machine code for a level from the bundle, or None if there is none of these sources."""
    try:
        with zipfile.ZipFile(BUNDLE) as file:
            return file.read(entry(level))
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None  # RuntimeError: a flag says that it is encrypted


def machine() -> str:
    """This kind of machine, under one name on every operating system."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def entry(level: str) -> str:
    """The name in a bundle of this machine's code for a level."""
    return f"{sys.platform}-{machine()}-{level}-{source_hash()}.bin"


def levels() -> list[str]:
    """The levels that a machine of this kind may have and picks by itself."""
    return [level.name for level in features.LEVELS.values() if machine() in level.machines]
