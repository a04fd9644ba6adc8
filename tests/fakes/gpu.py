"""A GPU made of host memory: the seam of `qvl_kernels.gpu.driver`, with kernels recorded (ptx_gpu.py runs them).

An address is that of a host buffer; a launch is recorded, and given to an executor if there is one. Fresh memory is
filled with NaN so that what is read before it is written shows.
"""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np

from qvl_kernels.gpu import signatures
from qvl_kernels.gpu.driver import Kernel
from qvl_kernels.gpu.launcher import Image
from qvl_kernels.ops import DeviceError
from qvl_kernels.packing import Matrix, pack

ARCHITECTURE = 80


class Images(dict):
    """An empty image of every kernel, with the constants it would be compiled with."""

    def __init__(self, architecture: int = ARCHITECTURE):
        super().__init__()
        self.architecture = architecture

    def __missing__(self, name: str) -> Image:
        tile, constants = (find(name, self.architecture) for find in (signatures.tile, signatures.constants))
        self[name] = Image(name.encode(), "cubin", name, tile["warps"], 0, constants)
        return self[name]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch as the driver would see it: `args` holds every argument by name, pointers as addresses."""

    name: str
    grid: tuple[int, int, int]
    args: dict[str, int | float]
    branch: int | None = None


def choose(token: int, out: int, rows: int, logits: int, size: int) -> None:
    """What argmax leaves, if every row of the logits (addresses of ``[rows, size]`` and ``[rows]``) is for `token`."""
    (ctypes.c_int32 * rows).from_address(out)[:] = [token] * rows
    values = np.ctypeslib.as_array((ctypes.c_float * (rows * size)).from_address(logits)).reshape(rows, size)
    values[:] = np.arange(size) == token


class FakeStreams:
    """Stands in for `qvl_kernels.gpu.streams.Streams`: branches run one after the other, and a launch knows its own."""

    def __init__(self, issue):
        self._issue, self.index = issue, None

    def fork(self):
        pass

    def branch(self, index):
        self._issue(setattr, self, "index", index)

    def join(self, count):
        self._issue(setattr, self, "index", None)


class FakeDriver:
    """Stands in for `qvl_kernels.gpu.driver.Driver`."""

    name = "Fake GPU"
    capability = (8, 0)
    driver_version = (12, 8)
    shared_limit = 101376
    multiprocessors = 4

    def __init__(self, total: int = 1 << 33, executor=None):
        self.total, self.executor = total, executor
        self.buffers: dict[int, np.ndarray] = {}
        self.launches: list[Launch] = []
        self.allocations = 0
        self._tape = None
        self.streams = FakeStreams(self._issue)

    def memory(self):
        return self.total - sum(len(b) for b in self.buffers.values()), self.total

    def allocate(self, nbytes):
        if nbytes > self.memory()[0]:
            raise DeviceError(f"{self.name} is out of memory")
        self.allocations += 1
        raw = np.full(nbytes + 256, 0xFF, np.uint8)
        address = -(-raw.ctypes.data // 256) * 256
        self.buffers[address] = raw[:nbytes]
        return address

    def free(self, address):
        del self.buffers[address]

    def pinned(self, nbytes):
        return np.empty(nbytes, np.uint8)

    def to_device(self, address, values):
        assert values.flags.c_contiguous and self._tape is None
        self.check(address, values.nbytes)
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def to_host(self, target, address):
        assert target.flags.c_contiguous and self._tape is None
        self.check(address, target.nbytes)
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def move(self, target, source, nbytes):
        self.check(target, nbytes)
        self.check(source, nbytes)
        self._issue(self._move, target, source, nbytes)

    def fill(self, address, value, nbytes):
        self.check(address, nbytes)
        self._issue(self._fill, address, value, nbytes)

    def load(self, image, kind, name, threads, shared):
        assert self._tape is None, "kernels cannot be loaded within a capture"
        return Kernel(name, name, threads, shared)

    def spilled(self, kernel):
        return 0

    def launch(self, kernel, grid, args):
        *values, scratch, profile = args
        assert scratch == profile == 0 and all(n > 0 for n in grid) and max(grid[1:]) <= 65535
        named = {}
        for (name, kind), value in zip(signatures.types(kernel.name).items(), values, strict=True):
            assert isinstance(value, {"i32": np.int32, "fp32": np.float32}.get(kind, int))
            named[name] = value if isinstance(value, int) else value.item()
            if kind.startswith("*") and value:
                self.check(int(value), 1)
        self._issue(self._run, Launch(kernel.name, grid, named), kernel, args)

    def synchronize(self):
        pass

    def mark(self):
        return object()

    def wait(self, event):
        pass

    def seconds(self, begin, end):
        return 1e-3

    def capture(self, work):
        self._tape = tape = []
        try:
            work()
        finally:
            self._tape = None
        return tape

    def replay(self, graph):
        for action, args in graph:
            action(*args)

    def _issue(self, action, *args):
        if self._tape is None:
            action(*args)
        else:
            self._tape.append((action, args))

    def _move(self, target, source, nbytes):
        ctypes.memmove(target, source, nbytes)

    def _fill(self, address, value, nbytes):
        ctypes.memset(address, value, nbytes)

    def _run(self, launch, kernel, args):
        self.launches.append(dataclasses.replace(launch, branch=self.streams.index))
        if self.executor is not None:
            self.executor(launch)

    def check(self, address, nbytes):
        """Everything is inside a live allocation."""
        assert any(b <= address and address + nbytes <= b + len(raw) for b, raw in self.buffers.items())


def matrix(n: int, k: int, bits: int, group_size: int = 128, seed: int = 0, **options) -> Matrix:
    """A random matrix; `options` go to `pack`."""
    rng = np.random.default_rng(seed)
    if bits == 16:
        return Matrix(n, k, 16, 128, rng.standard_normal((n, k)).astype(np.float16))
    codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    return pack(codes, rng.random((n, -(-k // group_size))) / 50, bits, group_size, **options)
