"""Estimate the time of a launch on several GPUs from its counts in the PTX interpreter.

The time of a launch is that of its busiest resource, plus latencies::

    NODE + trips * TRIP + max(bytes / copy bandwidth, warp instructions / issue rate, products / their rate)

A trip is a load or an atomic whose latency nothing else of the launch hides: the first tile, a counter at which
programs meet, parts that are added in order four at a time, the parts of four heads of attention, a chunk of a norm.
Launches of a step do not overlap. Instructions are counted for launches that stream weights or the cache; the small
others only wait for memory. The model assumes that programs fill the multiprocessors evenly and that each PTX
instruction is one machine instruction.

Device figures are from NVIDIA's data sheets and architecture papers (multiprocessors, boost clock, memory bandwidth;
products of fp16 with float32 sums for each multiprocessor and clock: half of the fp16 rate on GeForce; for H100 those
of mma.sync, about 60% of wgmma's). A copy is assumed to reach 92% of the memory bandwidth. NODE is the time of an empty
node of a CUDA graph: measured on an H100, where 400 nodes that add 1,024 numbers take 1.4 us each. TRIP is fitted so
that a token of Qwen-VL takes the time measured there (bench/README.md); on other GPUs it may be shorter.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import gpu_kernels
import test_gpu_attention as attention
from fakes.gpu import Launch

from qvl_kernels.gpu import signatures
from qvl_kernels.gpu.kernels import decode_attention

COPY_SHARE, NODE, TRIP, ISSUES = 0.92, 1.1e-6, 1.0e-6, 4
MERGED = decode_attention.MERGED.value
"""Rows whose parts attention adds at a time."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU: `bandwidth` in bytes, `clock` in Hz, `products` of fp16 numbers a clock and multiprocessor."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    products: int

    @property
    def copy(self) -> float:
        return COPY_SHARE * self.bandwidth


DEVICES = [
    Device("RTX 3060", 28, 1.78e9, 360e9, 256),
    Device("RTX 4060", 24, 2.46e9, 272e9, 256),
    Device("RTX 4090", 128, 2.52e9, 1008e9, 256),
    Device("RTX 5090", 170, 2.41e9, 1792e9, 256),
    Device("T4", 40, 1.59e9, 320e9, 512),
    Device("A100", 108, 1.41e9, 1555e9, 1024),
    Device("H100", 132, 1.83e9, 3350e9, 1200),
]


