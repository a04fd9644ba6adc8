"""The compiled kernels: found in the cache folder, made if missing, loaded as C functions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import logging
import platform
import struct
import subprocess
import sys
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from qvl_kernels import cache_folder
from qvl_kernels.cpu import features
from qvl_kernels.locks import make_lock
from qvl_kernels.ops import DeviceError

log = logging.getLogger(__name__)

HOST = {"__init__.py", "arrays.py", "batched.py", "cache.py", "measure.py", "ops.py", "runner.py", "sizes.py"}
"""Sources that only call kernels."""

REMEDY = "try QVL_CPU=plain or device='reference'"

BUILD = """
import sys
root, *folders = sys.argv[1:]
sys.path.insert(0, root)
import qvl_kernels
sys.path.remove(root)
sys.path += folders
from qvl_kernels.cpu.build import main
main()
"""
"""What the compiling process runs. This installation's package comes first, and its folder no earlier than the
standard library for everything else."""


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


def _compile() -> bytes:
    """The machine code of all kernels, from a process of its own.

    That process is isolated (``-I``) and starts in this package's folder: neither the user's current folder, which may
    be a downloaded one, nor ``PYTHONPATH`` can replace a module it imports. The folders that this process has its
    libraries from are passed on.
    """
    root = str(Path(__file__).parents[2])
    folders = dict.fromkeys([root, *(str(Path(str(module.__file__)).parents[1]) for module in (llvmlite, np))])
    done = subprocess.run([sys.executable, "-I", "-c", BUILD, root, *folders], cwd=root, capture_output=True)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise DeviceError(f"the CPU kernels could not be compiled ({last}); {REMEDY}")
    return done.stdout


def _digest(path: Path, code: bytes) -> bytes:
    """Of the code and of what it is for, which the file's name holds a hash of."""
    return hashlib.sha256(path.name.encode() + b"\0" + code).digest()


def _read(path: Path) -> bytes | None:
    """The machine code in a file, or None: damaged code, and code that others can have written, must not run."""
    file = cache_folder.open_private(path)
    if file is None:
        return None
    with file:
        data = file.read()
    return data[32:] if data[:32] == _digest(path, data[32:]) else None


def _objects(code: bytes) -> list[bytes]:
    """The object files that `build.compile_kernels` has put together; none if they are not whole."""
    count = int.from_bytes(code[:4], "little")
    start = 4 + 4 * count
    if not count or len(code) < start:
        return []
    sizes = struct.unpack_from(f"<{count}I", code, 4)
    ends = np.cumsum((start, *sizes)).tolist()
    return [code[i:j] for i, j in itertools.pairwise(ends)] if ends[-1] == len(code) else []


def _load(code: bytes | None) -> llvm.ExecutionEngine | None:
    """Machine code made executable, or None if it is not that of the kernels."""
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    for data in _objects(code or b""):
        engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    return engine if engine.get_function_address("qvl_execute") else None


_loading = make_lock()


@functools.cache
def _engine() -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    folder = cache_folder.find()
    path = folder.path and folder.path / f"cpu-kernels-{key()}.bin"
    engine = _load(_read(path)) if path else None
    if engine is None:
        log.warning("qvl: compiling kernels for this processor, %s", folder.notice)
        code = _compile()
        engine = _load(code)
        if engine is None:
            raise DeviceError(f"the CPU kernels could not be compiled (there are none in the result); {REMEDY}")
        if path:
            cache_folder.store(path, _digest(path, code) + code)
    return engine


@functools.cache
def address(name: str) -> int:
    """The address of a kernel, ``void (int64 args, int64 thread, int64 threads)``."""
    with _loading:
        found = _engine().get_function_address(f"qvl_{name}")
    if not found:
        raise KeyError(name)
    return found
