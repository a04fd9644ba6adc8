"""Run the tests of the CPU kernels as other processors would get them, with their instructions emulated.

    python bench/cpu_levels.py [--levels avx512 avxvnni i8mm neon]

The kernels have the lanes, blocking and byte products of the level but are compiled for x86-64-v3 (AVX2): `vpdpbusd`,
`vpdpwssd`, `sdot` and `smmla` are written out in shifts and multiplications. That finds mistakes in the kernels of a
level, but none of what the compiler or a processor makes of its own instructions, and says nothing about speed. Takes
two minutes a level on two cores. Prints a line a level, then one JSON document; exit status 1 if a test failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import parser, print_document

TESTS = ("test_ops.py", "test_cpu_gemm.py", "test_int3.py", "test_row_independence.py")
FOLDER = Path(__file__).parents[1] / "tests"

SELECT = """
import dataclasses, importlib.util, sys
from pathlib import Path
import qvl_kernels
name, path = "qvl_kernels.cpu.features", Path(qvl_kernels.__file__).with_name("cpu") / "features.py"
spec = importlib.util.spec_from_file_location(name, path)
features = sys.modules[name] = sys.modules.get(name) or importlib.util.module_from_spec(spec)
spec.loader.exec_module(features)
real = features.LEVELS["{level}"]
features._compiled_for[:] = [dataclasses.replace(real, cpu="x86-64-v3", features="")]
features.selected.cache_clear()
features.target.cache_clear()
"""
"""Selects the level before the rest of the package is imported, which asks for it."""
EMULATE = """
from llvmlite import ir
from qvl_kernels.cpu.simd import blocks, bytes as products, pairs
from qvl_kernels.cpu.simd.emit import I32, constant

def signed(b, acc, u, s):
    u, s = b.bitcast(u, acc.type), b.bitcast(s, acc.type)
    for k in range(4):
        x, y = (b.ashr(b.shl(v, constant(v.type, 24 - 8 * k)), constant(v.type, 24)) for v in (u, s))
        acc = b.add(acc, b.mul(x, y))
    return acc

def matrix(b, total, u, s):
    u, s = (b.sext(v, ir.VectorType(I32, 16)) for v in (u, s))
    for k in range(8):
        x, y = blocks._pick(b, u, u, [k, k, k + 8, k + 8]), blocks._pick(b, s, s, [k, k + 8, k, k + 8])
        total = b.add(total, b.mul(x, y))
    return total

blocks._multiply = matrix
products.PRODUCTS.update(vnni=products._plain_dot, sdot=signed)
pairs.LEVEL = dataclasses.replace(real, product="shifts")
"""
PLUGIN = """
from qvl_kernels.cpu import bundle
bundle.BUNDLE = bundle.BUNDLE.with_name("none of this level")
bundle.BUILD = bundle.BUILD.replace("emit(level, part)", {before!r} + "emit(level, part)")
"""
"""A plugin of pytest, so that parallel workers have it too; the process that compiles is patched by its text."""


def passes(level: str) -> bool:
    """Run the tests on a level."""
    with tempfile.TemporaryDirectory() as folder:
        select = SELECT.format(level=level)
        Path(folder, "emulated_level.py").write_text(select + PLUGIN.format(before=select + EMULATE), encoding="utf-8")
        places = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": places, "QVL_CACHE_DIR": str(Path(folder, "cache"))}
        environment.pop("QVL_CPU", None)
        options = ["-p", "emulated_level", "-p", "no:cacheprovider", "-q", "-x", "-n", "auto"]
        command = [sys.executable, "-m", "pytest", *options, *(str(FOLDER / name) for name in TESTS)]
        return subprocess.run(command, env=environment, cwd=FOLDER.parent, stdout=sys.stderr).returncode == 0


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--levels", nargs="+", default=["avx512", "avxvnni", "i8mm", "neon"])
    results: dict[str, bool] = {}
    for level in options.parse_args().levels:
        results[level] = passes(level)
        print(f"{level:<8} {'passes' if results[level] else 'FAILS'}", flush=True)
    print_document(bench="cpu_levels", passes=results)
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
