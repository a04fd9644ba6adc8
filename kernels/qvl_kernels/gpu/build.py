"""Compile every kernel ahead of time, without a GPU: ``python -m qvl_kernels.gpu.build [OUT.zip] [--arch 86]…``.

The bundle is one zip: cubins for `signatures.ARCHITECTURES`, PTX of version 7.5 for other GPUs, whose driver compiles
it, and manifest.json (see bundle.py). The PTX for sm_75 serves to check turing.py on a newer GPU (bench/gpu.py). The
bundle is not under version control: the build of a wheel runs this module if Triton is installed, and the wheel
contains kernels.zip. An installation without it compiles the kernels of its GPU once, into the user's cache.

Triton is a build-time dependency. Version 3.6.0 is required: its cubins have an ABI that drivers from CUDA 12 on
support, and launcher.py passes the arguments of its kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qvl_kernels import bundles
from qvl_kernels.gpu.bundle import BUNDLE, PTX_ARCHITECTURE, TRITON_VERSION, Bundle, source_hash
from qvl_kernels.gpu.signatures import ARCHITECTURES, KERNELS, constants, names, tile, types
from qvl_kernels.ops import DeviceError

_WITH_PTX = (75, PTX_ARCHITECTURE)

_MULTIPLES_OF_16 = {"rows", "stride"}
"""Integer arguments that are always multiples of 16; the compiler uses this."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture.

    Attributes
    ----------
    cubin, ptx : bytes
    symbol : str
        Name of the kernel in them.
    warps, shared : int
        Warps per program, and its shared memory in bytes.
    constants : dict
        Compile-time constants.
    """

    cubin: bytes
    ptx: bytes
    symbol: str
    warps: int
    shared: int
    constants: dict[str, int | bool]


def compile_kernel(name: str, architecture: int) -> Compiled:
    """Compile kernel ``family.variant`` for a compute capability (75, 80, ...).

    Raises
    ------
    DeviceError
        If Triton is not installed, or has another version.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    family = KERNELS[name.partition(".")[0]]
    module, function = family.source.split(".")
    source = getattr(importlib.import_module(f"qvl_kernels.gpu.kernels.{module}"), function)
    kinds, fixed, shape = types(name), constants(name, architecture), tile(name, architecture)
    launched = [argument for argument in source.arg_names if argument not in fixed]
    if launched != [*kinds] or not {*fixed} <= {*source.arg_names}:
        raise TypeError(f"{name}: {family.source} takes {source.arg_names}, listed are {[*kinds, *fixed]}")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(source.arg_names)
        if kinds.get(argument, "").startswith("*") or argument in _MULTIPLES_OF_16
    }
    options = {
        "num_warps": shape["warps"],
        "num_stages": 1 if architecture == 75 else shape["stages"],
        "enable_fp_fusion": True,
        "maxnreg": shape.get("registers"),
    }
    if architecture in _WITH_PTX:
        options["ptx_version"] = 75
    with _compiler_settings(architecture, shape.get("optimizer", architecture)):
        result = triton.compile(
            ASTSource(
                source,
                {argument: kinds.get(argument, "constexpr") for argument in source.arg_names},
                {(i,): fixed[argument] for i, argument in enumerate(source.arg_names) if argument in fixed},
                attributes,
            ),
            target=GPUTarget("cuda", architecture, 32),
            options=options,
        )
    meta = result.metadata
    if meta.global_scratch_size or meta.profile_scratch_size or meta.num_ctas != 1 or meta.launch_pdl:
        raise RuntimeError(f"{name} for sm_{architecture} needs more launch parameters than launcher.py passes: {meta}")
    return Compiled(result.asm["cubin"], result.asm["ptx"].encode(), meta.name, meta.num_warps, meta.shared, fixed)


