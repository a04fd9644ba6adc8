"""Rotation and attention on an NVIDIA GPU: launches, and what is kept between them."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.arrays import DeviceArray, expect
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.graph import Queue, Replay
from qvl_kernels.gpu.launcher import Images, Launcher
from qvl_kernels.gpu.memory import Memory, Uploader
from qvl_kernels.gpu.table import SequenceTable, Used
from qvl_kernels.gpu.tiles import COUNTERS
from qvl_kernels.ops import Array, DeviceError, Norm, check_segments, query_heads

_HALF, _FLOAT = np.dtype(np.float16), np.dtype(np.float32)

_FEWEST_SPLITS = 4
"""Fewest parts of the positions in the attention of a few tokens."""

_CONSTANTS = 8
"""Number of cached arrays of segment boundaries."""

_COUNTERS = 4
"""Each branch's counters begin at a multiple of this, as an argument of a kernel has to."""

MOST_VALUES = 1 << 31
"""Most values that a product or `attention` may read: the kernels compute offsets in int32."""


class _Rotation(NamedTuple):
    """A `rope_append` that was recorded: its place on the tape, what it works on, and its launch."""

    place: tuple[int, int] | None
    where: tuple
    sequence: tuple
    norms: tuple[DeviceArray | None, ...]
    epsilons: tuple[float, ...]
    flags: int


class AttentionOps:
    """The part of `CudaOps` that rotates and attends; see there for the parameters."""

    def __init__(self, driver: Driver, images: Images, progress: Callable[[int], None]):
        self.driver = driver
        self.memory = Memory(driver)
        self.queue = Queue(driver, self.memory)
        self.launch = Launcher(driver, self.queue, images)
        self.uploader = Uploader(driver, progress)
        self._counters = self.memory.array((COUNTERS,), np.int32)
        driver.fill(self._counters.address, 0, self._counters.nbytes)
        self._first_counter, self._apart = 0, False
        self._rotation: _Rotation | None = None
        self._table = SequenceTable(self.memory, self.uploader)
        self._bounds: collections.OrderedDict[tuple[int, ...], DeviceArray] = collections.OrderedDict()

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
        if max(q_rows, k_rows) * parts * heads * d > MOST_VALUES:
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
        flags = flags_of((logn, s.LOGN), (q_norm, s.Q_NORM), (k_norm, s.K_NORM))
        *arrays, rope, logn, capacity, listed = found = self._sequence(Used(cache, layer, start, rope, logn))
        flags |= listed
        sizes = (heads, cache.kv_heads, capacity, cache.head_dim, *epsilons, flags)
        self.launch(f"rope_append.{cache.dtype}", grid, qkv, rope, logn, *weights, *arrays, *sizes)
        if self.queue.place is not None:
            where = qkv.address, cache, layer, start.address
            self._rotation = _Rotation(self.queue.place, where, found, weights, epsilons, flags)

    def cached_attention(self, qkv, cache, layer, start, *, out):
        t, d, heads, kv_heads = qkv.shape[0], cache.head_dim, query_heads(qkv.shape[1], cache), cache.kv_heads
        expect(out, (t, heads * d), _HALF)
        scale, variant = 1 / math.sqrt(d), f"{cache.dtype}.{'128' if d == 128 else 'any'}"
        if t > s.FEW_ROWS:
            name = f"cached_attention.{variant}"
            grid = (-(-t // self.launch.constants(name)["BM"]), heads)
            sizes = (t, heads, kv_heads, cache.stride, d, scale)
            self.launch(name, grid, qkv, *cache.layer(layer), start, out, *sizes)
            return
        name = f"decode_attention.{variant}"
        rows = self.launch.constants(name)["BM"]
        splits = min(max(2 * self.driver.multiprocessors // kv_heads, _FEWEST_SPLITS), s.DECODE_SPLITS)
        partials = self.memory.array((t * heads, splits, 128 + 1), _FLOAT)
        grid = (kv_heads * -(-t * (heads // kv_heads) // rows), splits)
        counters = self._counters[self._first_counter :]
        if self._apart:
            self._first_counter += -(-grid[0] // _COUNTERS) * _COUNTERS
        rotation, self._rotation = self._rotation, None
        if rotation is None or rotation[:2] != (self.queue.place, (qkv.address, cache, layer, start.address)):
            rotation = None
        sequence = self._sequence(Used(cache, layer, start, None, None)) if rotation is None else rotation.sequence
        *arrays, rope, logn, capacity, flags = sequence
        if rotation is not None and t == 1 and heads // kv_heads < rows:
            self.queue.take_back()
            tables, epsilons, flags = (rope, logn, *rotation.norms), rotation.epsilons, rotation.flags | s.ROPE
        else:
            tables, epsilons = (None,) * 4, (0.0, 0.0)
        sizes = (t, heads, kv_heads, capacity, d, scale, *epsilons, flags)
        self.launch(name, grid, qkv, *arrays, out, partials, counters, *tables, *sizes)

    def _sequence(self, used: Used) -> tuple:
        """Return a launch's arguments for a sequence: k, v, their scales, start, entry; rope, logn; capacity; flags."""
        if self._apart:
            return (*[None] * 5, self._table.add(used), None, None, 0, s.LISTED)
        return (*used.cache.layer(used.layer), used.start, None, used.rope, used.logn, used.cache.stride, 0)

    # steps

    def capture(self, step: Callable[[], None]) -> Replay:
        self._table = table = SequenceTable(self.memory, self.uploader)
        try:
            replay = self.queue.capture(step)
        finally:
            self._table, self._rotation = SequenceTable(self.memory, self.uploader), None  # they refer to caches
        table.upload()
        replay.table = table
        return replay

    def movable(self, replay, inputs):
        return replay.table.movable(inputs)

    def side_by_side(self, works):
        self._apart = len(works) > 1 and self.queue.place is not None
        try:
            if not self._apart:
                for work in works:
                    work()
                return
            with self.queue.branches() as begin:
                for work in works:
                    begin()
                    work()
        finally:
            self._first_counter, self._apart = 0, False


def flags_of(*conditions: tuple) -> int:
    """Return the sum of the flags whose condition is an array or True."""
    return sum(flag for condition, flag in conditions if condition is not None and condition is not False)


def _head_norm(norm: Norm | None, d: int) -> tuple[Array | None, float]:
    """Return weight and eps of the RMSNorm of each head."""
    if norm is None:
        return None, 0.0
    if norm.bias is not None:
        raise ValueError("a norm of queries or keys has no bias")
    expect(norm.weight, (d,), _FLOAT)
    return norm.weight, norm.eps
