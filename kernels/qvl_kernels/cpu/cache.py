"""The compiled kernels: found in the cache folder, made if missing, loaded as C functions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm

from qvl_kernels.cpu import features
from qvl_kernels.ops import DeviceError


def folder() -> Path:
    """``QVL_CACHE_DIR``, or ``qvl`` in the user's cache folder."""
    if named := os.environ.get("QVL_CACHE_DIR"):
        return Path(named)
    if platform.system() == "Windows":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qvl"


HOST = {"__init__.py", "arrays.py", "batched.py", "cache.py", "measure.py", "ops.py", "runner.py"}
"""Sources that only call kernels."""


def key() -> str:
    """A hash of everything the machine code depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        if source.parent == Path(__file__).parent and source.name in HOST:
            continue
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    digest.update(repr((versions, platform.machine(), features.selected().name, features.target())).encode())
    return digest.hexdigest()[:20]


def _compile(path: Path) -> None:
    print("qvl: compiling kernels for this processor (once)", file=sys.stderr, flush=True)
    package_root = str(Path(__file__).parents[2])
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "qvl_kernels.cpu.build", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceError(f"the CPU kernels could not be compiled ({last}); try QVL_CPU=plain or device='reference'")


def _read(path: Path) -> bytes | None:
    """The machine code in a file, or None if there is none or it is damaged: damaged code must not run."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _machine_code() -> bytes:
    path = folder() / f"kernels-{key()}" / "kernels.bin"
    if code := _read(path):
        return code
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    with tempfile.TemporaryDirectory() as scratch:
        # Nowhere to keep it: this process compiles for itself.
        target = path if writable else Path(scratch) / path.name
        _compile(target)
        code = _read(target)
    if code is None:
        raise DeviceError(f"{target}: just written and not readable; set QVL_CACHE_DIR to another folder")
    return code


@functools.cache
def _engine():
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    data = _machine_code()
    (count,) = struct.unpack_from("<I", data)
    offset = 4 + 4 * count
    for size in struct.unpack_from(f"<{count}I", data, 4):
        engine.add_object_file(llvm.ObjectFileRef.from_data(data[offset : offset + size]))
        offset += size
    engine.finalize_object()
    return engine


@functools.cache
def address(name: str) -> int:
    """The address of a kernel, ``void (int64 args, int64 thread, int64 threads)``."""
    found = _engine().get_function_address(f"qvl_{name}")
    if not found:
        raise KeyError(name)
    return found