def build(
    path: Path,
    architectures: Sequence[int] = ARCHITECTURES,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Path:
    """Compile all kernels for `architectures` to a bundle at `path`, which is replaced at the end.

    `progress` is called with the number of finished compilations, the total, and the next name; "" at the end.
    """
    work = [(name, architecture) for architecture in architectures for name in names(architecture)]
    entries: dict[str, dict[str, dict]] = {name: {} for name, _ in work}
    path.parent.mkdir(parents=True, exist_ok=True)
    with bundles.writing(path) as add:
        for done, (name, architecture) in enumerate(work):
            progress(done, len(work), f"{name} sm_{architecture}")
            code = compile_kernel(name, architecture)
            entry = {"symbol": code.symbol, "warps": code.warps, "shared": code.shared, "constants": code.constants}
            files = {"cubin": f"sm_{architecture}/{name}.cubin"}
            add(files["cubin"], code.cubin)
            if architecture in _WITH_PTX:
                files["ptx"] = f"sm_{architecture}/{name}.ptx"
                add(files["ptx"], code.ptx)
            entries[name][str(architecture)] = entry | files
        progress(len(work), len(work), "")
        manifest = {"triton": TRITON_VERSION, "sources": source_hash(), "kernels": entries}
        add("manifest.json", json.dumps(manifest, indent=1).encode())
    return path


def _triton() -> ModuleType:
    try:
        import triton
        from triton import knobs
    except ImportError as e:
        raise DeviceError(
            f"compiling the GPU kernels needs Triton ({e}): pip install triton=={TRITON_VERSION}, or use the CPU"
        ) from e
    if triton.__version__ != TRITON_VERSION:
        raise DeviceError(
            f"Triton {triton.__version__} is installed and the GPU kernels are compiled with {TRITON_VERSION}: "
            f"pip install triton=={TRITON_VERSION}"
        )
    if knobs.runtime.interpret:
        raise DeviceError("TRITON_INTERPRET is set, under which Triton compiles nothing: unset it")
    return triton


@contextlib.contextmanager
def _compiler_settings(architecture: int, optimizer: int) -> Iterator[None]:
    """Disable line numbers, which triple the code's size, and use an empty cache, without code of other hooks.

    `optimizer`: the architecture whose instructions are chosen.
    """
    from triton import knobs

    from qvl_kernels.gpu import turing

    def other(backend: Any, stages: dict | None = None, options: Any = None, *_: Any) -> tuple[str, str] | None:
        """Triton's hook; see `turing.stages`."""
        if stages is None:
            return f"optimizer-{optimizer}", f"optimizer-{optimizer}"
        stages["ttgir"] = lambda source, metadata: backend.make_ttgir(source, metadata, options, optimizer)
        return None

    hook = turing.stages if architecture == 75 else None if optimizer == architecture else other

    with contextlib.ExitStack() as stack:
        for group in (knobs.runtime, knobs.compilation, knobs.cache):
            stack.enter_context(group.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.compilation.disable_line_info = True
        knobs.runtime.add_stages_inspection_hook = hook
        yield


def _current(path: Path) -> bool:
    """Whether there is a bundle of the current sources."""
    try:
        return Bundle(path, PTX_ARCHITECTURE, "cubin").sources == source_hash()
    except DeviceError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m qvl_kernels.gpu.build", description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=BUNDLE, help="the bundle to write (%(default)s)")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="only these; may be repeated")
    parser.add_argument("--missing", action="store_true", help="only if the bundle is missing or outdated")
    options = parser.parse_args(arguments)
    if options.missing and _current(options.out):
        print(f"{options.out}: is up to date")
        return 0

    def show(done: int, total: int, name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{done:4d} of {total}  {name:<50}", end="\n" * (done == total), file=sys.stderr, flush=True)

    architectures = options.arch or ARCHITECTURES
    try:
        build(options.out, architectures, show)
    except DeviceError as e:
        print(e, file=sys.stderr)
        return 1
    kernels = len({name for architecture in architectures for name in names(architecture)})
    print(f"{options.out}: {kernels} kernels, {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