@dataclasses.dataclass
class Counts:
    """Of one program: instructions of its warps, products of fp16 numbers, 32-byte sectors, shared wavefronts."""

    instructions: float = 0
    products: float = 0
    sectors: float = 0
    wavefronts: float = 0

    def plus(self, other: Counts, times: float) -> Counts:
        """``self + times * other``."""
        return Counts(*(a + times * b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


class Counter:
    """An observer of the interpreter."""

    def __init__(self) -> None:
        self.counts = Counts()

    def __call__(self, kind: str, what: np.ndarray | None, nbytes: int, lanes: np.ndarray | slice) -> None:
        if not nbytes:
            warps = np.count_nonzero((lanes if what is None else what).reshape(-1, 32).any(1))
            self.counts.instructions += warps
            if kind.startswith("mma."):
                self.counts.products += warps * 16 * 8 * (16 if "k16" in kind else 8)
            return
        warp = (np.arange(len(what)) if isinstance(lanes, slice) else lanes) // 32
        if kind == "global":
            what = what - what.min() % 32  # arrays on the host are not aligned as on a GPU
            sectors = (what[:, None] + np.arange(0, nbytes, min(nbytes, 32))) // 32
            self.counts.sectors += len(np.unique(sectors + (warp[:, None] << 48)))
        else:
            self.counts.wavefronts += _wavefronts(what, nbytes, warp)


def _wavefronts(addresses: np.ndarray, nbytes: int, warp: np.ndarray) -> int:
    """Most words of one of the 32 banks, for every 128 bytes that a warp may take at once."""
    at_once, total = max(128 // max(nbytes, 4), 1), 0
    for w in np.unique(warp):
        of_warp = addresses[warp == w]
        for first in range(0, len(of_warp), at_once):
            part = of_warp[first : first + at_once]
            words = np.unique((part[:, None] + np.arange(0, nbytes, 4)) // 4)
            total += int(np.bincount(words % 32).max())
    return total


def observed(name: str, run: Callable[[], object]) -> tuple[Counts, int]:
    """What the launches of a kernel do within `run`, and their programs."""
    counter, programs, launch = Counter(), 0, gpu_kernels.launch

    def watched(launched: str, grid: tuple[int, ...], *args: Any) -> None:
        nonlocal programs
        mine = launched == name
        programs += int(np.prod(grid)) if mine else 0
        launch(launched, grid, *args, observer=counter if mine else None)

    modules = [gpu_kernels, attention]
    for module in modules:
        module.launch = watched
    try:
        run()
    finally:
        for module in modules:
            module.launch = launch
    return counter.counts, programs


def _per_program(name: str, run: Callable[[int], object]) -> tuple[Counts, Counts]:
    """Counts of a program, and of each step of its loop, from runs of one step and of three."""
    found = []
    for steps in (1, 3):
        counts, programs = observed(name, functools.partial(run, steps))
        found.append(Counts().plus(counts, 1 / programs))
    step = Counts().plus(found[1].plus(found[0], -1), 1 / 2)
    return found[0].plus(step, -1), step


def _linear(bits: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    w = gpu_kernels.OnDevice(gpu_kernels.matrix(rng, 128, 128 * steps, bits))
    out = gpu_kernels.poisoned((1, 128))
    gpu_kernels.linear(gpu_kernels.activations(rng, 1, 128 * steps), w, out, rows=8)


def _gate_up(steps: int) -> None:
    rng = np.random.default_rng(0)
    gate, up = (gpu_kernels.OnDevice(gpu_kernels.matrix(rng, 128, 128 * steps, 4)) for _ in range(2))
    x, out = gpu_kernels.activations(rng, 1, 128 * steps), gpu_kernels.poisoned((1, 128))
    shape = gpu_kernels.constants("gate_up.int4.rows8")
    tiles = gate.rows // shape["BN"]
    partials, counters = gpu_kernels.poisoned((tiles, 2, shape["BM"] * shape["BN"])), np.zeros(tiles, np.int32)
    gpu_kernels.launch("gate_up.int4.rows8", (tiles, 2), gate.prepare(x), None, None, None, gate.codes, gate.scales,
                       None, up.codes, up.scales, None, out, partials, counters, 1, 128, gate.rows, gate.blocks,
                       gate.shift, gate.matrix.k, 0.0, 0)  # fmt: skip


def _decode(steps: int) -> None:
    """Every split takes `steps` tiles of positions."""
    tile = gpu_kernels.constants("decode_attention.fp16.128")["BN"]
    positions = attention.SPLITS * tile * steps
    attention.test_decode_attention(False, 1, 1, 1, 128, positions - 1, np.random.default_rng(0))


RUNS: dict[str, Callable[[int], object]] = {
    "linear.int4.rows8": functools.partial(_linear, 4),
    "linear.int8.rows8": functools.partial(_linear, 8),
    "gate_up.int4.rows8": _gate_up,
    "decode_attention.fp16.128": _decode,
}


@functools.cache
def counted(name: str) -> tuple[Counts, Counts]:
    """Of a program of a kernel, and of each step of its loop."""
    return _per_program(name, RUNS[name])


@dataclasses.dataclass
class Work:
    """What a launch takes."""

    nbytes: float = 0
    trips: int = 2
    counts: Counts = dataclasses.field(default_factory=Counts)

    def seconds(self, device: Device) -> float:
        """By the formula above."""
        rate = device.multiprocessors * device.clock
        busy = self.nbytes / device.copy, self.counts.instructions / rate / ISSUES
        return NODE + self.trips * TRIP + max(*busy, self.counts.products / rate / device.products)


def work(launch: Launch, context: int) -> Work:
    """Of a launch of a decode step at `context` positions."""
    args, family = launch.args, launch.name.partition(".")[0]
    if family in ("linear", "gate_up"):
        tiles, parts = launch.grid[:2]
        weights, columns = 1 + (family == "gate_up"), 128 * args["blocks"]
        bits = {"int4": 4, "int8": 8, "fp16": 16}[launch.name.split(".")[1].removesuffix("_fine")]
        nbytes = weights * args["rows"] * (columns * bits // 8 + 4 * args["blocks"])
        trips = 1 + (1 + -(-parts // 4) if parts > 1 else 0)
        if args["flags"] & (signatures.NORM | signatures.GATHER):
            trips += 2  # the row, and what was prepared of it
        base, step = counted(launch.name)
        counts = Counts().plus(base, tiles * parts).plus(step, tiles * args["blocks"] * weights)
        return Work(nbytes, trips, counts)
    if family == "decode_attention":
        programs, splits = launch.grid[:2]
        nbytes = 2 * 2 * args["kv_heads"] * args["d"] * context
        base, step = counted(launch.name)
        tile = gpu_kernels.constants(launch.name)["BN"]
        # the length, a tile, the counter after what was stored, a few rows of parts; the angles and the row
        trips = 4 + -(-args["t"] * args["heads"] // args["kv_heads"] // MERGED) + (1 if args.get("flags") else 0)
        return Work(nbytes, trips, Counts().plus(base, programs * splits).plus(step, programs * context / tile))
    if family == "norm":
        return Work(0, 2 * -(-args["k"] // signatures.NORM_CHUNKS[-1]) - 1)
    return Work()


def expected(launches: Callable[[int], Iterable[Launch]], context: int) -> dict[str, dict[str, float]]:
    """For every device: milliseconds a token, and the share of it that copying as many bytes would take.

    `launches` gives those of a token for a number of multiprocessors.
    """
    found = {}
    for device in DEVICES:
        every = [work(launch, context) for launch in launches(device.multiprocessors)]
        seconds = sum(item.seconds(device) for item in every)
        ideal = sum(item.nbytes for item in every) / device.copy
        found[device.name] = {"ms": round(1e3 * seconds, 2), "share": round(ideal / seconds, 3)}
    return found
