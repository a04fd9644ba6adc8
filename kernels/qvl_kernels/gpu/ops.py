"""The `Ops` protocol on an NVIDIA GPU."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.arrays import DeviceArray, expect, same_shape
from qvl_kernels.gpu.cache import CudaCache
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.graph import Queue, Replay
from qvl_kernels.gpu.launcher import Images, Launcher
from qvl_kernels.gpu.memory import Memory, Uploader
from qvl_kernels.gpu.tiles import COUNTERS, Tiles
from qvl_kernels.gpu.weights import DeviceMatrix, to_device
from qvl_kernels.ops import Array, DeviceError, Norm, check_segments, query_heads
from qvl_kernels.packing import Matrix

_HALF, _FLOAT = np.dtype(np.float16), np.dtype(np.float32)

_FEWEST_SPLITS = 4
"""Fewest parts of the positions in the attention of a few tokens."""

_PREPARED_BLOCKS = 12
"""Most blocks of columns for which the programs of `gate_up` prepare a lone row: each has few rows of the weights, and
on an H100 a launch is faster for more."""

_ACTIVATIONS = {"gelu": s.GELU, "gelu_tanh": s.GELU_TANH, "quick_gelu": s.QUICK_GELU}

_CONSTANTS = 8
"""Number of cached arrays of segment boundaries."""

_ALIGNED = 16
"""Divides the number of columns of rows that `few_norm` normalizes."""

_MOST_ROWS = 1 << 15
"""Most rows in the second dimension of a grid: CUDA allows 65535."""

_MOST_VALUES = 1 << 31
"""Most values that a product or `attention` may read: the kernels compute offsets in int32."""


class _Rotation(NamedTuple):
    """A `rope_append` of one row that was recorded: its place on the tape, what it works on, and its launch."""

    place: tuple[int, int] | None
    where: tuple
    operands: tuple[DeviceArray | None, ...]
    epsilons: tuple[float, ...]
    flags: int


_NO_ROTATION = _Rotation(None, (), (None,) * 4, (0.0, 0.0), 0)


class _Input(NamedTuple):
    """The input of a product: prepared rows, or a lone row that its programs prepare, as the flags say."""

    rows: DeviceArray
    norm_weight: Array | None = None
    perm: DeviceArray | None = None
    eps: float = 0.0
    flags: int = 0


class CudaOps:
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
    row_cost = 0.1
    """Not measured: the time of a small batch is that of reading the weights, which all rows share."""

    def __init__(
        self,
        driver: Driver | None = None,
        images: Images | None = None,
        progress: Callable[[int], None] = lambda nbytes: None,
    ):
        self.driver = Driver() if driver is None else driver
        if images is None:
            from qvl_kernels.gpu.loader import find

            images = find(self.driver.capability)
        self.memory = Memory(self.driver)
        self.queue = Queue(self.driver, self.memory)
        self.launch = Launcher(self.driver, self.queue, images)
        self.tiles = Tiles(self.launch, self.driver.multiprocessors)
        self.uploader = Uploader(self.driver, progress)
        self._counters = self.empty((COUNTERS,), np.int32)
        self.driver.fill(self._counters.address, 0, self._counters.nbytes)
        self._rotation: _Rotation | None = None
        self._bounds: collections.OrderedDict[tuple[int, ...], DeviceArray] = collections.OrderedDict()

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
        self._product(self._prepare(x, w, norm), w, out, residual, flags | _flags((residual, s.RESIDUAL)))

    def _product(self, x: _Input, w: DeviceMatrix, out: DeviceArray, residual: DeviceArray | None, flags: int) -> None:
        m = x.rows.shape[0]
        expect(out, (m, w.n))
        most = _MOST_VALUES // w.padded // s.FEW_ROWS * s.FEW_ROWS
        if m > most:
            for piece in _pieces(m, most):
                added = None if residual is None else residual[piece]
                self._product(_Input(x.rows[piece]), w, out[piece], added, flags)
            return
        flags |= x.flags | _flags((w.bias, s.BIAS), (out.dtype == _HALF, s.OUT_HALF))
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
            flags = _flags((gate.bias, s.BIAS), (up.bias, s.BIAS_UP), (out.dtype == _HALF, s.OUT_HALF)) | prepared.flags
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
        m, ordered = x.shape[0], _flags((w.perm, s.ORDERED))
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
        flags = _flags((norm.bias, s.LAYER_NORM), (perm, s.PERMUTED), (out.dtype == _HALF, s.OUT_HALF))
        arguments = (x, norm.weight, norm.bias, perm, out, x.shape[1], padded, norm.eps, flags)
        self.launch(s.norm_kernel(x.shape[1]), (x.shape[0],), *arguments)

    def gather(self, x, index, *, out):
        expect(index, index.shape[:1], np.dtype(np.int32))
        expect(out, (index.shape[0], *x.shape[1:]), x.dtype)
        self._gather(x, index, None, out)

    def _gather(self, x: DeviceArray, index: DeviceArray | None, perm, out: DeviceArray) -> None:
        k, padded = x.shape[1], out.shape[1]
        halves = (x.dtype == _HALF, s.X_HALF), (out.dtype == _HALF, s.OUT_HALF)
        flags = _flags((index, s.ROWS), (perm, s.PERMUTED), *halves)
        for piece in _pieces(out.shape[0], _MOST_ROWS):
            rows = (x[piece], None) if index is None else (x, index[piece])
            to = out[piece]
            self.launch("gather.any", (_elements(padded), to.shape[0]), *rows, perm, to, k, padded, flags)

    def add(self, x, y, *, out):
        same_shape(x, y)
        same_shape(x, out)
        halves = (x.dtype == _HALF, s.X_HALF), (y.dtype == _HALF, s.Y_HALF), (out.dtype == _HALF, s.OUT_HALF)
        self.launch("add.any", (_elements(out.size),), x, y, out, out.size, _flags(*halves))

    # attention

    def vision_attention(self, qkv, heads, *, out, rope=None, segments=None):
        rows, d = qkv.shape[0], qkv.shape[1] // (3 * heads)
        expect(qkv, (rows, 3 * heads * d), _HALF)
        if rope is not None:
            expect(rope, (rows, d), _FLOAT)
            if d % 2:
                raise ValueError(f"a rotation of heads of {d}, which is odd")
            self.launch("rotate.any", (rows, -(-2 * heads // s.ROPE_HEADS)), qkv, rope, heads, d)
        bounds = None if segments is None else self._row_bounds(segments, rows)
        self._attention((qkv, qkv, qkv), bounds, rows, rows, heads, 3, d, out)

    def _row_bounds(self, segments: Sequence[int], rows: int) -> DeviceArray:
        """Return int32 ``[2, rows]``: first row and end of each row's segment.

        All blocks of a picture use the same bounds: they are uploaded once, outside of captured steps.
        """
        key = tuple(map(int, segments))
        found = self._bounds.pop(key, None)
        if found is None:
            check_segments(key, rows)
            ends = np.asarray(key, np.int32)
            found = self.memory.constant((2, rows), np.int32)
            self.uploader(np.repeat(np.stack([ends[:-1], ends[1:]]), np.diff(ends), axis=1), found)
        self._bounds[key] = found
        if len(self._bounds) > _CONSTANTS:
            self._bounds.popitem(last=False)
        return found

    def cross_attention(self, q, k, v, heads, *, out):
        self._attention((q, k, v), None, q.shape[0], k.shape[0], heads, 1, q.shape[1] // heads, out)

    def _attention(self, qkv: tuple, bounds, q_rows: int, k_rows: int, heads: int, parts: int, d: int, out) -> None:
        expect(out, (q_rows, heads * d), _HALF)
        if d > 128:
            raise ValueError(f"heads of {d}: the GPU kernels take at most 128")
        if max(q_rows, k_rows) * parts * heads * d > _MOST_VALUES:
            raise DeviceError(f"a picture of {k_rows} patches is too large for the GPU: lower the limits of its pixels")
        segments = "" if bounds is None else ".segments"
        name = f"{d}{segments}"
        if name not in s.KERNELS["attention"].variants:
            name = f"any{segments}"
        name = f"attention.{name}"
        grid = (-(-q_rows // self.launch.constants(name)["BM"]), heads)
        self.launch(name, grid, *qkv, bounds, out, q_rows, k_rows, heads, parts, d, 1 / math.sqrt(d))

    def rope_append(self, qkv, *, rope, logn, cache, layer, start, q_norm=None, k_norm=None):
        heads = query_heads(qkv.shape[1], cache)
        grid = (qkv.shape[0], -(-(heads + cache.kv_heads) // s.ROPE_HEADS))
        weights, epsilons = zip(*(_head_norm(norm, cache.head_dim) for norm in (q_norm, k_norm)))
        flags = _flags((logn, s.LOGN), (q_norm, s.Q_NORM), (k_norm, s.K_NORM))
        sizes = (heads, cache.kv_heads, cache.stride, cache.head_dim, *epsilons, flags)
        self.launch(f"rope_append.{cache.dtype}", grid, qkv, rope, logn, *weights, *cache.layer(layer), start, *sizes)
        if self.queue.place is not None and qkv.shape[0] == 1:
            operands, where = (rope, logn, *weights), (qkv.address, cache, layer, start.address)
            self._rotation = _Rotation(self.queue.place, where, operands, epsilons, flags | s.ROPE)

    def cached_attention(self, qkv, cache, layer, start, *, out):
        t, d, heads, kv_heads = qkv.shape[0], cache.head_dim, query_heads(qkv.shape[1], cache), cache.kv_heads
        expect(out, (t, heads * d), _HALF)
        arguments = (qkv, *cache.layer(layer), start, out)
        sizes = (t, heads, kv_heads, cache.stride, d, 1 / math.sqrt(d))
        family = "decode_attention" if t <= s.FEW_ROWS else "cached_attention"
        name = f"{family}.{cache.dtype}.{'128' if d == 128 else 'any'}"
        rows = self.launch.constants(name)["BM"]
        if t <= s.FEW_ROWS:
            splits = min(max(2 * self.driver.multiprocessors // kv_heads, _FEWEST_SPLITS), s.DECODE_SPLITS)
            partials = self.empty((t * heads, splits, 128 + 1))
            grid = (kv_heads * -(-t * (heads // kv_heads) // rows), splits)
            rotation, self._rotation = self._rotation, None
            found = self.queue.place, (qkv.address, cache, layer, start.address)
            if rotation is not None and rotation[:2] == found and heads // kv_heads < rows:
                self.queue.take_back()
            else:
                rotation = _NO_ROTATION
            operands = (*arguments, partials, self._counters, *rotation.operands)
            self.launch(name, grid, *operands, *sizes, *rotation.epsilons, rotation.flags)
        else:
            self.launch(name, (-(-t // rows), heads), *arguments, *sizes)

    # choosing

    def argmax(self, logits, *, out):
        t, size = logits.shape
        values, indices = self.empty((t, s.ARGMAX_PARTS)), self.empty((t, s.ARGMAX_PARTS), np.int32)
        self.launch("argmax.any", (s.ARGMAX_PARTS, t), logits, out, values, indices, self._counters, size)

    def capture(self, step: Callable[[], None]) -> Replay:
        try:
            return self.queue.capture(step)
        finally:
            self._rotation = None

    def movable(self, replay, inputs):
        return None

    def synchronize(self):
        self.driver.synchronize()


def _flags(*conditions: tuple) -> int:
    """Return the sum of the flags whose condition is an array or True."""
    return sum(flag for condition, flag in conditions if condition is not None and condition is not False)


def _alike(a: DeviceMatrix, b: DeviceMatrix) -> bool:
    """Whether one kernel can read both weights together."""
    return (a.n, a.k, a.kind, a.group_shift, a.order) == (b.n, b.k, b.kind, b.group_shift, b.order)


def _head_norm(norm: Norm | None, d: int) -> tuple[Array | None, float]:
    """Return weight and eps of the RMSNorm of each head."""
    if norm is None:
        return None, 0.0
    if norm.bias is not None:
        raise ValueError("a norm of queries or keys has no bias")
    expect(norm.weight, (d,), _FLOAT)
    return norm.weight, norm.eps


def _elements(size: int) -> int:
    return -(-size // s.ELEMENTS)


def _pieces(rows: int, most: int) -> Iterator[slice]:
    """Return the rows of each launch of a kernel that takes at most `most`."""
    return (slice(first, first + most) for first in range(0, rows, most))
