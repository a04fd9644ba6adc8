"""Find the fastest tile shapes of the products on this GPU, and write them to gpu/tiles.json.

    python bench/gpu_tune.py                    all products; prints the results
    python bench/gpu_tune.py --write            also writes them into the section of this GPU's architecture
    python bench/gpu_tune.py --only linear.int4.rows8 --minutes 5

Every candidate is compiled for this GPU (on all cores), compared with the result of the current shape, and timed over
the model's true shapes with weights larger than the caches. A candidate that spills registers, needs too much shared
memory or computes a different result is rejected. Needs Triton. A change of the file recompiles the kernels.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# so that a checkout works without installation
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent, HERE.parent / "kernels", HERE.parent / "convert")]

import numpy as np  # noqa: E402
from gpu_bench import common  # noqa: E402
from gpu_bench.common import OurTimer, side_by_side, table  # noqa: E402

from qvl_kernels.gpu import signatures  # noqa: E402
from qvl_kernels.gpu.build import Compiled, compile_kernel  # noqa: E402
from qvl_kernels.gpu.launcher import Image  # noqa: E402
from qvl_kernels.ops import Norm  # noqa: E402

TILES = Path(signatures.__file__).with_name("tiles.json")
SHARED_LIMITS = {75: 64 << 10, 80: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Code for sm_80 also runs on sm_86 and 89, which have less shared memory."""

DECODER = ((12288, 4096), (4096, 4096), (4096, 11008))
VISION = ((4992, 1664), (1664, 1664), (8192, 1664), (1664, 8192))
HEAD = ((151936, 4096),)

FEW = {"BN": (32, 64, 128), "warps": (4,), "stages": (3, 4, 5)}
"""As many warps as `few_norm`: the norm of a lone row, which the smallest tiles compute, is the same sum."""
MANY = {"BN": (64, 128), "warps": (4, 8), "stages": (2, 3, 4)}
WAVES = (1, 2, 4, 8)
"""`waves` in tiles.json to try for the smallest tiles, which decide for all of few rows; they need no compilation."""

FULL = 2048
"""Rows of activations that keep every multiprocessor busy."""

WORK: dict[str, tuple[tuple[tuple[int, int], ...], int, tuple[int, ...], dict]] = {
    "linear.int4.rows8": (DECODER, 4, (1,), FEW),
    "linear.int4.rows16": (DECODER, 4, (16,), FEW),
    **{f"linear.int4.rows{rows}": (DECODER, 4, (rows, FULL), MANY) for rows in (32, 64, 128, 256)},
    "linear.int8.rows8": (HEAD, 8, (1,), FEW),
    "linear.int8.rows16": (HEAD, 8, (16,), FEW),
    **{f"linear.int8.rows{rows}": (VISION, 8, (rows, FULL), MANY) for rows in (32, 64, 128, 256)},
    "linear.fp16.rows16": (DECODER, 16, (1,), FEW),
    **{f"linear.fp16.rows{rows}": (VISION, 16, (rows, FULL), MANY) for rows in (64, 128)},
    "gate_up.int4.rows8": (((11008, 4096),), 4, (1,), FEW),
    "gate_up.int4.rows16": (((11008, 4096),), 4, (16,), FEW),
}
"""Kernel -> shapes of its weights, their bits, rows of activations, and the shapes to try."""


