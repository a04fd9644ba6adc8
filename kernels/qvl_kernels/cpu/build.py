"""Compile the kernels, for this processor or for a package: ``python -m qvl_kernels.cpu.build [OUT.zip]``.

The command makes the bundle that ships (see `bundle`), for every level of this kind of machine, and keeps what a run
on another kind of machine has put there, so that a wheel can serve several. Run it before a wheel is built, which takes
the bundle along. Without one, as in a checkout, each machine compiles what it needs, once, into the user's cache.

`emit` runs in a process of its own, so that Numba and LLVM's optimizer (150 MB) never enter the one that answers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import multiprocessing
import os
import struct
import sys
import zipfile
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import llvmlite.binding as llvm

from qvl_kernels import bundles
from qvl_kernels.cpu import bundle, features
from qvl_kernels.ops import DeviceError


def _library(function) -> tuple[str, llvm.ModuleRef]:
    """Return symbol and optimized module of a kernel, in Numba's calling convention."""
    import numba

    from qvl_kernels.cpu.registry import ENTRY

    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher = numba.njit(ENTRY, nogil=True, error_model="numpy", **options)(function)
    (compiled,) = dispatcher.overloads.values()
    return compiled.fndesc.llvm_func_name, compiled.library.get_llvm_str()


def _only_optimize() -> None:
    """Prevent Numba from emitting machine code of every routine for calls from Python.

    Nothing is called from Python here. Numba only needs a distinct built-in function as a key of each routine.
    """
    from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
    from numba.core.cpu import CPUContext

    def get_executable(context, library, fndesc, env):
        library._ensure_finalized()
        return [].append

    CPUContext.get_executable = get_executable
    JITCPUCodegen._add_module = lambda self, module: None
    JITCodeLibrary._finalize_specific = lambda self: None


def _entry(name: str, symbol: str) -> str:
    """Return the IR of a C function `name` that wraps a Numba function (with a status and two result pointers)."""
    return f"""
declare i32 @"{symbol}"(ptr, ptr, i64, i64, i64)
define void @{name}(i64 %args, i64 %thread, i64 %threads) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{symbol}"(ptr %result, ptr %error, i64 %args, i64 %thread, i64 %threads)
  ret void
}}"""


def compile_kernel(name: str) -> bytes:
    """Return the object file of one kernel; its only visible symbol is ``qvl_NAME``."""
    from qvl_kernels.cpu.registry import KERNELS

    symbol, text = _library(KERNELS[name])
    module = llvm.parse_assembly(text)
    module.link_in(llvm.parse_assembly(_entry(f"qvl_{name}", symbol)))
    for function in module.functions:
        if not function.is_declaration and function.name != f"qvl_{name}":
            function.linkage = "internal"
    for variable in module.global_variables:
        if variable.name.startswith("qvl_"):
            variable.linkage = "internal"
    cpu, flags = features.target()
    target = llvm.Target.from_triple(module.triple)
    machine = target.create_target_machine(
        cpu=cpu,
        features=flags,
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )
    # Routines that were inlined everywhere would also be emitted separately.
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(0)))
    module.verify()
    return machine.emit_object(module)


def prepare() -> list[str]:
    """Import the kernels, configure Numba for `features.target`, and return the kernels' names."""
    import numba

    gc.disable()
    llvm.initialize_native_asmparser()  # for `simd.assembly`
    _only_optimize()
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = features.target()

    from qvl_kernels.cpu import kernels
    from qvl_kernels.cpu.registry import KERNELS

    for module in kernels.MODULES:
        importlib.import_module(module)
    return list(KERNELS)


def compile_kernels(part: str = "") -> bytes:
    """Compile the kernels of a part, by default all.

    The format is that of `cache`: a uint32 count, the uint32 sizes, and the object files.
    """
    objects = _objects([name for name in prepare() if part in ("", bundle.part_of(name))])
    sizes = [len(data) for data in objects]
    return struct.pack(f"<{1 + len(sizes)}I", len(sizes), *sizes) + b"".join(objects)


def _objects(names: Sequence[str]) -> list[bytes]:
    """Compile kernels in children, one for each processor; those that no child can compile, in this process.

    Pipes need neither the shared memory nor the threads of `multiprocessing.Pool`, which a container may not grant.
    """
    # Forked children share the parent's imports. Other systems than Linux restrict libraries after a fork.
    workers = min(8, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1
    done: dict[str, bytes] = {}
    waiting, busy = list(reversed(names)), dict[Connection, str]()

    def ask(child: Connection) -> None:
        if waiting:
            with contextlib.suppress(OSError):  # it has been killed
                child.send(waiting[-1])
                busy[child] = waiting.pop()

    with contextlib.ExitStack() as children:
        with contextlib.suppress(OSError):  # no further process
            for _ in range(workers if workers > 1 else 0):
                ask(_start_child(children))
        while busy:
            for child in wait(list(busy)):
                assert isinstance(child, Connection)
                name = busy.pop(child)
                try:
                    done[name] = child.recv_bytes()
                except (EOFError, OSError):  # here its error is the last line, or it was killed
                    done[name] = compile_kernel(name)
                else:
                    ask(child)
        done |= {name: compile_kernel(name) for name in waiting}
    return [done[name] for name in names]


def _start_child(children: contextlib.ExitStack) -> Connection:
    """Fork a child that compiles the kernels it is sent the names of, until the stack is left."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    children.enter_context(ours)
    with theirs:
        child = context.Process(target=_compile_asked, args=(theirs,), daemon=True)
        child.start()
    children.callback(child.join)
    children.callback(child.kill)
    return ours


def _compile_asked(asked: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            asked.send_bytes(compile_kernel(asked.recv()))


def emit(level: str = "", part: str = "") -> None:
    """Write `compile_kernels` to standard output; whatever else would be printed there goes to standard error.

    `level` and `part` are as in `bundle.compile_kernels`.
    """
    if level:
        features.compile_for(level)
    out = os.dup(1)
    os.dup2(2, 1)
    code = compile_kernels(part)
    with os.fdopen(out, "wb") as file:
        file.write(code)


def build(path: Path) -> list[str]:
    """Compile every level of this kind of machine into the bundle at `path`, and return the names of all it holds."""
    entries = _of_other_machines(path)
    entries |= {bundle.entry(level): bundle.compile_kernels(level) for level in bundle.levels()}
    with bundles.writing(path) as add:
        for name, code in sorted(entries.items()):
            add(name, code)
    return sorted(entries)


def _of_other_machines(path: Path) -> dict[str, bytes]:
    """The objects of these sources in a bundle that were not made on this kind of machine."""
    if not path.exists():
        return {}
    own = f"{sys.platform}-{bundle.machine()}-"
    with zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if name.endswith(f"-{bundle.source_hash()}.bin")]
        return {name: file.read(name) for name in names if not name.startswith(own)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qvl_kernels.cpu.build", description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=bundle.BUNDLE, help="the bundle to write (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        names = build(options.out)
    except (DeviceError, OSError, zipfile.BadZipFile) as e:
        print(e, file=sys.stderr)
        return 1
    print(f"{options.out}: {', '.join(names)}, {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
