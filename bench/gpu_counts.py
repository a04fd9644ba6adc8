"""Count the launches of one token on the GPU, without a GPU: at true sizes, on a driver of addresses alone.

python bench/gpu_counts.py
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

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


def launches(sizes: TrueSizes) -> collections.Counter:
    """Of one token, by family of kernels."""
    driver = Recorder(1 << 40)
    ops = CudaOps(driver, Images())
    ops.uploader = lambda values, target: None
    decoder = Decoder(Weights(sizes, ops), sizes.family.decoder_names(sizes.config), sizes.family.rotary)
    step, sequence = DecodeStep(decoder), decoder.sequence("fp16", 256)
    driver.launches.clear()
    step([(sequence, [1])])
    return collections.Counter(launch.name.partition(".")[0] for launch in driver.launches)


def main() -> None:
    """Print a table and a JSON document."""
    found = {}
    print("| model | launches a token | with activation order |\n|---|---|---|")
    for name, config in CONFIGS.items():
        plain, ordered = launches(TrueSizes(config)), launches(Ordered(config))
        found[name] = {"plain": plain, "ordered": ordered}
        print(f"| {name} | {plain.total()} | {ordered.total()} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
