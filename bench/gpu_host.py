"""Time the host's part of the launches of a prompt's slice, without a GPU: cuda-core on the driver of tests/fakes.

    python bench/gpu_host.py [--rows 64]

Needs gcc and the packages of the `gpu` extra. The time of the real driver and of its allocations is not included.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes.addresses import TrueSizes
from fakes.driver_library import compile_driver
from fakes.gpu import Images

from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.ops import CudaOps
from qvl_runtime.engine.decoder import Span
from qvl_runtime.families.layers import Decoder
from qvl_runtime.families.weights import Weights

ROOT = Path(__file__).parents[1]
LAYERS, ROUNDS, MULTIPROCESSORS = 8, 50, 132


class Cubins(Images):
    """What the fake driver takes for kernels."""

    def __missing__(self, name: str):
        self[name] = dataclasses.replace(super().__missing__(name), code=b"\x7fELF")
        return self[name]


def fake_driver(folder: Path) -> ctypes.CDLL:
    """Compile the driver library and load it; launches do nothing."""
    library = ctypes.CDLL(str(compile_driver("gcc", folder)), mode=ctypes.RTLD_GLOBAL)
    library.fake_on_launch(ctypes.CDLL(None).abs)  # of the mode of a launch, 0: no error
    return library


def main() -> None:
    """Print the launches and allocations of a slice, and microseconds a launch."""
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=64)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        fake_driver(Path(folder))
        driver = Driver()
    driver.multiprocessors = MULTIPROCESSORS
    ops = CudaOps(driver, Cubins())
    ops.uploader = lambda values, target: None
    config = json.loads((ROOT / "bench" / "qwen-vl-chat" / "config.json").read_text())
    sizes = TrueSizes(config | {"num_hidden_layers": LAYERS})
    decoder = Decoder(Weights(sizes, ops), sizes.family.decoder_names(sizes.config), sizes.family.rotary)
    sequence, work = decoder.sequence("fp16", 1024), decoder.workspace(rows)
    found = {"launches": 0, "allocations": 0}
    launch, allocate = ops.driver.launch, ops.driver.allocate

    def counted_launch(*args):
        found["launches"] += 1
        launch(*args)

    def counted_allocate(nbytes):
        found["allocations"] += 1
        return allocate(nbytes)

    decoder.forward(work, [Span(sequence, rows)])
    ops.driver.launch, ops.driver.allocate = counted_launch, counted_allocate
    decoder.forward(work, [Span(sequence, rows)])
    ops.driver.launch, ops.driver.allocate = launch, allocate
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        decoder.forward(work, [Span(sequence, rows)])
        seconds.append(time.perf_counter() - begin)
    found["microseconds"] = round(1e6 * float(np.median(seconds)) / found["launches"], 1)
    print(f"{rows} rows, {LAYERS} layers: {found['launches']} launches of {found['microseconds']} us on the host,")
    print(f"{found['allocations']} allocations by the driver")
    harness.print_document(rows=rows, **found)


if __name__ == "__main__":
    main()