def candidates(space: dict[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """All combinations of a space."""
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]


def compile_candidate(name: str, architecture: int, shape: dict[str, int]) -> Compiled | None:
    """A kernel with other tiles, or None where the compiler refuses them."""
    with using(name, architecture, shape):
        try:
            compiled = compile_kernel(name, architecture)
        except Exception:
            return None
    return compiled if compiled.shared <= SHARED_LIMITS[architecture] else None


@contextlib.contextmanager
def using(name: str, architecture: int, shape: dict[str, int]):
    """With `shape` in place of what tiles.json says about a kernel, in this process."""
    section = signatures._tiles().setdefault(str(architecture), {})
    before = section.get(name)
    section[name] = shape
    try:
        yield
    finally:
        del section[name]
        if before is not None:
            section[name] = before


class Trial:
    """A kernel's calls over its true shapes."""

    def __init__(self, ops, name: str):
        self.ops, self.name = ops, name
        shapes, bits, rows, _ = WORK[name]
        self.shapes = [(n, k, m) for (n, k), m in itertools.product(shapes, rows)]
        self.gate = name.startswith("gate_up")
        self.calls, self.outs = [], []
        rng = np.random.default_rng(0)
        for n, k, m in self.shapes:
            pair = 2 if self.gate else 1
            count = common.copies(pair * n * k * bits // 8) if m <= 16 else 2
            x = rng.standard_normal((m, k)).astype(np.float32 if self.gate else np.float16)
            x, out = ops.upload(x), ops.empty((m, n), np.float16)
            norm = Norm(ops.upload(np.ones(k, np.float32)), None, 1e-6)
            weights = [[ops.weight(common.matrix(n, k, bits)) for _ in range(pair)] for _ in range(count)]
            self.calls.append([self._call(x, w, out, norm) for w in weights])
            self.outs.append(out)

    def _call(self, x, weights, out, norm):
        if self.gate:
            return lambda: self.ops.gate_up(x, *weights, out=out, norm=norm)
        return lambda: self.ops.linear(x, *weights, out=out)

    @contextlib.contextmanager
    def alone(self):
        """With this kernel for products of many rows; for those of few rows there is no other."""
        tiles = self.ops.tiles
        if self.many:
            self.ops.tiles = lambda _, w, m: (self.name, self._tiles(w.rows, m), 1)
        try:
            yield
        finally:
            self.ops.tiles = tiles

    @property
    def many(self) -> bool:
        """Whether it is a kernel for many rows."""
        return FULL in WORK[self.name][2]

    def _tiles(self, n: int, m: int) -> int:
        """Number of tiles of a product."""
        constants = self.ops.launch.constants(self.name)
        return -(-m // constants["BM"]) * -(-n // constants["BN"])

    def results(self) -> list[np.ndarray]:
        """What each shape's first call computes."""
        found = []
        with self.alone():
            for calls, out in zip(self.calls, self.outs):
                self.ops.driver.fill(out.address, 0xFF, out.nbytes)
                calls[0]()
                found.append(self.ops.download(out).astype(np.float32))
        return found

    def seconds(self) -> list[float]:
        """Of a call of each shape."""
        timer = OurTimer(self.ops)
        with self.alone():
            return [side_by_side({"": timer.prepare(calls)}, 5)[""] for calls in self.calls]

    def cost(self, seconds: list[float]) -> float:
        """`cost` in tiles.json, by the seconds of every shape: the mean over those with `FULL` rows."""
        constants, costs = self.ops.launch.constants(self.name), []
        for (n, k, m), taken in zip(self.shapes, seconds):
            if m == FULL:
                programs = -(-self._tiles(n, m) // self.ops.driver.multiprocessors)
                costs.append(1e6 * taken * 128 * 128 / (constants["BM"] * constants["BN"] * programs * -(-k // 128)))
        return round(float(np.exp(np.mean(np.log(costs)))), 2)


def install(ops, name: str, compiled: Compiled) -> bool:
    """Launch `compiled` under a kernel's name from now on, unless it keeps registers in memory."""
    image = Image(compiled.cubin, "cubin", compiled.symbol, compiled.warps, compiled.shared, compiled.constants)
    kernel = ops.driver.load(image.code, image.kind, image.symbol, 32 * image.warps, image.shared)
    if ops.driver.spilled(kernel):
        return False
    ops.launch.replace(name, image)
    return True


def tune(name: str, ops, pool, end: float) -> tuple[dict[str, int] | None, list]:
    """The best shape of one kernel, or None if none beats the one in use, and all that were timed, best first."""
    architecture = ops.launch.images.architecture
    own = signatures.tile(name, architecture)
    trial = Trial(ops, name)
    want, base = trial.results(), trial.seconds()
    timed = [(1.0, own)]
    kept = {"optimizer": own["optimizer"]} if "optimizer" in own else {}
    shapes = [shape | kept for shape in candidates(WORK[name][3])]
    futures = {pool.submit(compile_candidate, name, architecture, shape): shape for shape in shapes}
    saved = ops.launch.images[name]
    for future in concurrent.futures.as_completed(futures):
        compiled = future.result()
        if compiled is None or time.monotonic() > end:
            continue
        for chosen in [{"waves": waves} for waves in WAVES] if "waves" in own else [{}]:
            shape = futures[future] | chosen
            with using(name, architecture, shape):
                if not install(ops, name, compiled):
                    break
                got = trial.results()
                if not all(np.allclose(g, w, rtol=1e-2, atol=1e-2 * np.abs(w).max()) for g, w in zip(got, want)):
                    break
                seconds = trial.seconds()
                if trial.many:
                    shape["cost"] = trial.cost(seconds)
                timed.append((float(np.exp(np.mean(np.log(np.divide(seconds, base))))), shape))
    ops.launch.replace(name, saved)
    timed.sort(key=lambda entry: entry[0])
    return (timed[0][1] if timed[0][0] < 0.98 else None), timed


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORK, metavar="KERNEL", help=" ".join(WORK))
    parser.add_argument("--minutes", type=float, default=9, help="time limit (%(default)s)")
    parser.add_argument("--write", action="store_true", help="write the results into tiles.json")
    options = parser.parse_args(arguments)
    start, ops, found = time.monotonic(), common.make_ops(), {}
    present = signatures.names(ops.launch.images.architecture)
    names = options.only or [name for name in WORK if name in present]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for i, name in enumerate(names):
            end = start + 60 * options.minutes * (i + 1) / len(names)
            best, timed = tune(name, ops, pool, end)
            rows = [[" ".join(f"{k}={v}" for k, v in shape.items()), score] for score, shape in timed[:6]]
            table(f"{name}: {len(timed)} tried", ("shape", "time, of the one in use"), rows)
            if best is not None:
                found[name] = best
    architecture = str(ops.launch.images.architecture)
    if options.write and found:
        write(TILES, architecture, found)
    print(json.dumps({"gpu": ops.driver.name, "architecture": architecture, "tiles": found}))
    return 0


def write(path: Path, architecture: str, found: dict[str, dict[str, int]]) -> None:
    """Merge shapes into a section of a tiles.json, one kernel a line."""
    tiles = json.loads(path.read_text())
    tiles.setdefault(architecture, {}).update(found)
    sections = []
    for section, entries in tiles.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(shape)}" for name, shape in entries.items())
        sections.append(f"  {json.dumps(section)}: {{\n{lines}\n  }}" if entries else f"  {json.dumps(section)}: {{}}")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
