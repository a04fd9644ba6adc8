"""The `Ops` protocol on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.arrays import DeviceArray, expect, same_shape
from qvl_kernels.gpu.attention import MOST_VALUES, AttentionOps, flags_of
from qvl_kernels.gpu.cache import CudaCache
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.launcher import Images
from qvl_kernels.gpu.tiles import Tiles
from qvl_kernels.gpu.weights import DeviceMatrix, to_device
from qvl_kernels.ops import Array, Norm
from qvl_kernels.packing import Matrix

_HALF, _FLOAT = np.dtype(np.float16), np.dtype(np.float32)

_PREPARED_BLOCKS = 12
"""Most blocks of columns for which the programs of `gate_up` prepare a lone row: each has few rows of the weights, and
on an H100 a launch is faster for more."""

_ACTIVATIONS = {"gelu": s.GELU, "gelu_tanh": s.GELU_TANH, "quick_gelu": s.QUICK_GELU}

_ALIGNED = 16
"""Divides the number of columns of rows that `few_norm` normalizes."""

_MOST_ROWS = 1 << 15
"""Most rows in the second dimension of a grid: CUDA allows 65535."""


class _Input(NamedTuple):
    """The input of a product: prepared rows, or a lone row that its programs prepare, as the flags say."""

    rows: DeviceArray
    norm_weight: Array | None = None
    perm: DeviceArray | None = None
    eps: float = 0.0
    flags: int = 0


class CudaOps(AttentionOps):
    """One GPU.

    Parameters
    ----------
    driver : Driver, optional
        By default the first GPU.
    images : mapping of str to Image, optional
        Compiled kernels; by default those of `loader.find`.
    progress : callable
        Called with the bytes of every upload.

    Raises
    ------
    qvl_kernels.ops.DeviceError
        If there is no usable GPU, or there are no kernels for it.
    """

    name = "cuda"
    activation_dtype = _HALF
    score_cache_dtype = "fp16"
    any_capacity = True
    slice_rows = 256
    """On an H200 they take 11.4 ms of Qwen3-VL-4B, and so do 64: the host launches as many kernels."""
    row_cost = 0.1
    """Not measured: the time of a small batch is that of reading the weights, which all rows share."""

    def __init__(
        self,
        driver: Driver | None = None,
        images: Images | None = None,
        progress: Callable[[int], None] = lambda nbytes: None,
    ):
        driver = Driver() if driver is None else driver
        if images is None:
            from qvl_kernels.gpu.loader import find

            images = find(driver.capability)
        super().__init__(driver, images, progress)
        self.tiles = Tiles(self.launch, driver.multiprocessors)

    # memory

    def empty(self, shape, dtype=np.float32):
        return self.memory.array(shape, dtype)

    def upload(self, values):
        self.queue.host_access("an upload")
        array = self.memory.array(values.shape, values.dtype)
        self.uploader(values, array)
        return array

    def write(self, target, values):
        self.queue.host_access("a write")
        values = np.ascontiguousarray(values, target.dtype)
        same_shape(target, values)
        self.uploader(values, target)

    def download(self, array):
        self.queue.host_access("a download")
        values = np.empty(array.shape, array.dtype)
        if values.size:
            self.driver.to_host(values, array.address)
        return values

    def copy(self, source, target):
        same_shape(source, target)
        if source.dtype == target.dtype:
            self.queue(self.driver.move, target.address, source.address, source.nbytes, keep=(source, target))
        else:
            flat = (1, source.size)
            self._gather(source.reshape(flat), None, None, target.reshape(flat))

    def weight(self, matrix: Matrix) -> DeviceMatrix:
        return to_device(self, matrix)

    def coarse(self, weight):
        return True

    def coarse_attention(self, width):
        return True

    def kv_cache(self, layers, kv_heads, head_dim, capacity, dtype):
        return CudaCache(self.memory, self.launch, layers, kv_heads, head_dim, capacity, dtype)

    # products

    def embed(self, ids, table, *, out):
        expect(out, (ids.shape[0], table.k), _FLOAT)
        kind, flags = table.kind.removesuffix("_fine"), s.PERMUTED if table.perm is not None else 0
        sizes = (table.k, table.rows, table.blocks, table.group_shift, flags)
        for piece in _pieces(ids.shape[0], _MOST_ROWS):
            some, to = ids[piece], out[piece]
            grid = (table.blocks, some.shape[0])
            self.launch(f"embed.{kind}", grid, some, table.codes, table.scales, table.perm, to, *sizes)

    def linear(self, x, w, *, out, norm=None, activation=None, residual=None):
        if residual is not None:
            expect(residual, out.shape, _FLOAT)
        flags = 0 if activation is None else _ACTIVATIONS[activation]
        self._product(self._prepare(x, w, norm), w, out, residual, flags | flags_of((residual, s.RESIDUAL)))

    def _product(self, x: _Input, w: DeviceMatrix, out: DeviceArray, residual: DeviceArray | None, flags: int) -> None:
        m = x.rows.shape[0]
        expect(out, (m, w.n))
        most = MOST_VALUES // w.padded // s.FEW_ROWS * s.FEW_ROWS
        if m > most:
            for piece in _pieces(m, most):
                added = None if residual is None else residual[piece]
                self._product(_Input(x.rows[piece]), w, out[piece], added, flags)
            return
        flags |= x.flags | flags_of((w.bias, s.BIAS), (out.dtype == _HALF, s.OUT_HALF))
        name, tiles, split = self.tiles("linear", w, m)
        partials = self._partials(name, tiles, split if split > 1 else 0)
        operands = (w.codes, w.scales, w.bias, residual, out, partials, self._counters)
        sizes = (m, w.n, w.rows, w.blocks, w.group_shift, w.k, x.eps, flags)
        self.launch(name, (tiles, split), *self._input(x, w, tiles * split, split), *operands, *sizes)

    def gate_up(self, x, gate, up, *, out, norm):
        m = x.shape[0]
        expect(out, (m, gate.n))
        alike = _alike(gate, up)
        if gate.kind == "int4" and alike and m <= s.FEW_ROWS:
            name, tiles, split = self.tiles("gate_up", gate, m)
            prepared = self._prepare(x, gate, norm, within=-(-gate.blocks // split) <= _PREPARED_BLOCKS)
            partials = self._partials(name, tiles, 2 * split)
            operands = (gate.codes, gate.scales, gate.bias, up.codes, up.scales, up.bias, out, partials, self._counters)
            flags = (
                flags_of((gate.bias, s.BIAS), (up.bias, s.BIAS_UP), (out.dtype == _HALF, s.OUT_HALF)) | prepared.flags
            )
            sizes = (m, gate.n, gate.rows, gate.blocks, gate.group_shift, gate.k, prepared.eps, flags)
            source = self._input(prepared, gate, tiles * 2 * split, split)
            self.launch(name, (tiles, 2 * split), *source, *operands, *sizes)
            return
        gated, prepared = self.empty((m, gate.n)), self._prepare(x, gate, norm)
        self._product(prepared, gate, gated, None, 0)
        self._product(prepared if alike else self._prepare(x, up, norm), up, out, gated, s.GATE)

    def _prepare(self, x: DeviceArray, w: DeviceMatrix, norm: Norm | None, within: bool = True) -> _Input:
        """Convert activations for a product: fp16, in the weight's column order, zero-padded.

        A lone row is left to the programs of the product, if it may be prepared `within` them.
        """
        if x.shape[1] != w.k:
            raise ValueError(f"a product of x {list(x.shape)} with a weight of {w.k} columns")
        if norm is None and x.dtype == _HALF and w.perm is None and w.padded == w.k:
            return _Input(x)
        m, ordered = x.shape[0], flags_of((w.perm, s.ORDERED))
        aligned = norm is not None and norm.bias is None and w.k % _ALIGNED == 0
        if within and m == 1 and (x.dtype == _HALF if norm is None else aligned):
            if norm is None:
                return _Input(x, perm=w.perm, flags=s.GATHER | ordered)
            expect(x, x.shape, _FLOAT)
            return _Input(x, norm.weight, w.perm, norm.eps, s.NORM | ordered)
        h = self.empty((m, w.padded), np.float16)
        if norm is None:
            self._gather(x, None, w.perm, h)
        elif aligned and m <= s.FEW_ROWS:
            expect(x, x.shape, _FLOAT)
            self.launch("few_norm.any", (m,), x, norm.weight, w.perm, h, w.blocks, w.k, w.k, norm.eps, ordered)
        else:
            self._norm(x, norm, w.perm, h, w.padded)
        return _Input(h)

    def _input(self, x: _Input, w: DeviceMatrix, programs: int, split: int) -> tuple[Array | None, ...]:
        """Return a product's arguments for its input, with memory for what its programs prepare."""
        prepared = self.empty((programs, 128 * -(-w.blocks // split)), np.float16) if x.flags else None
        return x.rows, x.norm_weight, x.perm, prepared

    def _partials(self, name: str, tiles: int, slots: int) -> DeviceArray | None:
        """Return memory for partial sums, `slots` for each tile."""
        constants = self.launch.constants(name)
        return self.empty((tiles, slots, constants["BM"] * constants["BN"])) if slots else None

    # elementwise

    def normalize(self, x, norm, *, out):
        same_shape(x, out)
        self._norm(x, norm, None, out, x.shape[1])

    def _norm(self, x: DeviceArray, norm: Norm, perm: DeviceArray | None, out: DeviceArray, padded: int) -> None:
        expect(x, x.shape, _FLOAT)
        flags = flags_of((norm.bias, s.LAYER_NORM), (perm, s.PERMUTED), (out.dtype == _HALF, s.OUT_HALF))
        arguments = (x, norm.weight, norm.bias, perm, out, x.shape[1], padded, norm.eps, flags)
        self.launch(s.norm_kernel(x.shape[1]), (x.shape[0],), *arguments)

    def gather(self, x, index, *, out):
        expect(index, index.shape[:1], np.dtype(np.int32))
        expect(out, (index.shape[0], *x.shape[1:]), x.dtype)
        self._gather(x, index, None, out)

    def _gather(self, x: DeviceArray, index: DeviceArray | None, perm, out: DeviceArray) -> None:
        k, padded = x.shape[1], out.shape[1]
        halves = (x.dtype == _HALF, s.X_HALF), (out.dtype == _HALF, s.OUT_HALF)
        flags = flags_of((index, s.ROWS), (perm, s.PERMUTED), *halves)
        for piece in _pieces(out.shape[0], _MOST_ROWS):
            rows = (x[piece], None) if index is None else (x, index[piece])
            to = out[piece]
            self.launch("gather.any", (_elements(padded), to.shape[0]), *rows, perm, to, k, padded, flags)

    def add(self, x, y, *, out):
        same_shape(x, y)
        same_shape(x, out)
        halves = (x.dtype == _HALF, s.X_HALF), (y.dtype == _HALF, s.Y_HALF), (out.dtype == _HALF, s.OUT_HALF)
        self.launch("add.any", (_elements(out.size),), x, y, out, out.size, flags_of(*halves))

    # choosing

    def argmax(self, logits, *, out):
        t, size = logits.shape
        values, indices = self.empty((t, s.ARGMAX_PARTS)), self.empty((t, s.ARGMAX_PARTS), np.int32)
        self.launch("argmax.any", (s.ARGMAX_PARTS, t), logits, out, values, indices, self._counters, size)

    def synchronize(self):
        self.driver.synchronize()


def _alike(a: DeviceMatrix, b: DeviceMatrix) -> bool:
    """Whether one kernel can read both weights together."""
    return (a.n, a.k, a.kind, a.group_shift, a.order) == (b.n, b.k, b.kind, b.group_shift, b.order)


def _elements(size: int) -> int:
    return -(-size // s.ELEMENTS)


def _pieces(rows: int, most: int) -> Iterator[slice]:
    """Return the rows of each launch of a kernel that takes at most `most`."""
    return (slice(first, first + most) for first in range(0, rows, most))
