"""A GPU that runs the PTX it is given, in the interpreter of tests/ptx."""

from __future__ import annotations

import functools
import gc

import numpy as np
import ptx

from qvl_kernels.gpu import driver as gpu_driver

from .compiled import ARCHITECTURE
from .gpu import FakeDriver, Launch

SHARED_LIMITS = {75: 64 << 10, 80: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""What a block may use (CUDA C programming guide, technical specifications). Code for 80 runs on 86 and 89, too."""


@functools.cache
def _kernel(text: bytes) -> ptx.Kernel:
    """The garbage collector need not look at a kernel's many objects, which stay until the end."""
    gc.disable()
    try:
        return ptx.Kernel(text.decode())
    finally:
        gc.freeze()
        gc.enable()


class PtxDriver(FakeDriver):
    """Stands in for `qvl_kernels.gpu.driver.Driver`; memory is watched, and what is never written cannot be read.

    `turns`: of the blocks of one launch that meet; see `ptx.launch`.
    """

    shared_limit = SHARED_LIMITS[ARCHITECTURE]

    def __init__(self, total: int = 1 << 33, seed: int = 0, turns: int = ptx.launch.TURNS):
        super().__init__(total)
        self.turns = turns
        self.ptx_memory = ptx.DeviceMemory()
        self.rng = np.random.default_rng(seed)
        self.observer = None

    def allocate(self, nbytes):
        address = super().allocate(nbytes)
        self.ptx_memory.add(address, nbytes)
        return address

    def adopt(self, array: np.ndarray, written: np.ndarray | None) -> None:
        """Take an array for device memory as it is, with what of it was `written`; all of it, if not given."""
        self.buffers[array.ctypes.data] = array.reshape(-1).view(np.uint8)
        written = np.ones(array.nbytes, np.uint8) if written is None else written
        self.ptx_memory.add(array.ctypes.data, array.nbytes, written)

    def free(self, address):
        super().free(address)
        self.ptx_memory.remove(address)

    def to_device(self, address, values):
        super().to_device(address, values)
        self._written(address, values.nbytes)[:] = 1

    def _written(self, address: int, nbytes: int) -> np.ndarray:
        region = self.ptx_memory.region(address, max(nbytes, 1))
        return region.written[address - region.begin :][:nbytes]

    def _move(self, target, source, nbytes):
        super()._move(target, source, nbytes)
        self._written(target, nbytes)[:] = self._written(source, nbytes)

    def _fill(self, address, value, nbytes):
        super()._fill(address, value, nbytes)
        self._written(address, nbytes)[:] = 1

    def load(self, image, kind, name, threads, shared):
        assert kind == "ptx" and self._tape is None
        return gpu_driver.Kernel(_kernel(image), name, threads, shared)

    def _run(self, launch: Launch, kernel: gpu_driver.Kernel, args: list[np.generic | int]) -> None:
        super()._run(launch, kernel, args)
        args = [np.uint64(value) if isinstance(value, int) else value for value in args]
        watched = (self.ptx_memory, self.rng, self.observer, self.turns)
        kernel.handle.launch(launch.grid, kernel.threads, kernel.shared, args, *watched)
