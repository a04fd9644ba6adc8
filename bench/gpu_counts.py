"""Count launches and instructions of one token on the GPU, without a GPU, and estimate its time (gpu_roofline.py).

Launches are those of the true sizes, on a fake driver without memory; instructions are counted in the PTX interpreter.

python bench/gpu_counts.py
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import gpu_roofline
import published_vl
from fakes.addresses import AddressDriver, TrueSizes
from fakes.gpu import Images, Launch

from qvl_kernels.gpu.ops import CudaOps
from qvl_kernels.packing import Matrix
from qvl_runtime.engine.decoder import DecodeStep
from qvl_runtime.families.layers import Decoder
from qvl_runtime.families.weights import Weights

CONFIGS = {
    "qwen-vl-chat": json.loads((Path(__file__).parent / "qwen-vl-chat" / "config.json").read_text()),
    **{name: published_vl.config(name) for name in ("qwen2.5-vl-7b", "qwen3-vl-4b", "qwen3-vl-2b")},
}


class Recorder(AddressDriver):
    """Keeps the launches."""

    def _issue(self, action: Any, *args: Any) -> None:
        self.launches += [argument for argument in args if isinstance(argument, Launch)]


class Ordered(TrueSizes):
    """A decoder whose columns are in activation order."""

    def matrix(self, name: str) -> Matrix:
        matrix = super().matrix(name)
        ordered = self._specs[name].part == "decoder"
        return dataclasses.replace(matrix, perm=np.zeros(matrix.k, np.int32)) if ordered else matrix


CONTEXT = 1024
"""Positions that a token attends to, for the expected times."""


def launches(sizes: TrueSizes, multiprocessors: int = 128) -> list[Launch]:
    """Of one token."""
    driver = Recorder(1 << 40)
    driver.multiprocessors = multiprocessors
    ops = CudaOps(driver, Images())
    ops.uploader = lambda values, target: None
    decoder = Decoder(Weights(sizes, ops), sizes.family.decoder_names(sizes.config), sizes.family.rotary)
    step, sequence = DecodeStep(decoder), decoder.sequence("fp16", 256)
    driver.launches.clear()
    step([(sequence, [1])])
    return driver.launches


def families(found: list[Launch]) -> collections.Counter:
    """How many of each family of kernels."""
    return collections.Counter(launch.name.partition(".")[0] for launch in found)


def main() -> None:
    """Print tables and a JSON document."""
    found: dict[str, Any] = {}
    print("| model | launches a token | with activation order |\n|---|---|---|")
    for name, config in CONFIGS.items():
        plain, ordered = launches(TrueSizes(config)), launches(Ordered(config))
        found[name] = {"plain": families(plain), "ordered": families(ordered)}
        print(f"| {name} | {len(plain)} | {len(ordered)} |")
    print("\n| kernel (sm_80) | warp instructions | products | sectors | shared wavefronts |\n|---|---|---|---|---|")
    for kernel in gpu_roofline.RUNS:
        base, step = (dataclasses.astuple(counts) for counts in gpu_roofline.counted(kernel))
        print(f"| {kernel} | " + " | ".join(f"{a:.0f} + {b:.0f}" for a, b in zip(base, step)) + " |")
        found[kernel] = {"program": base, "step": step}
    models = ("qwen-vl-chat", "qwen3-vl-4b")
    sizes = {name: TrueSizes(CONFIGS[name]) for name in models}
    tables = {name: gpu_roofline.expected(partial(launches, sizes[name]), CONTEXT) for name in models}
    print(
        "\n| GPU | " + " | ".join(f"{name}, ms a token | of copying" for name in models) + " |\n|---|---|---|---|---|"
    )
    for device in gpu_roofline.DEVICES:
        cells = [f"{tables[name][device.name]['ms']:.2f} | {tables[name][device.name]['share']:.0%}" for name in models]
        print(f"| {device.name} | " + " | ".join(cells) + " |")
    print(json.dumps(found | {"expected": tables}))


if __name__ == "__main__":
    main()
