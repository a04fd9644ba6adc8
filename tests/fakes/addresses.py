"""A GPU of addresses alone: true sizes are allocated, rounded as a driver rounds them, and nothing is computed."""

from __future__ import annotations

import itertools

import numpy as np

from qvl_kernels.ops import DeviceError
from qvl_kernels.packing import Matrix, packed_shapes
from qvl_runtime.families import family_of
from qvl_runtime.families.specs import MatrixSpec

from .gpu import FakeDriver

PAGE = 2 << 20


class AddressDriver(FakeDriver):
    """Stands in for `qvl_kernels.gpu.driver.Driver`.

    Attributes
    ----------
    held, most : int
        Bytes taken now, and the most there were: multiples of 2 MiB from 1 MiB on, as `cuMemAlloc` rounds.
    """

    multiprocessors = 128

    def __init__(self, total: int):
        super().__init__(total)
        self.held = self.most = 0
        self._sizes: dict[int, int] = {}
        self._addresses = itertools.count(1 << 40, 1 << 36)

    def memory(self):
        return self.total - self.held, self.total

    def allocate(self, nbytes):
        size = -(-nbytes // PAGE) * PAGE if nbytes > PAGE // 2 else -(-nbytes // 512) * 512
        if self.held + size > self.total:
            raise DeviceError(f"{self.name} is out of memory")
        address = next(self._addresses)
        self._sizes[address] = size
        self.held += size
        self.most = max(self.most, self.held)
        return address

    def free(self, address):
        self.held -= self._sizes.pop(address)

    def to_device(self, address, values):
        pass

    def to_host(self, target, address):
        target[...] = 0

    def check(self, address, nbytes):
        pass

    def _issue(self, action, *args):
        pass


class TrueSizes:
    """A blob's face: tensors of a model's true shapes, all zeros, that take no memory."""

    def __init__(self, config: dict):
        self.family = family_of(config, "config")
        self.config = self.family.read_config(config, "config")
        self._specs = {spec.name: spec for spec in self.family.tensors(self.config)}
        matrices = [spec for spec in self._specs.values() if isinstance(spec, MatrixSpec)]
        self.file = {f"{spec.name}.bias" for spec in matrices if spec.bias}  # names, as those of a file

    def bits(self, name: str) -> tuple[int, int]:
        """As the converter's default."""
        return (4 if self._specs[name].part == "decoder" else 8), 128

    def matrix(self, name: str) -> Matrix:
        spec = self._specs[name]
        assert isinstance(spec, MatrixSpec)
        bits, group = self.bits(name)
        arrays = {key: _zeros(*what) for key, what in packed_shapes(spec.n, spec.k, bits, group).items()}
        bias = _zeros((spec.n,), np.float32) if spec.bias else None
        return Matrix(spec.n, spec.k, bits, group, arrays["qweight"], arrays["scales"], bias=bias)

    def vector(self, name: str) -> np.ndarray:
        return np.zeros(self._specs[name].shape, np.float32)


def _zeros(shape, dtype) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)
