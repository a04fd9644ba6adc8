"""The compiled kernels: those that ship with the package or lie in the cache folder, else compiled; as C functions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import logging
import platform
import struct
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np

from qvl_kernels import cache_folder
from qvl_kernels.cpu import bundle, features
from qvl_kernels.locks import make_lock
from qvl_kernels.ops import DeviceError

log = logging.getLogger(__name__)


def key() -> str:
    """A hash of everything that machine code compiled here depends on."""
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    parts = [(part, names.pattern) for part, names in bundle.PARTS.items()]
    known = (bundle.source_hash(), parts, versions, platform.machine(), features.selected().name, features.target())
    return hashlib.sha256(repr(known).encode()).hexdigest()[:20]


def _digest(path: Path, code: bytes) -> bytes:
    """Return a digest of the code and of the file's name, which contains the key."""
    return hashlib.sha256(path.name.encode() + b"\0" + code).digest()


def _read(path: Path) -> bytes | None:
    """Read machine code from a file; None if it is damaged or another user may have written it."""
    file = cache_folder.open_private(path)
    if file is None:
        return None
    with file:
        data = file.read()
    return data[32:] if data[:32] == _digest(path, data[32:]) else None


def _objects(code: bytes) -> list[bytes]:
    """Split the result of `build.compile_kernels` into object files; empty if it is incomplete."""
    count = int.from_bytes(code[:4], "little")
    start = 4 + 4 * count
    if not count or len(code) < start:
        return []
    sizes = struct.unpack_from(f"<{count}I", code, 4)
    ends = np.cumsum((start, *sizes)).tolist()
    return [code[i:j] for i, j in itertools.pairwise(ends)] if ends[-1] == len(code) else []


def _load(code: bytes | None, part: str) -> llvm.ExecutionEngine | None:
    """Load machine code; None if it is not that of the kernels."""
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    for data in _objects(code or b""):
        engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    return engine if engine.get_function_address(f"qvl_{bundle.KNOWN[part]}") else None


_loading = make_lock()


@functools.cache
def _shipped() -> llvm.ExecutionEngine | None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return _load(bundle.shipped(features.selected().name), "common")


@functools.cache
def _engine(part: str) -> llvm.ExecutionEngine:
    shipped = _shipped()
    if shipped is not None:
        return shipped
    folder = cache_folder.find()
    path = folder.path and folder.path / f"cpu-kernels-{key()}-{part}.bin"
    if path is None:
        return _compiled(part, folder)
    engine = _load(_read(path), part)
    if engine is None:
        with cache_folder.alone(path.parent):
            engine = _load(_read(path), part) or _compiled(part, folder, path)
    return engine


def _compiled(part: str, folder: cache_folder.CacheFolder, path: Path | None = None) -> llvm.ExecutionEngine:
    """Compile a part of the kernels, load it, and keep it at `path`."""
    log.warning("qvl: compiling the %s kernels for this processor, %s", part, folder.notice)
    code = bundle.compile_kernels(part=part)
    engine = _load(code, part)
    if engine is None:
        raise DeviceError(f"the CPU kernels could not be compiled (there are none in the result); {bundle.REMEDY}")
    if path and not folder.problem:
        cache_folder.store(path, _digest(path, code) + code)
    return engine


def prepare(part: str) -> None:
    """Load a part of the kernels, which compiles it if need be."""
    with _loading:
        _engine(part)


@functools.cache
def address(name: str) -> int:
    """Return the address of a kernel, ``void (int64 args, int64 thread, int64 threads)``."""
    with _loading:
        found = _engine(bundle.part_of(name)).get_function_address(f"qvl_{name}")
    if not found:
        raise KeyError(name)
    return found
