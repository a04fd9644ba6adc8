"""Compile every kernel into one object file: ``python -m qvl_kernels.cpu.build OUT``.

Run as a process of its own, so that Numba and LLVM's optimiser (150 MB) never enter the process that answers.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

import llvmlite.binding as llvm

from qvl_kernels.cpu import features


def _library(function) -> tuple[str, llvm.ModuleRef]:
    """Symbol and optimised module of a kernel, in Numba's calling convention."""
    import numba

    from qvl_kernels.cpu.registry import ENTRY

    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher = numba.njit(ENTRY, nogil=True, error_model="numpy", **options)(function)
    (compiled,) = dispatcher.overloads.values()
    return compiled.fndesc.llvm_func_name, compiled.library.get_llvm_str()


def _without_machine_code(context, library, fndesc, env):
    """In place of ``CPUContext.get_executable``: optimise, but leave out the machine code of each single routine.

    Nothing is called from Python here; Numba only wants some distinct built-in function to file it under.
    """
    library._ensure_finalized()
    return [].append


def _entry(name: str, symbol: str) -> str:
    """IR of the C function `name` around a Numba function, which returns a status and takes two result pointers."""
    return f"""
declare i32 @"{symbol}"(ptr, ptr, i64, i64, i64)
define void @{name}(i64 %args, i64 %thread, i64 %threads) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{symbol}"(ptr %result, ptr %error, i64 %args, i64 %thread, i64 %threads)
  ret void
}}"""


def compile_kernels() -> bytes:
    """The object file; each kernel is the symbol ``qvl_NAME``."""
    import numba
    from numba.core.cpu import CPUContext

    gc.disable()
    CPUContext.get_executable = _without_machine_code

    cpu, flags = features.target()
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = cpu, flags

    from qvl_kernels.cpu import kernels
    from qvl_kernels.cpu.registry import KERNELS

    for module in kernels.MODULES:
        importlib.import_module(module)

    whole = None
    for name, function in KERNELS.items():
        symbol, text = _library(function)
        module = llvm.parse_assembly(text)
        module.link_in(llvm.parse_assembly(_entry(f"qvl_{name}", symbol)))
        if whole is None:
            whole = module
        else:
            whole.link_in(module)
    whole.verify()
    target = llvm.Target.from_triple(whole.triple)
    machine = target.create_target_machine(
        cpu=cpu,
        features=flags,
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )
    return machine.emit_object(whole)


def main(path: str) -> None:
    """Write the object file at once or not at all, whoever else is writing it."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(compile_kernels())
    os.replace(temporary, path)


if __name__ == "__main__":
    main(sys.argv[1])
