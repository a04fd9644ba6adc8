"""Identify the GPU and load its kernels, compiled if necessary."""

from __future__ import annotations

import time

from gpu_bench import common
from gpu_bench.common import torch_or_none
from qvl_kernels.gpu import signatures


def setup() -> dict:
    """Load every kernel, and describe the GPU."""
    begin = time.perf_counter()
    ops = common.make_ops()
    images, driver = ops.launch.images, ops.driver
    found = time.perf_counter() - begin
    begin = time.perf_counter()
    failures = []
    names = signatures.names(images.architecture)
    for name in names:
        image = images[name]
        try:
            driver.load(image.code, image.kind, image.symbol, 32 * image.warps, image.shared)
        except Exception as error:
            failures.append([name, str(error)])
    loaded = time.perf_counter() - begin
    torch = torch_or_none()
    free, total = driver.memory()
    print(f"{driver.name}, compute capability {driver.capability}, CUDA {driver.driver_version}")
    print(f"{driver.multiprocessors} multiprocessors, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free")
    print(f"{len(names)} kernels for sm_{images.architecture}: {found:.1f} s to find, {loaded:.1f} s to load")
    for failure in failures:
        print("  FAILED", *failure)
    return {
        "gpu": driver.name,
        "capability": driver.capability,
        "driver": driver.driver_version,
        "architecture": images.architecture,
        "torch": torch.__version__ if torch is not None else None,
        "kernels_found_s": found,
        "kernels_loaded_s": loaded,
        "failures": failures,
    }
