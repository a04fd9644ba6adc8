"""Timing on the device, tables, and weights of the true shapes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import published_vl

from qvl_kernels.gpu import CudaOps
from qvl_kernels.gpu.cache import CudaCache
from qvl_kernels.packing import Matrix, packed_shapes
from qvl_runtime.families.base import Family
from qvl_runtime.families.layers import Decoder
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.family import FAMILY
from qvl_runtime.families.specs import MatrixSpec
from qvl_runtime.families.weights import Weights

BEYOND_CACHE = 400 << 20
"""Bytes of weights read before the first is read again: several times the largest L2 cache."""

CONFIG = Path(__file__).parents[1] / "qwen-vl-chat" / "config.json"

BITS = {"decoder": 4, "vision": 8, "adapter": 8, "embedding": 8, "head": 8}
"""The default bits of `qvl convert`."""

SMALLEST = dict.fromkeys(BITS, 4)


def make_ops() -> CudaOps:
    """The operations on this GPU; tests replace this function."""
    return CudaOps()


def torch_or_none():
    """torch with a usable GPU, or None. It is only compared with, never required."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def peer(make: Callable[[], Callable[[], float]]) -> dict[str, Callable[[], float]]:
    """``{"torch": make()}``; empty, after printing the reason, if torch fails."""
    if torch_or_none() is None:
        return {}
    try:
        return {"torch": make()}
    except Exception as error:
        print(f"  torch has no figure for this: {str(error).splitlines()[0]}")
        return {}


class OurTimer:
    """Times calls of the backend: captured into one graph, so that no launch overhead counts."""

    def __init__(self, ops: CudaOps):
        self.ops = ops

    def prepare(self, calls: Sequence[Callable[[], None]]) -> Callable[[], float]:
        """A function that runs all `calls` once and returns the seconds one of them took."""
        driver = self.ops.driver

        def step() -> None:
            for call in calls:
                call()

        replay = self.ops.capture(step)

        def run() -> float:
            begin = driver.mark()
            replay()
            return driver.seconds(begin, driver.mark()) / len(calls)

        run()
        return run


class TorchTimer:
    """The same for torch."""

    def __init__(self, torch):
        self.torch = torch

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        torch = self.torch
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()

        def run() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / len(calls)

        run()
        return run


def side_by_side(runs: dict[str, Callable[[], float]], repeats: int = 15) -> dict[str, float]:
    """Median seconds of several timed functions, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            taken = run()
            if turn >= 2:
                seconds[name].append(taken)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def copies(nbytes: int) -> int:
    """How many weights of a size are larger than the caches together."""
    return max(2, -(-BEYOND_CACHE // nbytes))


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    lines = [list(map(str, header)), *([_cell(v) for v in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(v.ljust(w) if not i else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


# weights of the true shapes


@functools.cache
def matrix(n: int, k: int, bits: int) -> Matrix:
    """A random symmetric matrix whose products have the size of their input. All of one shape share their bytes."""
    rng = np.random.default_rng(n * 31 + k)
    if bits == 16:
        weight = (rng.standard_normal((min(n, 1024), k)) / np.sqrt(k)).astype(np.float16)
        return Matrix(n, k, 16, 128, np.resize(weight, (n, k)))
    shapes = packed_shapes(n, k, bits)
    codes = np.frombuffer(rng.bytes(int(np.prod(shapes["qweight"][0]))), np.uint8).reshape(shapes["qweight"][0])
    spread = (2**bits - 1) / np.sqrt(12)
    scales = np.full(shapes["scales"][0], 1 / (spread * np.sqrt(k)), np.float16)
    return Matrix(n, k, bits, 128, codes, scales)


@dataclasses.dataclass(frozen=True)
class SyntheticBlob:
    """Stands in for a blob in `Weights`: random values in the true shapes."""

    config: Any
    bits: tuple[tuple[str, int], ...]
    family: Family = FAMILY

    def matrix(self, name: str) -> Matrix:
        spec = next(s for s in self.family.tensors(self.config) if s.name == name)
        assert isinstance(spec, MatrixSpec)
        plain = matrix(spec.n, spec.k, dict(self.bits)[spec.part])
        return dataclasses.replace(plain, bias=np.zeros(spec.n, np.float32) if spec.bias else None)

    def vector(self, name: str) -> np.ndarray:
        shape = next(s.shape for s in self.family.tensors(self.config) if s.name == name)
        if name.endswith("bias"):
            return np.zeros(shape, np.float32)
        if name.endswith("weight"):
            return np.ones(shape, np.float32)
        return (np.random.default_rng(0).standard_normal(shape) / 50).astype(np.float32)


def true_config(layers: int | None = None, vision_layers: int | None = None) -> ModelConfig:
    """The published config, or the same with fewer layers."""
    config = ModelConfig.from_dict(json.loads(CONFIG.read_text()))
    if layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=layers)
    if vision_layers is not None:
        config = dataclasses.replace(config, visual=dataclasses.replace(config.visual, layers=vision_layers))
    return config


def newer_configs() -> dict[str, dict]:
    """The published configs of some newer models, by name."""
    names = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b", "qwen2.5-vl-7b")
    return {name: published_vl.config(name) for name in names}


def synthetic(ops, config: Any, bits: dict[str, int], family: Family = FAMILY) -> Weights:
    """Random weights for a backend."""
    return Weights(SyntheticBlob(config, tuple(bits.items()), family), ops)


def decoder(weights: Weights, family: Family = FAMILY) -> Decoder:
    """The decoder of these weights."""
    return Decoder(weights, family.decoder_names(weights.config), family.rotary)


def clear(ops: CudaOps, cache: CudaCache) -> None:
    """Fill a cache with zeros."""
    for array in itertools.chain(*cache.arrays):
        ops.driver.fill(array.address, 0, array.nbytes)


def pixels(config: ModelConfig) -> np.ndarray:
    """A normalized picture."""
    size = config.visual.image_size
    return np.random.default_rng(1).standard_normal((3, size, size)).astype(np.float32)
